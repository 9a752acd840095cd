"""Weights that are parametrised by LU factors, with a scale for each of their columns: composed or inverted, all of one size in one call.

    weight = P L (U + diag(sign * exp(log_diagonal))) diag(exp(log_scale)),   logabsdet = sum log_diagonal + sum log_scale

(Glow, Kingma & Dhariwal 2018, section 3.2, with actnorm's scale.) L is unit lower triangular and U strictly upper triangular; `factors`
holds both. Row i of P A is row row[i] of A. The inverse is computed in float64, from the factors: there is nothing to pivot.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._backend import wants_reference
from ..._dtypes import HALF
from ..._library import library, register_fake
from .._differentiation import apply_function, each_cotangent, needs_autograd, transformed
from .reference import lu_fold_backward_reference, lu_fold_reference

_LISTS = "Tensor[] factors, Tensor[] log_diagonal, Tensor[] log_scale, Tensor[] sign, Tensor[] row, bool inverse"
library.define(f"lu_fold({_LISTS}) -> (Tensor, Tensor)")
library.define(f"lu_fold_backward(Tensor dweight, Tensor dlogabsdet, Tensor weight, {_LISTS}) -> (Tensor, Tensor, Tensor)")


def _stacked(factors, log_diagonal, log_scale, sign, row, inverse: bool) -> tuple:
    stack = lambda tensors: torch.stack(list(tensors))
    return stack(factors), stack(log_diagonal), stack(log_scale) if log_scale else None, stack(sign), stack(row), inverse


def _composite(*lists) -> tuple[Tensor, Tensor]:
    return lu_fold_reference(*_stacked(*lists))


def _composite_backward(dweight: Tensor, dlogabsdet: Tensor, weight: Tensor, *lists) -> tuple[Tensor, Tensor, Tensor]:
    dfactors, dlog_diagonal, dlog_scale = lu_fold_backward_reference(dweight, dlogabsdet, *_stacked(*lists))
    return dfactors, dlog_diagonal, dlog_diagonal.new_empty(0, dlog_diagonal.shape[1]) if dlog_scale is None else dlog_scale


library.impl("lu_fold", _composite, "CompositeExplicitAutograd")
library.impl("lu_fold_backward", _composite_backward, "CompositeExplicitAutograd")
_lu_fold = torch.ops.flowkernels.lu_fold.default
_lu_fold_backward = torch.ops.flowkernels.lu_fold_backward.default


@register_fake("lu_fold")
def _(factors: Sequence[Tensor], *_) -> tuple[Tensor, Tensor]:
    like = factors[0]
    return like.new_empty(len(factors), *like.shape), like.new_empty(len(factors))


@register_fake("lu_fold_backward")
def _(dweight: Tensor, dlogabsdet: Tensor, weight: Tensor, factors, log_diagonal, log_scale, *_):
    diagonal = weight.shape[1:]
    return weight.new_empty(weight.shape), weight.new_empty(len(factors), *diagonal[:1]), weight.new_empty(len(log_scale), *diagonal[:1])


def _bare_backward(dweight: Tensor, dlogabsdet: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    return _lu_fold_backward(dweight.contiguous(), dlogabsdet.contiguous(), *args)


class _LuFold(torch.autograd.Function):
    @staticmethod
    def forward(count: int, inverse: bool, *tensors) -> tuple[Tensor, Tensor]:
        return _lu_fold(*_lists(count, tensors), inverse)

    @staticmethod
    def setup_context(ctx, inputs, outputs) -> None:
        ctx.count, ctx.inverse, *tensors = inputs
        ctx.save_for_backward(outputs[0], *tensors)

    @staticmethod
    def backward(ctx, dweight: Tensor, dlogabsdet: Tensor):
        weight, *tensors = ctx.saved_tensors
        lists = (*_lists(ctx.count, tensors), ctx.inverse)
        if torch.is_grad_enabled():  # double backward differentiates the reference once more
            gradients = lu_fold_backward_reference(dweight, dlogabsdet, *_stacked(*lists))
        else:
            gradients = each_cotangent(_bare_backward, dweight, dlogabsdet, weight, *lists)
        scaled = len(tensors) > 4 * ctx.count
        each = [d for stacked in gradients[: 3 if scaled else 2] for d in stacked.unbind()]
        return (None, None, *each[: 2 * ctx.count], *(None for _ in range(2 * ctx.count)), *each[2 * ctx.count :])


def _lists(count: int, tensors: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    """factors, log_diagonal, log_scale, sign and row; they come with log_scale, which may be missing, last."""
    factors, log_diagonal, sign, row, log_scale = (list(tensors[i * count : (i + 1) * count]) for i in range(5))
    return factors, log_diagonal, log_scale, sign, row


def lu_fold(
    factors: Sequence[Tensor],
    log_diagonal: Sequence[Tensor],
    sign: Sequence[Tensor],
    row: Sequence[Tensor],
    log_scale: Sequence[Tensor] = (),
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """weight = P L (U + diag(sign * exp(log_diagonal))) diag(exp(log_scale)) of several layers, or its inverse, and log|det| of it.

    Args:
        factors: of each layer, [n, n]: L below the diagonal and U above it; what is on it is ignored. Floating.
        log_diagonal: of each layer, [n]. sign: [n], 1 or -1. row: [n], int64: row i of the weight is row row[i] of L U.
        log_scale: of each layer, [n], or none.
        inverse: the inverse of the weight, computed in float64.

    Returns:
        weight, [layers, n, n], with the dtype of the factors, and logabsdet (nats), [layers], in float32 where that is half precision.

    Raises:
        ValueError: there is no layer, a shape or dtype differs, or there are not as many tensors of each kind.
    """
    _check(factors, log_diagonal, sign, row, log_scale)
    dtype = factors[0].dtype
    if dtype in HALF:
        weight, logabsdet = lu_fold(
            *([t.float() for t in each] for each in (factors, log_diagonal, sign)), row, [t.float() for t in log_scale], inverse=inverse
        )
        return weight.to(dtype), logabsdet
    lists = tuple([t.contiguous() for t in each] for each in (factors, log_diagonal, log_scale, sign, row))
    if transformed() or wants_reference("lu_fold", factors[0].device):
        return lu_fold_reference(*_stacked(*lists, inverse))
    factors, log_diagonal, log_scale, sign, row = lists
    if needs_autograd((*factors, *log_diagonal, *log_scale)):
        return apply_function(_LuFold, len(factors), inverse, *factors, *log_diagonal, *sign, *row, *log_scale)
    return _lu_fold(*lists, inverse)


def _check(factors, log_diagonal, sign, row, log_scale) -> None:
    if not factors:
        raise ValueError("factors must hold at least one layer; got none")
    if factors[0].dim() != 2 or not factors[0].is_floating_point():
        raise ValueError(f"factors must be floating-point, [n, n]; got {factors[0].dtype}, {list(factors[0].shape)}")
    n, floating = factors[0].shape[0], factors[0].dtype
    for name, tensors, shape, dtype in (
        ("factors", factors, (n, n), floating),
        ("log_diagonal", log_diagonal, (n,), floating),
        ("sign", sign, (n,), floating),
        ("row", row, (n,), torch.int64),
        ("log_scale", log_scale, (n,), floating),
    ):
        if len(tensors) != len(factors) and (tensors or name != "log_scale"):
            raise ValueError(f"{name} must hold a tensor for each of {len(factors)} layers; got {len(tensors)}")
        for t in tensors:
            if t.shape != shape or t.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, {list(shape)}; got {t.dtype}, {list(t.shape)}")
