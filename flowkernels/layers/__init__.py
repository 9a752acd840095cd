"""Layers: `z, logabsdet = layer(x, context)` maps data to noise, `x, logabsdet = layer.inverse(z, context)` maps back."""

from .actnorm import ActNorm
from .batch_norm import FlowBatchNorm
from .inverse import Inverse
from .invertible_conv1x1 import ActNormConv1x1, InvertibleConv1x1
from .masked_autoregressive import MaskedAutoregressive
from .masked_linear import MaskedLinear, Unitwise
from .permute import Permute

__all__ = [
    "ActNorm",
    "ActNormConv1x1",
    "FlowBatchNorm",
    "Inverse",
    "InvertibleConv1x1",
    "MaskedAutoregressive",
    "MaskedLinear",
    "Permute",
    "Unitwise",
]
