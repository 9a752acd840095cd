"""Layers: `z, logabsdet = layer(x, context)` maps data to noise, `x, logabsdet = layer.inverse(z, context)` maps back."""

from .actnorm import ActNorm
from .batch_norm import FlowBatchNorm
from .chain import Chain
from .coupling import AdditiveCoupling, AffineCoupling
from .dequantize import Dequantize, Logit
from .diagonal_scale import DiagonalScale
from .factor_out import FactorOut
from .inverse import Inverse
from .invertible_conv1x1 import ActNormConv1x1, InvertibleConv1x1
from .masked_autoregressive import MaskedAutoregressive
from .masked_linear import MaskedLinear, Unitwise
from .mlp import MLP
from .permute import Permute
from .reshape import Reshape
from .squeeze import Squeeze

__all__ = [
    "MLP",
    "ActNorm",
    "ActNormConv1x1",
    "AdditiveCoupling",
    "AffineCoupling",
    "Chain",
    "Dequantize",
    "DiagonalScale",
    "FactorOut",
    "FlowBatchNorm",
    "Inverse",
    "InvertibleConv1x1",
    "Logit",
    "MaskedAutoregressive",
    "MaskedLinear",
    "Permute",
    "Reshape",
    "Squeeze",
    "Unitwise",
]
