"""The ops: validated public functions over fused kernels, each with a plain PyTorch reference."""

from .activation import Activation
from .autoregressive import Conditioner, MaskedLayer, autoregressive, check_conditioner
from .lu import slogdet, slogdet_inverse
from .masked_linear import masked_linear
from .scale_map import Form, ScaleMap

__all__ = [
    "Activation",
    "Conditioner",
    "Form",
    "MaskedLayer",
    "ScaleMap",
    "autoregressive",
    "check_conditioner",
    "masked_linear",
    "slogdet",
    "slogdet_inverse",
]
