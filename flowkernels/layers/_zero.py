"""The log-determinant of what keeps volumes."""

import torch
from torch import Tensor


def zero_logabsdet(x: Tensor) -> Tensor:
    """Zeros, [batch], in the precision that log-determinants of x have."""
    return x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
