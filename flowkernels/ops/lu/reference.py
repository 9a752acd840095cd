"""Log-determinants and inverses of square matrices in plain PyTorch."""

import torch
from torch import Tensor

from ..._wide import wide
from .._differentiation import as_dtype


def slogdet_reference(w: Tensor, in_float64: bool = False) -> tuple[Tensor, Tensor]:
    """Sign and log|det| of w, [*, n, n] -> [*], [*]."""
    sign, logabsdet = torch.linalg.slogdet(wide(w) if in_float64 else w)
    return as_dtype(sign, w.dtype), as_dtype(logabsdet, w.dtype)


def slogdet_inverse_reference(w: Tensor, in_float64: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The same and the inverse, [*, n, n]. That of a singular matrix is not finite."""
    factored = wide(w) if in_float64 else w
    sign, logabsdet = torch.linalg.slogdet(factored)
    # inv would raise; inv_ex leaves the columns that it did not reach as they were
    inverse, info = torch.linalg.inv_ex(factored)
    inverse = torch.where((info == 0)[..., None, None], inverse, torch.nan)
    return as_dtype(sign, w.dtype), as_dtype(logabsdet, w.dtype), as_dtype(inverse, w.dtype).contiguous()


def lu_fold_reference(
    factors: Tensor, log_diagonal: Tensor, log_scale: Tensor | None, sign: Tensor, row: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """P L (U + diag(sign * exp(log_diagonal))) diag(exp(log_scale)), or its inverse, and log|det|, of stacked layers."""
    with torch.autocast(factors.device.type, enabled=False):
        logabsdet = log_diagonal.sum(1) if log_scale is None else log_diagonal.sum(1) + log_scale.sum(1)
        rows = row[:, :, None].expand_as(factors)
        if not inverse:
            lower, upper = _triangles(factors, log_diagonal, sign)
            weight = (lower @ upper).gather(1, rows)
            return weight if log_scale is None else weight * log_scale.exp()[:, None], logabsdet
        lower, upper = _triangles(wide(factors), wide(log_diagonal), wide(sign))
        unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        permutation = unit.expand_as(lower).gather(1, rows)
        through = torch.linalg.solve_triangular(lower, permutation.mT, upper=False, unitriangular=True)
        weight = torch.linalg.solve_triangular(upper, through, upper=True)
        weight = weight if log_scale is None else weight * (-wide(log_scale)).exp()[:, :, None]
        return as_dtype(weight, factors.dtype), -logabsdet


def lu_fold_backward_reference(
    dweight: Tensor,
    dlogabsdet: Tensor,
    factors: Tensor,
    log_diagonal: Tensor,
    log_scale: Tensor | None,
    sign: Tensor,
    row: Tensor,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients to factors, log_diagonal and log_scale.

    With A = L U and weight W = P A D, D = diag(exp(log_scale)):

        dA = P^T dW D    dlog_scale_j = sum_i dW_ij W_ij    dL = dA U^T    dU = L^T dA

    and where X = W^-1 is what was asked for, dW = -X^T dX X^T.
    """
    arguments = (factors, log_diagonal, log_scale, sign, row)
    weight, _ = lu_fold_reference(*arguments, False)
    if inverse:
        x, _ = lu_fold_reference(*arguments, True)
        dweight, dlogabsdet = -x.mT @ dweight @ x.mT, -dlogabsdet
    lower, upper = _triangles(factors, log_diagonal, sign)
    scaled = dweight if log_scale is None else dweight * log_scale.exp()[:, None]
    da = torch.zeros_like(scaled).scatter(1, row[:, :, None].expand_as(scaled), scaled)
    dupper = lower.mT @ da
    dlog_diagonal = (dupper * upper).diagonal(dim1=1, dim2=2) + dlogabsdet[:, None]
    dlog_scale = None if log_scale is None else (dweight * weight).sum(1) + dlogabsdet[:, None]
    return (da @ upper.mT).tril(-1) + dupper.triu(1), dlog_diagonal, dlog_scale


def _triangles(factors: Tensor, log_diagonal: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """L and U, with their diagonals."""
    unit = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    return factors.tril(-1) + unit, factors.triu(1) + torch.diag_embed(sign * log_diagonal.exp())
