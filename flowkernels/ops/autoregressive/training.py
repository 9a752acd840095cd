"""The forward map with a gradient, as two ops: one that keeps every layer's values, and one that turns them into gradients.

With g and c the loss's gradients by y and by logabsdet, and sums s_l = bias_l + h_{l-1} W_l, h_l = act_l(s_l):

    delta_L       = gradients by shift and raw scale, from the form
    delta_{l-1}   = (delta_l W_l^T) * act'(s_{l-1})
    dW_l = h_{l-1}^T delta_l,   dbias_l = sum_b delta_l,   dx = the form's own + delta_1 W_1^T

all of them under the staircase. Where no kernel serves, or torch.func looks on, or a gradient of the gradient is asked for, the map is
composed of `masked_linear` instead: the same mathematics in pieces that know their own derivatives.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _extension
from ..._backend import wants_reference
from ..._library import library
from .._differentiation import apply_function, each_cotangent, transformed
from ..activation import Activation
from ..masked_linear import masked_linear
from ..scale_map import Form, PoweredMap, ScaleKind, ScaleMap
from .conditioner import Conditioner
from .loop import Lists, Map, autoregressive_op, stack_op
from .reference import autoregressive_reference
from .solve import backward_by_solve

_NETWORK = "Tensor[] weights, {}Tensor[] context_weights, Tensor[] visible, Tensor? order, int[] activations"
_SCALE = "int scale_kind, float scale_p0, float scale_p1, int form"
library.define(
    f"autoregressive_training(Tensor x, Tensor? context, {_NETWORK.format('Tensor[] biases, ')}, {_SCALE}) -> (Tensor, Tensor, Tensor)"
)
library.define(
    f"autoregressive_backward(Tensor dy, Tensor dlogabsdet, Tensor values, Tensor? context, {_NETWORK.format('')}, {_SCALE}, "
    "bool need_dx, bool need_dbound) -> Tensor[]"
)
library.define(
    f"autoregressive_inverse_backward(Tensor dx, Tensor dlogabsdet, Tensor x, Tensor? context, {_NETWORK.format('Tensor[] biases, ')}, "
    f"{_SCALE}) -> Tensor[]"
)
_training = torch.ops.flowkernels.autoregressive_training.default
_backward = torch.ops.flowkernels.autoregressive_backward.default
_inverse_backward = torch.ops.flowkernels.autoregressive_inverse_backward.default
# torch.compile cannot ask
_COMPILED = _extension.has_kernel("autoregressive_training", "CPU")
_SOLVES_ON_CUDA = _extension.has_kernel("_autoregressive_solve", "CUDA")
if _SOLVES_ON_CUDA:
    library.impl("autoregressive_inverse_backward", backward_by_solve, "CUDA")
CUDA_LAYERS = 32  # kMaxLayers of the CUDA kernels, which take all layers as one argument


@torch.library.register_fake("flowkernels::autoregressive_training", lib=library)
def _(x, context, weights, biases, context_weights, visible, order, activations, *_) -> tuple[Tensor, Tensor, Tensor]:
    kept = (w.shape[1] * (1 + (a in (Activation.GELU, Activation.SILU))) for w, a in zip(weights, activations, strict=True))
    return x.new_empty(x.shape), x.new_empty(x.shape[:1]), x.new_empty(x.shape[0], x.shape[1] + sum(kept))


@torch.library.register_fake("flowkernels::autoregressive_backward", lib=library)
def _(dy, dlogabsdet, values, context, weights, context_weights, *scale_and_network) -> list[Tensor]:
    *_, need_dx, need_dbound = scale_and_network
    dx = values.new_empty(dy.shape if need_dx else (0, dy.shape[1]))
    dcontext = values.new_empty((0, 0) if context is None else context.shape)
    dweights = [values.new_empty(w.shape) for w in weights]
    dbiases = [values.new_empty(w.shape[1]) for w in weights]
    dbound = [values.new_empty(1)] if need_dbound else []
    return [dx, dcontext, *dweights, *dbiases, *(values.new_empty(w.shape) for w in context_weights), *dbound]


@torch.library.register_fake("flowkernels::autoregressive_inverse_backward", lib=library)
def _(dx, dlogabsdet, x, context, weights, biases, context_weights, *_) -> list[Tensor]:
    dcontext = x.new_empty((0, 0) if context is None else context.shape)
    return [x.new_empty(x.shape), dcontext, *(x.new_empty(t.shape) for t in (*weights, *biases, *context_weights))]


def loop_serves(conditioner: Conditioner, scale: ScaleMap | PoweredMap, device: torch.device) -> bool:
    """Whether the loop's kernel for this device takes such networks: that for GPUs has outputs for every feature, and a learned scale is
    a number that no compiled graph can read."""
    if isinstance(scale, PoweredMap) and torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or (len(conditioner.weights) <= CUDA_LAYERS and _is_whole(conditioner, scale))


def _is_whole(conditioner: Conditioner, scale: ScaleMap | PoweredMap) -> bool:
    """Whether the network gives shift and raw scale of every feature."""
    return scale.kind != ScaleKind.UNIT and conditioner.visible[-1].shape[0] == 2 * conditioner.features


def serves(conditioner: Conditioner, scale: ScaleMap | PoweredMap, x: Tensor, inverse: bool) -> bool:
    """Whether the ops can take this call: a plain chain of layers, on a device that has the kernels."""
    if conditioner.wiring or conditioner.context_biases or transformed() or wants_reference("autoregressive", x.device):
        return False
    if not loop_serves(conditioner, scale, x.device):
        return False
    if inverse and (isinstance(scale, PoweredMap) or not _is_whole(conditioner, scale)):
        return False
    if x.device.type == "cuda":
        layers, contexts = len(conditioner.weights), len(conditioner.context_weights)
        return inverse and _SOLVES_ON_CUDA and x.device.index not in _extension.unserved_gpus and contexts in (0, layers)
    return _COMPILED and x.device.type == "cpu"


def with_gradient(x: Tensor, context: Tensor | None, maps: Sequence[Map]) -> tuple[Tensor, Tensor]:
    """Maps one after another, for autograd, as one node of its graph; the sum of their log|det|s. `serves` must hold for each, and none
    may have an affine map before it. A map that takes no context is not given it."""
    networks = [m.conditioner for m in maps]
    parameters = (t for lists in ("weights", "biases", "context_weights") for n in networks for t in getattr(n, lists))
    learned = (m.scale.a for m in maps if isinstance(m.scale, PoweredMap))
    return apply_function(_Maps, x, context, maps, *parameters, *learned)


def _forward(
    x: Tensor, context: Tensor | None, conditioner: Conditioner, scale: ScaleMap | PoweredMap, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward map: y, logabsdet, and the values that `_backward_of` needs."""
    weights, biases, visible, activations, context_weights, order, *_ = conditioner
    kind = int(scale.kind)
    return _training(x, context, weights, biases, context_weights, visible, order, activations, kind, *scale.packed, int(form))


