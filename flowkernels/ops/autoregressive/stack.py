"""Several masked autoregressive maps, one after another, in one call: each tile of rows passes through all of them before the next
tile begins, so that what goes from map to map stays in the cache, and a small flow pays for one call rather than for each.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _extension
from ..._backend import wants_reference
from ..._library import library
from .._autocast import any_autocast
from .._differentiation import apply_function, needs_autograd, transformed
from ..masked_linear import masked_linear
from ..scale_map import Form, ScaleMap
from .conditioner import Conditioner
from .map import autoregressive, autoregressive_op, check_input
from .reference import autoregressive_reference
from .training import CUDA_LAYERS, inverse_backward, serves, training_backward, training_forward

library.define(
    "autoregressive_stack(Tensor x, Tensor? context, Tensor[] weights, Tensor[] biases, Tensor[] context_weights, Tensor[] context_biases, "
    "Tensor[] visible, Tensor[] orders, Tensor[] affines, int[] activations, int[] wiring, int[] stages, float[] scales, bool keep) "
    "-> (Tensor, Tensor, Tensor)"
)
_stack = torch.ops.flowkernels.autoregressive_stack.default
# torch.compile cannot ask
_COMPILED = frozenset(d.lower() for d in ("CPU", "CUDA") if _extension.has_kernel("autoregressive_stack", d))
_NUMBERS = 7


class Map(NamedTuple):
    """One map of a stack; see `ops.autoregressive`.

    affine: [3, features], or None. The map's input is (x + affine[0]) * affine[1] + affine[2]: batch norm in evaluation, whose
        log|det|, a constant, is left to the caller.
    """

    conditioner: Conditioner
    scale: ScaleMap
    form: Form
    inverse: bool = False
    affine: Tensor | None = None


class _Lists(NamedTuple):
    """The maps as the op takes them, list after list. `stages` has for each map: layers, context weights, whether they have biases,
    whether the network is wired, scale map, form, inverse."""

    weights: list[Tensor]
    biases: list[Tensor]
    context_weights: list[Tensor]
    context_biases: list[Tensor]
    visible: list[Tensor]
    orders: list[Tensor]
    affines: list[Tensor]
    activations: list[int]
    wiring: list[int]
    stages: list[int]
    scales: list[float]

    @classmethod
    def of(cls, maps: Sequence[Map]) -> "_Lists":
        lists, none = cls([], [], [], [], [], [], [], [], [], [], []), maps[0].conditioner.weights[-1].new_empty(0)
        for (weights, biases, visible, activations, context_weights, order, wiring, context_biases), scale, form, inverse, affine in maps:
            lists.weights.extend(weights)
            lists.biases.extend(biases)
            lists.context_weights.extend(context_weights)
            lists.context_biases.extend(context_biases)
            lists.visible.extend(visible)
            lists.orders.append(torch.arange(weights[-1].shape[1] // 2, device=weights[-1].device) if order is None else order)
            lists.affines.append(none if affine is None else affine)
            lists.activations.extend(activations)
            lists.wiring.extend(wiring)
            contexts = len(context_weights)
            lists.stages.extend((len(weights), contexts, bool(context_biases), bool(wiring), int(scale.kind), int(form), inverse))
            lists.scales.extend(scale.packed)
        return lists

    def maps(self) -> list[Map]:
        taken = dict.fromkeys(self._fields, 0)

        def take(name: str, n: int) -> list:
            taken[name] += n
            return list(getattr(self, name)[taken[name] - n : taken[name]])

        maps = []
        for order, affine in zip(self.orders, self.affines, strict=True):
            layers, contexts, biased, wired, kind, form, inverse = take("stages", _NUMBERS)
            conditioner = Conditioner(
                take("weights", layers),
                take("biases", layers),
                take("visible", layers),
                take("activations", layers),
                take("context_weights", contexts),
                order,
                take("wiring", 4 * layers * wired),
                take("context_biases", contexts * biased),
            )
            scale = ScaleMap.from_packed(kind, *take("scales", 2))
            maps.append(Map(conditioner, scale, Form(form), bool(inverse), affine if affine.numel() else None))
        return maps


def _composite(x: Tensor, context: Tensor | None, *lists_and_keep) -> tuple[Tensor, Tensor, Tensor]:
    *lists, keep = lists_and_keep
    total, outputs = None, []
    for conditioner, scale, form, inverse, affine in _Lists(*lists).maps():
        own = context if conditioner.context_weights else None
        x, logabsdet = autoregressive_op(_moved(x, affine), own, conditioner, scale, form, inverse)
        total = logabsdet if total is None else total + logabsdet
        outputs.append(x)
    kept = torch.stack(outputs[:-1]) if keep and len(outputs) > 1 else x.new_empty((0, *x.shape))
    return x, total, kept


library.impl("autoregressive_stack", _composite, "CompositeExplicitAutograd")


@torch.library.register_fake("flowkernels::autoregressive_stack", lib=library)
def _(x: Tensor, context, weights, biases, context_weights, context_biases, visible, orders, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1]), x.new_empty((len(orders) - 1 if rest[-1] else 0, *x.shape))


def autoregressive_stack(x: Tensor, maps: Sequence[Map], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Several autoregressive maps, the first one first: y = map_n(... map_1(x)), and the sum of their log|det|s.

    The result is that of calling `autoregressive` map by map; so are its gradients. Where a compiled kernel serves, and the tensors
    are float32 or float64, it is one call of the op, and with a gradient one node of autograd's graph, unless the gradient meets a
    wired network or an affine map between; elsewhere it is made map by map.

    Args:
        x: [batch, features].
        maps: at least one, all of as many features. A map that takes no context is not given it.
        context: [batch, context features] where a network takes one.

    Returns:
        y like x, and the sum of the maps' log|det|s (nats), [batch].

    Raises:
        ValueError: as `autoregressive`, or there is no map.
    """
    if not maps:
        raise ValueError("maps must hold at least one map; got none")
    if _serves(x, maps) and not any_autocast() and not wants_reference("autoregressive_stack", x.device):
        takes = False
        for m in maps:
            own = context if m.conditioner.context_weights else None
            takes |= own is not None
            check_input(x, m.conditioner, own)
        if context is not None and not takes:
            raise ValueError(f"context was given, {list(context.shape)}, but no network takes one")
        lists = _Lists.of(maps)
        if not needs_autograd((x, context, *lists.weights, *lists.biases, *lists.context_weights, *lists.context_biases, *lists.affines)):
            y, logabsdet, _ = _stack(x, context, *lists, False)
            return y, logabsdet
        if all(m.affine is None and serves(m.conditioner, x, m.inverse) for m in maps):
            return apply_function(_Plain, x, context, maps, lists, *lists.weights, *lists.biases, *lists.context_weights)
    total = None
    for conditioner, scale, form, inverse, affine in maps:
        own = context if conditioner.context_weights else None
        x, logabsdet = autoregressive(_moved(x, affine), conditioner, own, scale=scale, form=form, inverse=inverse)
        total = logabsdet if total is None else total + logabsdet
    return x, total


