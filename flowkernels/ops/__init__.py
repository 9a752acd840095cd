"""The ops: validated public functions over fused kernels, each with a plain PyTorch reference."""

from .activation import Activation
from .autoregressive import Conditioner, Map, MaskedLayer, autoregressive, autoregressive_stack, check_conditioner
from .channel_affine import channel_affine
from .conv_net import conv_net
from .coupling import Part, coupling, parse_part
from .glow_step import glow_step
from .glow_step.steps import glow_steps
from .lu import lu_fold, slogdet, slogdet_inverse
from .masked_linear import masked_linear
from .scale_map import Form, PoweredMap, ScaleMap

__all__ = [
    "Activation",
    "Conditioner",
    "Form",
    "Map",
    "MaskedLayer",
    "Part",
    "PoweredMap",
    "ScaleMap",
    "autoregressive",
    "autoregressive_stack",
    "channel_affine",
    "check_conditioner",
    "conv_net",
    "coupling",
    "glow_step",
    "glow_steps",
    "lu_fold",
    "masked_linear",
    "parse_part",
    "slogdet",
    "slogdet_inverse",
]
