"""Masked autoregressive map in plain PyTorch: one pass of the network forward, D passes for the inverse."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._autocast import autocast_off
from .._differentiation import transformed
from ..activation import apply_activation
from ..masked_linear.reference import masked_linear_reference
from ..scale_map import Form, PoweredMap, ScaleKind, ScaleMap, apply_form, invert_form
from .conditioner import Conditioner, MaskedLayer

Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def conditioner_reference(x: Tensor, conditioner: Conditioner, context: Tensor | None, linear: Linear = masked_linear_reference) -> Tensor:
    """What the network's last layer gives, [batch, outputs], for the features in the order of generation."""
    values = [x]
    for layer in conditioner.layers:
        h = _sum(layer, values[-1 if layer.source is None else layer.source], linear)
        if layer.context_weight is not None:
            term = _context_term(layer, context, linear)
            h = h * term if layer.gate else h + term
        if layer.residual is not None:
            h = h + values[layer.residual]
        values.append(apply_activation(layer.activation, h))
    return values[-1]


def _sum(layer: MaskedLayer, h: Tensor, linear: Linear) -> Tensor:
    if not layer.unitwise:
        inputs = layer.weight.shape[0]
        return linear(h if h.shape[1] == inputs else h[:, :inputs], layer.weight, layer.bias, layer.visible)
    return h if layer.weight is None else h * layer.weight + layer.bias


def _context_term(layer: MaskedLayer, context: Tensor, linear: Linear) -> Tensor:
    # not a plain matmul, whose compiled backward would run under the caller's autocast
    whole = torch.full_like(layer.visible, context.shape[1])
    return apply_activation(layer.context_activation, linear(context, layer.context_weight, layer.context_bias, whole))


@autocast_off
def autoregressive_reference(
    x: Tensor,
    conditioner: Conditioner,
    context: Tensor | None,
    scale: ScaleMap | PoweredMap,
    form: Form,
    inverse: bool,
    linear: Linear = masked_linear_reference,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z = form(x; shift(x), sigma(x)), or its inverse by D passes, one feature a pass; and log|det| of the map applied.

    at: the network is evaluated here, in one pass; where that is the inverse already, it is returned.
    """
    if conditioner.order is not None:
        x = _in_order(x, conditioner.order)
        at = None if at is None else _in_order(at, conditioner.order)
    passing = conditioner.passing(scale)
    if inverse and at is None and not is_coupling(conditioner, passing):
        y, log_derivative = _inverse(x, passing, conditioner, context, scale, form, linear)
    else:
        # each piece is a node of a graph, and of the graph of its gradient: a coupling's network reads what passes
        kept, old = x.tensor_split((passing,), 1) if passing else (None, x)
        reads_kept = passing and at is None and is_coupling(conditioner, passing)
        seen = kept if reads_kept else x if at is None else at
        shift, raw = _shift_and_raw(conditioner_reference(seen, conditioner, context, linear), scale)
        y, log_derivative = (invert_form if inverse else apply_form)(form, old, shift, raw, scale)
        y = torch.cat([kept, y], dim=1) if passing else y
    if conditioner.order is not None:
        y = torch.index_copy(torch.zeros_like(y), 1, conditioner.order, y)  # a sort and x[:, order]'s gradient cost more than the map
    return y, log_derivative.sum(-1)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and transformed():
        # under vmap torch 2.13's compiler puts the gradient of index_select into the wrong places, and x[:, order]'s beyond its memory
        return x.gather(1, order.expand(x.shape[0], -1))
    return x.index_select(1, order)


def is_coupling(conditioner: Conditioner, passing: int) -> bool:
    """Whether the network reads nothing but what passes."""
    return not conditioner.wiring and conditioner.weights[0].dim() == 2 and conditioner.weights[0].shape[0] <= passing


def _shift_and_raw(outputs: Tensor, scale: ScaleMap | PoweredMap) -> tuple[Tensor, Tensor]:
    return (outputs, outputs) if scale.kind == ScaleKind.UNIT else outputs.unflatten(1, (-1, 2)).unbind(2)


def _inverse(
    z: Tensor, passing: int, conditioner: Conditioner, context: Tensor | None, scale: ScaleMap | PoweredMap, form: Form, linear: Linear
) -> tuple[Tensor, Tensor]:
    features = z.shape[1]
    known = [z[:, :passing]] if passing else []
    log_derivatives: list[Tensor] = []
    for i in range(passing, features):
        # features not known yet are zeros that no output in use sees; nothing is written in place, so autograd can follow
        x = torch.cat([*known, torch.zeros_like(z[:, i:])], dim=1)
        shift, raw = _shift_and_raw(conditioner_reference(x, conditioner, context, linear), scale)
        own = slice(i - passing, i - passing + 1)
        xi, log_derivative = invert_form(form, z[:, i : i + 1], shift[:, own], raw[:, own], scale)
        known.append(xi)
        log_derivatives.append(log_derivative)
    if not log_derivatives:
        return z, z.new_zeros((len(z), 0))
    return torch.cat(known, dim=1), torch.cat(log_derivatives, dim=1)