def _serves(x: Tensor, maps: Sequence[Map]) -> bool:
    if x.device.type == "cuda" and any(len(m.conditioner.weights) > CUDA_LAYERS for m in maps):
        return False
    return x.device.type in _COMPILED and x.dtype in (torch.float32, torch.float64) and not transformed()


def _moved(x: Tensor, affine: Tensor | None) -> Tensor:
    return x if affine is None or not affine.numel() else (x + affine[0]) * affine[1] + affine[2]


class _Numbers(NamedTuple):
    """What is no tensor of a map, and where its layers and its context weights stand in the lists of the stack."""

    layers: slice
    contexts: slice
    activations: list[int]
    scale: ScaleMap
    form: Form
    inverse: bool


class _Plain(torch.autograd.Function):
    """Maps of plain networks, one after another. The gradient of an inverse needs what it returned, that of a forward map the values
    of its layers (see training.py)."""

    @staticmethod
    def forward(ctx, x, context, maps, lists, *parameters) -> tuple[Tensor, Tensor]:
        if all(m.inverse for m in maps):
            y, total, between = _stack(x, context, *lists, True)
            kept = [*between.unbind(), y]
        else:
            y, total, kept = x, None, []
            for conditioner, scale, form, inverse, _ in maps:
                own = context if conditioner.context_weights else None
                if inverse:
                    y, logabsdet = autoregressive_op(y, own, conditioner, scale, form, True)
                    kept.append(y)
                else:
                    y, logabsdet, values = training_forward(y, own, conditioner, scale, form)
                    kept.append(values)
                total = logabsdet if total is None else total + logabsdet
        ctx.save_for_backward(x, context, *kept, *lists.orders, *lists.visible, *parameters)
        ctx.numbers, layer, contexts = [], 0, 0
        for conditioner, scale, form, inverse, _ in maps:
            next_layer, next_context = layer + len(conditioner.weights), contexts + len(conditioner.context_weights)
            where = slice(layer, next_layer), slice(contexts, next_context)
            ctx.numbers.append(_Numbers(*where, conditioner.activations, scale, form, inverse))
            layer, contexts = next_layer, next_context
        return y, total

    @staticmethod
    def backward(ctx, dy: Tensor, dlogabsdet: Tensor):
        x, context, *tensors = ctx.saved_tensors
        n, layers = len(ctx.numbers), ctx.numbers[-1].layers.stop
        kept, orders, visible, weights, biases, context_weights = _split(tensors, (n, n, layers, layers, layers))
        maps = []
        for order, (own, contexts, activations, scale, form, inverse) in zip(orders, ctx.numbers, strict=True):
            network = Conditioner(weights[own], biases[own], visible[own], activations, context_weights[contexts], order)
            maps.append(Map(network, scale, form, inverse))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_gradient(ctx, x, context, maps, (*weights, *biases, *context_weights), dy, dlogabsdet)
        need_dx, dcontext = ctx.needs_input_grad[0], None
        dweights, dbiases, dcontext_weights = [None] * layers, [None] * layers, [None] * len(context_weights)
        for i in reversed(range(n)):
            (network, scale, form, inverse, _), (own, contexts, *_) = maps[i], ctx.numbers[i]
            c = context if network.context_weights else None
            if inverse:
                dy, dterm, *parameters = inverse_backward(dy, dlogabsdet, kept[i], c, network, scale, form)
            else:
                dy, dterm, *parameters = training_backward(dy, dlogabsdet, kept[i], c, network, scale, form, need_dx or i > 0)
            dcontext = dcontext if c is None else dterm if dcontext is None else dcontext + dterm
            dweights[own], dbiases[own], dcontext_weights[contexts] = _split(parameters, (len(network.weights),) * 2)
        return dy if need_dx else None, dcontext, None, None, *dweights, *dbiases, *dcontext_weights


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
    inputs = (x, context, None, None, *parameters)
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
    gradients = iter(torch.autograd.grad((y, total), wanted, (dy, dlogabsdet), create_graph=True, allow_unused=True))
    return tuple(next(gradients) if needed else None for needed in ctx.needs_input_grad)
