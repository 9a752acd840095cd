"""Layers: `z, logabsdet = layer(x, context)` maps data to noise, `x, logabsdet = layer.inverse(z, context)` maps back."""

from .batch_norm import FlowBatchNorm
from .inverse import Inverse
from .masked_autoregressive import MaskedAutoregressive
from .masked_linear import MaskedLinear, Unitwise
from .permute import Permute

__all__ = ["FlowBatchNorm", "Inverse", "MaskedAutoregressive", "MaskedLinear", "Permute", "Unitwise"]
