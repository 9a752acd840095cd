"""Whether a call may go straight to its op, or has to be seen by autograd or functorch."""

from collections.abc import Iterable

import torch
from torch import Tensor


def needs_autograd(tensors: Iterable[Tensor | None]) -> bool:
    """True where a gradient or a torch.func transform has to see the call; the bare op is several times cheaper."""
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def apply_function(function: type[torch.autograd.Function], *args):
    """function.apply(*args). Outside of torch.func and torch.compile it skips apply's Python part, which looks up the signature of
    forward on every call: 25 of 40 microseconds. There are no default arguments to fill in here.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)
