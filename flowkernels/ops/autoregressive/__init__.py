"""Masked autoregressive affine map (MAF, Papamakarios et al. 2017; IAF, Kingma et al. 2016) and its fused sequential inverse.

    forward:  z_i = form(x_i; shift_i(x_<i, context), sigma(s_i(x_<i, context)))          all i at once
    inverse:  x_i = form^-1(z_i; shift_i(x_<i, context), sigma(s_i(x_<i, context)))       i = 1..D in turn

Units of every layer are sorted by degree, so step i of the inverse needs only the outputs of feature i, and then the hidden units
that see feature i and no later one. Each weight inside the staircase is used once: the whole inverse costs the arithmetic of one
half-dense pass instead of D dense ones.
"""

from .conditioner import Conditioner, MaskedLayer, check_conditioner
from .loop import Map
from .map import autoregressive
from .stack import autoregressive_stack

__all__ = ["Conditioner", "Map", "MaskedLayer", "autoregressive", "autoregressive_stack", "check_conditioner"]
