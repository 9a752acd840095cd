"""Sign, log|det| and inverse of small square matrices by LU factorisation with partial pivoting (Golub & Van Loan, section 3.4).

    P w = L U,   sign = det(P) prod_k sgn(U_kk),   logabsdet = sum_k log|U_kk|,   inverse = U^-1 L^-1 P

Both gradients come from the inverse X: d logabsdet = tr(X dw), dX = -X dw X. It is an output of the op, so that double backward
differentiates through it.
"""

import torch
from torch import Tensor

from ..._backend import wants_reference
from ..._dtypes import FLOATING, HALF
from ..._library import library, register_fake
from .._differentiation import forward_mode, needs_autograd
from .fold import lu_fold
from .reference import slogdet_inverse_reference, slogdet_reference

__all__ = ["lu_fold", "slogdet", "slogdet_inverse"]

library.define("slogdet(Tensor w, bool in_float64) -> (Tensor, Tensor)")
library.define("slogdet_inverse(Tensor w, bool in_float64) -> (Tensor, Tensor, Tensor)")
library.impl("slogdet", slogdet_reference, "CompositeExplicitAutograd")
library.impl("slogdet_inverse", slogdet_inverse_reference, "CompositeExplicitAutograd")
_slogdet_op = torch.ops.flowkernels.slogdet.default
_slogdet_inverse_op = torch.ops.flowkernels.slogdet_inverse.default

LARGEST = 256  # beyond it a blocked factorisation with a tuned matmul wins: torch.linalg's


@register_fake("slogdet")
def _(w: Tensor, in_float64: bool) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape[:-2]), w.new_empty(w.shape[:-2])


@register_fake("slogdet_inverse")
def _(w: Tensor, in_float64: bool) -> tuple[Tensor, Tensor, Tensor]:
    return w.new_empty(w.shape[:-2]), w.new_empty(w.shape[:-2]), w.new_empty(w.shape)


def _register_vmap(name: str, outputs: int) -> None:
    op = getattr(torch.ops.flowkernels, name).default

    def rule(info, in_dims, w: Tensor, in_float64: bool):
        return op(w.movedim(in_dims[0], 0), in_float64), (0,) * outputs

    torch.library.register_vmap(f"flowkernels::{name}", rule, lib=library)


_register_vmap("slogdet", 2)
_register_vmap("slogdet_inverse", 3)


def _by_reference(w: Tensor, name: str) -> bool:
    return wants_reference(name, w.device) or w.shape[-1] > LARGEST


class _SlogdetInverse(torch.autograd.Function):
    generate_vmap_rule = True  # and no jvp: a Function that has one does not pass torch.compile(fullgraph=True)

    @staticmethod
    def forward(w: Tensor, in_float64: bool) -> tuple[Tensor, Tensor, Tensor]:
        op = slogdet_inverse_reference if _by_reference(w, "slogdet_inverse") else _slogdet_inverse_op
        return op(w, in_float64)

    @staticmethod
    def setup_context(ctx, inputs, outputs) -> None:
        sign, _, inverse = outputs
        ctx.mark_non_differentiable(sign)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inverse)

    @staticmethod
    def backward(ctx, _, dlogabsdet: Tensor | None, dinverse: Tensor | None):
        (inverse,) = ctx.saved_tensors
        transposed = inverse.mT
        dw = None
        if dlogabsdet is not None:
            dw = dlogabsdet[..., None, None] * transposed
        if dinverse is not None:
            through = transposed @ dinverse @ transposed
            dw = -through if dw is None else dw - through
        return dw, None


def slogdet(w: Tensor, *, in_float64: bool = False) -> tuple[Tensor, Tensor]:
    """Sign and log|det| of square matrices, as `torch.linalg.slogdet` gives them (without a name tuple, and for real matrices).

    All matrices are factored in one call, on a GPU in one launch. A singular matrix has sign 0 and log|det| -inf; a matrix with a NaN
    has sign 0 and log|det| NaN; nothing raises, and nothing is read back to the host. Matrices of more than 256 rows go through
    torch.linalg. Under autograd the inverse is computed in the same call and serves the gradient, w^-T.

    Args:
        w: [*, n, n], read through its strides; float64 or float32, or half precision, which is computed in float32.
        in_float64: factor float32 matrices in float64; the results are rounded once.

    Returns:
        sign and logabsdet (nats), each [*], with the dtype of w, or float32 where w is in half precision.

    Raises:
        ValueError: w is not square or not floating.
    """
    _check(w)
    w = w.float() if w.dtype in HALF else w
    if forward_mode():
        return slogdet_reference(w, in_float64)
    if needs_autograd((w,)):
        return _SlogdetInverse.apply(w, in_float64)[:2]
    if _by_reference(w, "slogdet"):
        return slogdet_reference(w, in_float64)
    return _slogdet_op(w, in_float64)


def slogdet_inverse(w: Tensor, *, in_float64: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sign, log|det| and inverse of square matrices from one factorisation.

    Args:
        w, in_float64: as in `slogdet`.

    Returns:
        sign and logabsdet, each [*], and the inverse, [*, n, n], which is not finite where the matrix is singular.

    Raises:
        ValueError: w is not square or not floating.
    """
    _check(w)
    dtype = w.dtype
    w = w.float() if dtype in HALF else w
    if forward_mode():
        sign, logabsdet, inverse = slogdet_inverse_reference(w, in_float64)
    elif needs_autograd((w,)):
        sign, logabsdet, inverse = _SlogdetInverse.apply(w, in_float64)
    elif _by_reference(w, "slogdet_inverse"):
        sign, logabsdet, inverse = slogdet_inverse_reference(w, in_float64)
    else:
        sign, logabsdet, inverse = _slogdet_inverse_op(w, in_float64)
    return sign, logabsdet, (inverse.to(dtype) if dtype in HALF else inverse)


def _check(w: Tensor) -> None:
    if w.dim() < 2 or w.shape[-1] != w.shape[-2]:
        raise ValueError(f"w must hold square matrices, [*, n, n]; got {list(w.shape)}")
    if w.dtype not in FLOATING:
        raise ValueError(f"w must be float64, float32, float16 or bfloat16; got {w.dtype}")