def _backward_of(
    dy: Tensor,
    dlogabsdet: Tensor,
    values: Tensor,
    context: Tensor | None,
    conditioner: Conditioner,
    scale: ScaleMap | PoweredMap,
    form: Form,
    need_dx: bool,
) -> list[Tensor]:
    """The gradient of the forward map: by x (empty unless asked for), by the context (empty without one), then by weights, biases,
    context weights, and the learned number of the scale map where there is one."""
    weights, _, visible, activations, context_weights, order, *_ = conditioner
    learned = isinstance(scale, PoweredMap)
    numbers = int(scale.kind), *scale.packed, int(form), need_dx, learned
    network = weights, context_weights, visible, order, activations
    gradients = each_cotangent(_backward, dy, dlogabsdet, values, context, *network, *numbers)
    if learned:  # the op's is that by bound * a
        gradients[-1] = (gradients[-1] * scale.scale.packed[0]).view_as(scale.a)
    return gradients


def _inverse_backward_of(
    dx: Tensor, dlogabsdet: Tensor, x: Tensor, context: Tensor | None, conditioner: Conditioner, scale: ScaleMap, form: Form
) -> list[Tensor]:
    """The gradient of (x, logabsdet) = f^-1(z): by z, by the context (empty without one), then by weights, biases, context weights."""
    weights, biases, visible, activations, context_weights, order, *_ = conditioner
    kind = int(scale.kind)
    network = weights, biases, context_weights, visible, order, activations
    return each_cotangent(_inverse_backward, dx, dlogabsdet, x, context, *network, kind, *scale.packed, int(form))


class _Numbers(NamedTuple):
    """What is no tensor of a map, and where its layers and its context weights stand in the lists of the stack."""

    layers: slice
    contexts: slice
    learned: slice  # of the learned numbers of the scale maps
    activations: list[int]
    scale: ScaleMap
    form: Form
    inverse: bool


