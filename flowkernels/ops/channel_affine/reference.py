"""Per-channel affine map in plain PyTorch, and its vector-Jacobian product."""

import torch
from torch import Tensor

from .._differentiation import as_dtype


def channel_affine_reference(
    x: Tensor, shift: Tensor | None, log_scale: Tensor, bias: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y = (x + shift) * exp(log_scale) + bias, or its inverse, in float32 for half precision; and log|det| per sample."""
    before, scale, after = _terms(x, shift, log_scale, bias, inverse)
    y = (x.to(scale.dtype) + before) * scale + after
    logabsdet = x.shape[2:].numel() * log_scale.sum()
    return as_dtype(y, x.dtype), (-logabsdet if inverse else logabsdet).expand(x.shape[0])


def channel_affine_backward_reference(
    dy: Tensor,
    dlogabsdet: Tensor,
    kept: Tensor,
    shift: Tensor | None,
    log_scale: Tensor,
    bias: Tensor | None,
    inverse: bool,
    from_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, shift, log_scale and bias, from the kept input or output.

    With y = (x + before) * scale + after: dx = dy * scale, dbefore = sum dx, dafter = sum dy, and the gradient to log scale is
    sum dy * (y - after), plus sites * sum dlogabsdet.
    """
    before, scale, after = _terms(kept, shift, log_scale, bias, inverse)
    kept, dnew = kept.to(scale.dtype), dy.to(scale.dtype)
    dold = dnew * scale
    along = dnew * (kept - after) if from_output else dold * (kept + before)
    dbefore, dafter, dlog = (t.sum([0, *range(2, t.dim())]) for t in (dold, dnew, along))
    dlog = dlog + kept.shape[2:].numel() * dlogabsdet.sum()
    if inverse:
        return as_dtype(dold, dy.dtype), -dafter, -dlog, -dbefore
    return as_dtype(dold, dy.dtype), dbefore, dlog, dafter


def _terms(
    x: Tensor, shift: Tensor | None, log_scale: Tensor, bias: Tensor | None, inverse: bool
) -> tuple[Tensor | float, Tensor, Tensor | float]:
    """(before, scale, after) of y = (x + before) * scale + after, each to be broadcast over x."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    shift = 0.0 if shift is None else shift.view(shape)
    bias = 0.0 if bias is None else bias.view(shape)
    log_scale = log_scale.view(shape)
    return (-bias, torch.exp(-log_scale), -shift) if inverse else (shift, torch.exp(log_scale), bias)
