"""Flows: readable stacks of layers with density, sampling and training."""

from .base import StandardNormal
from .flow import Flow, FlowDistribution
from .maf import MAF

__all__ = ["MAF", "Flow", "FlowDistribution", "StandardNormal"]