class _Maps(torch.autograd.Function):
    """Maps of plain networks, one after another. The gradient of an inverse needs what it returned, that of a forward map the values
    of its layers."""

    @staticmethod
    def forward(ctx, x, context, maps, *parameters) -> tuple[Tensor, Tensor]:
        if len(maps) > 1 and all(m.inverse for m in maps):
            y, total, between = stack_op(x, context, *Lists.of(maps), True)
            kept = [*between.unbind(), y]
        else:
            y, total, kept = x, None, []
            for conditioner, scale, form, inverse, _ in maps:
                own = context if conditioner.context_weights else None
                if inverse:
                    y, logabsdet = autoregressive_op(y, own, conditioner, scale, form, True)
                    kept.append(y)
                else:
                    y, logabsdet, values = _forward(y, own, conditioner, scale, form)
                    kept.append(values)
                total = logabsdet if total is None else total + logabsdet
        networks = [m.conditioner for m in maps]
        ctx.save_for_backward(x, context, *kept, *(n.order for n in networks), *(v for n in networks for v in n.visible), *parameters)
        ctx.numbers, layer, contexts, learned = [], 0, 0, 0
        for conditioner, scale, form, inverse, _ in maps:
            powered = isinstance(scale, PoweredMap)
            ends = layer + len(conditioner.weights), contexts + len(conditioner.context_weights), learned + powered
            where = slice(layer, ends[0]), slice(contexts, ends[1]), slice(learned, ends[2])
            ctx.numbers.append(_Numbers(*where, conditioner.activations, scale.scale if powered else scale, form, inverse))
            layer, contexts, learned = ends
        return y, total

    @staticmethod
    def backward(ctx, dy: Tensor, dlogabsdet: Tensor):
        x, context, *tensors = ctx.saved_tensors
        n, layers, n_contexts = len(ctx.numbers), ctx.numbers[-1].layers.stop, ctx.numbers[-1].contexts.stop
        kept, orders, visible, weights, biases, context_weights, learned = _split(tensors, (n, n, layers, layers, layers, n_contexts))
        maps = []
        for order, (own, contexts, power, activations, scale, form, inverse) in zip(orders, ctx.numbers, strict=True):
            network = Conditioner(weights[own], biases[own], visible[own], activations, context_weights[contexts], order)
            maps.append(Map(network, PoweredMap(scale, *learned[power]) if learned[power] else scale, form, inverse))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_gradient(ctx, x, context, maps, (*weights, *biases, *context_weights, *learned), dy, dlogabsdet)
        need_dx, dcontext = ctx.needs_input_grad[0], None
        dweights, dbiases, dcontext_weights = [None] * layers, [None] * layers, [None] * len(context_weights)
        dlearned = [None] * len(learned)
        for i in reversed(range(n)):
            (network, scale, form, inverse, _), (own, contexts, power, *_) = maps[i], ctx.numbers[i]
            c = context if network.context_weights else None
            if inverse:
                dy, dterm, *parameters = _inverse_backward_of(dy, dlogabsdet, kept[i], c, network, scale, form)
            else:
                dy, dterm, *parameters = _backward_of(dy, dlogabsdet, kept[i], c, network, scale, form, need_dx or i > 0)
            dcontext = dcontext if c is None else dterm if dcontext is None else dcontext + dterm
            sizes = len(network.weights), len(network.weights), len(network.context_weights)
            dweights[own], dbiases[own], dcontext_weights[contexts], dlearned[power] = _split(parameters, sizes)
        return dy if need_dx else None, dcontext, None, *dweights, *dbiases, *dcontext_weights, *dlearned


def _split(items: Sequence, sizes: Sequence[int]) -> list[list]:
    """Lists of these sizes, and what remains."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [list(items[a:b]) for a, b in itertools.pairwise(ends)] + [list(items[ends[-1] :])]


def _differentiable_gradient(
    ctx, x: Tensor, context: Tensor | None, maps: Sequence[Map], parameters: Sequence[Tensor], dy: Tensor, dlogabsdet: Tensor
) -> tuple:
    """The same gradient as a graph of its own, for create_graph=True."""
    y, total = x, None
    for conditioner, scale, form, inverse, _ in maps:
        own = context if conditioner.context_weights else None
        y, logabsdet = autoregressive_reference(y, conditioner, own, scale, form, inverse, linear=masked_linear)
        total = logabsdet if total is None else total + logabsdet
    inputs = (x, context, None, *parameters)
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
    outputs = [(y, dy), (total, dlogabsdet)] if total.requires_grad else [(y, dy)]  # additive maps have a constant log|det|
    values, cotangents = zip(*outputs, strict=True)
    gradients = iter(torch.autograd.grad(values, wanted, cotangents, create_graph=True, allow_unused=True))
    return tuple(next(gradients) if needed else None for needed in ctx.needs_input_grad)
