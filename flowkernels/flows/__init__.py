"""Flows: readable stacks of layers with density, sampling and training."""

from .base import Base, StandardLogistic, StandardNormal
from .flow import Flow, FlowDistribution
from .glow import Glow
from .iaf import IAF
from .maf import MAF
from .networks import ConvNet, ResNet, ZeroConv2d
from .nice import NICE
from .realnvp import RealNVP

__all__ = [
    "IAF",
    "MAF",
    "NICE",
    "Base",
    "ConvNet",
    "Flow",
    "FlowDistribution",
    "Glow",
    "RealNVP",
    "ResNet",
    "StandardLogistic",
    "StandardNormal",
    "ZeroConv2d",
]
