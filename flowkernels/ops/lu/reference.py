"""Log-determinants and inverses of square matrices in plain PyTorch."""

import torch
from torch import Tensor


def slogdet_reference(w: Tensor, in_float64: bool = False) -> tuple[Tensor, Tensor]:
    """Sign and log|det| of w, [*, n, n] -> [*], [*]."""
    sign, logabsdet = torch.linalg.slogdet(w.double() if in_float64 else w)
    return sign.to(w.dtype), logabsdet.to(w.dtype)


def slogdet_inverse_reference(w: Tensor, in_float64: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The same and the inverse, [*, n, n]. That of a singular matrix is not finite."""
    factored = w.double() if in_float64 else w
    sign, logabsdet = torch.linalg.slogdet(factored)
    # inv would raise; inv_ex leaves the columns that it did not reach as they were
    inverse, info = torch.linalg.inv_ex(factored)
    inverse = torch.where((info == 0)[..., None, None], inverse, torch.nan)
    return sign.to(w.dtype), logabsdet.to(w.dtype), inverse.to(w.dtype).contiguous()
