"""Autocast (torch.autocast): a public function casts by its rule, and every implementation runs with autocast off.

    if any_autocast() and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return op(cast(x, torch.get_autocast_dtype(x.device.type)), ...)

So eager and compiled calls agree: a compiled graph runs with autocast off, with the casts in it.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .._torch import any_autocast


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """t as autocast casts it: float64 and integers stay."""
    return t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)


def autocast_off(implementation: Callable) -> Callable:
    """The implementation, also when it is called under autocast, as a backward pass or a bare op may be."""

    @functools.wraps(implementation)
    def run(x: Tensor, *args, **kwargs):
        # a compiled backward pass runs under the autocast around the forward pass, which torch.compile does not show us here
        if not any_autocast() and not torch.compiler.is_compiling():
            return implementation(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return implementation(x, *args, **kwargs)

    return run
