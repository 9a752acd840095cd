"""Whether a call may go straight to its op, or has to be seen by autograd or functorch."""

from collections.abc import Iterable

import torch
from torch import Tensor


def needs_autograd(tensors: Iterable[Tensor | None]) -> bool:
    """True where a gradient or a torch.func transform has to see the call; the bare op is several times cheaper."""
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
