"""Forward maps with a gradient on a GPU: products under the staircase that run in parallel, and one kernel for each affine map.

The mathematics is that of training.py, for plain chains with shift and raw scale of every feature. What autograd would record one by one is
a list of launches here: a small network's step on a GPU takes as long as the host needs to ask for them.

The affine map is `coupling` of x [batch, 1, features], of which it transforms the only channel.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .._autocast import autocast_off
from ..activation import DERIVED_FROM_SUM, Activation, apply_activation
from ..coupling.part import Part
from .loop import Lists, Map

_masked_linear = torch.ops.flowkernels.masked_linear.default
_dx = torch.ops.flowkernels.masked_linear_dx.default
_dweight = torch.ops.flowkernels.masked_linear_dweight.default
_coupling = torch.ops.flowkernels.coupling.default
_coupling_backward = torch.ops.flowkernels.coupling_backward.default
_aten = torch.ops.aten

# the gradient by the sum from that by the activation's value, and from the value or, of some, the sum
_BACK: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    Activation.IDENTITY: lambda g, _: g,
    Activation.RELU: lambda g, h: _aten.threshold_backward(g, h, 0),
    Activation.TANH: _aten.tanh_backward,
    Activation.ELU: lambda g, h: _aten.elu_backward(g, 1.0, 1.0, 1.0, True, h),
    Activation.GELU: _aten.gelu_backward,
    Activation.SILU: _aten.silu_backward,
    Activation.LEAKY_RELU: lambda g, h: _aten.leaky_relu_backward(g, h, 0.01, True),
    Activation.SOFTPLUS: lambda g, h: g * -torch.expm1(-h),
    Activation.SIGMOID: _aten.sigmoid_backward,
}


def _options(m: Map) -> tuple:
    return Part.SECOND_HALF, int(m.scale.kind), *m.scale.packed, int(m.form), False


@autocast_off
def training_by_products(x: Tensor, context: Tensor | None, *lists) -> tuple[Tensor, Tensor, list[Tensor]]:
    """flowkernels::autoregressive_training. Of each map are kept x in the order of generation, then every layer's values (or its sums and
    its values, where the derivative needs those), the outputs last."""
    kept: list[Tensor] = []
    total: Tensor | None = None
    for m in Lists.without_affines(*lists).maps():
        n = m.conditioner
        x = x.index_select(1, n.order)
        h = x
        kept.append(h)
        for i, (weight, bias, visible, activation) in enumerate(zip(n.weights, n.biases, n.visible, n.activations, strict=True)):
            s = _masked_linear(h, weight, bias, visible)
            if n.context_weights:
                s.addmm_(context, n.context_weights[i])
            activation = Activation(activation)
            if activation in DERIVED_FROM_SUM:
                kept.append(s)
            h = torch.relu_(s) if activation == Activation.RELU else apply_activation(activation, s)
            kept.append(h)
        y, logabsdet = _coupling(x[:, None], h[:, None, 0::2], h[:, None, 1::2], None, *_options(m))
        x = torch.empty_like(x).index_copy_(1, n.order, y[:, 0])
        total = logabsdet if total is None else total.add_(logabsdet)
    return x, total, kept


@autocast_off
def backward_by_products(dy: Tensor, dlogabsdet: Tensor, kept: list[Tensor], context: Tensor | None, *lists_and_rest) -> list[Tensor]:
    """flowkernels::autoregressive_backward of what `training_by_products` kept: dx, dcontext, then the gradients of weights, biases and
    context weights, empty where nobody asks for them."""
    *lists, _, need_dx, need_parameters = lists_and_rest
    maps, kept = Lists.without_affines(*lists).maps(), list(kept)
    dcontext: Tensor | None = None
    dweights: list[Tensor] = []
    dbiases: list[Tensor] = []
    dcontext_weights: list[Tensor] = []
    for number, m in reversed(list(enumerate(maps))):
        n = m.conditioner
        need_own = need_dx or number > 0
        layers = []  # what each layer was given, and what its derivative is taken from; the last first
        for activation in map(Activation, reversed(n.activations)):
            value = kept.pop()
            layers.append((activation, kept.pop() if activation in DERIVED_FROM_SUM else value, value))
        x = kept.pop()
        out = layers[0][2][:, None]
        g = dy.index_select(1, n.order)[:, None]
        own, *parts = _coupling_backward(g, dlogabsdet, x[:, None], out[..., 0::2], out[..., 1::2], None, *_options(m), False)[:3]
        delta = torch.stack(parts, -1).flatten(1)
        inputs = [value for *_, value in layers[1:]] + [x]
        for i, (activation, before, _), h in zip(reversed(range(len(n.weights))), layers, inputs, strict=True):
            delta = _BACK[activation](delta, before)
            dweights.append(_dweight(h, delta, n.visible[i]) if need_parameters else delta.new_empty(0))
            dbiases.append(delta.sum(0) if need_parameters else delta.new_empty(0))
            if n.context_weights:
                dcontext_weights.append(context.T @ delta if need_parameters else delta.new_empty(0))
                term = delta @ n.context_weights[i].T
                dcontext = term if dcontext is None else dcontext.add_(term)
            if i > 0 or need_own:
                delta = _dx(delta, n.weights[i], n.visible[i])
        if need_own:
            dy = torch.empty_like(dy, memory_format=torch.contiguous_format).index_copy_(1, n.order, delta.add_(own[:, 0]))
    dx = dy if need_dx else dy.new_empty((0, dy.shape[1]))
    dcontext = dy.new_empty((0, 0)) if dcontext is None else dcontext
    return [dx, dcontext, *reversed(dweights), *reversed(dbiases), *reversed(dcontext_weights)]
