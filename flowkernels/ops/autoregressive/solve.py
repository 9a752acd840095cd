"""The gradient of the inverse on a GPU: one launch of a sequential loop between products that run in parallel.

With values h_l and sums s_l = b_l + h_{l-1} W_l + context term of every layer, made again from x, the loop (csrc/cuda/
autoregressive_solve.cu) gives dz and delta_l, the loss's gradient by s_l. Then

    dW_l = h_{l-1}^T delta_l,   db_l = sum_b delta_l,   dcontext = sum_l delta_l C_l^T,   dC_l = context^T delta_l
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..._library import library
from .._autocast import autocast_off
from ..activation import Activation, apply_activation

library.define(
    "_autoregressive_solve(Tensor dx, Tensor dlogabsdet, Tensor x, Tensor made, Tensor[] weights, Tensor[] visible, Tensor? order, "
    "int[] activations, int scale_kind, float scale_p0, float scale_p1, int form) -> (Tensor, Tensor)"
)
_solve = torch.ops.flowkernels._autoregressive_solve.default
_masked_linear = torch.ops.flowkernels.masked_linear.default
_dweight = torch.ops.flowkernels.masked_linear_dweight.default


@autocast_off
def backward_by_solve(
    dx: Tensor,
    dlogabsdet: Tensor,
    x: Tensor,
    context: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    context_weights: list[Tensor],
    context_biases: list[Tensor],
    visible: list[Tensor],
    order: Tensor | None,
    activations: list[int],
    wiring: list[int],
    *scale_and_form: float,
    solve: Callable[..., tuple[Tensor, Tensor]] = _solve,
) -> list[Tensor]:
    """flowkernels::autoregressive_inverse_backward of a plain chain: dz, dcontext, then the gradients of weights, biases and context
    weights."""
    assert not wiring and not context_biases
    widths = [len(v) for v in visible]
    all_context_weights = torch.cat(context_weights, 1) if context_weights else None
    terms = (context @ all_context_weights).split(widths, 1) if context_weights else [None] * len(widths)
    h = x if order is None else x.index_select(1, order)
    inputs, made = [], []
    for weight, bias, term, seen, activation in zip(weights, biases, terms, visible, activations, strict=True):
        inputs.append(h)
        s = _masked_linear(h, weight, bias, seen)
        s = s if term is None else s + term
        h = apply_activation(Activation(activation), s)
        made.append(s if activation in (Activation.GELU, Activation.SILU) else h)  # what the derivative is taken from
    dz, deltas = solve(dx, dlogabsdet, x, torch.cat(made, 1), weights, visible, order, activations, *scale_and_form)
    each = deltas.split(widths, 1)
    dweights = [_dweight(h, delta, seen) for h, delta, seen in zip(inputs, each, visible, strict=True)]
    dbiases = [part.clone() for part in deltas.sum(0).split(widths)]  # outputs of an op share no memory
    if context is None:
        return [dz, x.new_empty((0, 0)), *dweights, *dbiases]
    dcontext_weights = [part.clone() for part in (context.T @ deltas).split(widths, 1)]
    return [dz, deltas @ all_context_weights.T, *dweights, *dbiases, *dcontext_weights]
