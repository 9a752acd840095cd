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
from .training import inverse_backward, serves, training_backward, training_forward

library.define(
    "autoregressive_stack(Tensor x, Tensor? context, Tensor[] weights, Tensor[] biases, Tensor[] context_weights, Tensor[] context_biases, "
    "Tensor[] visible, Tensor[] orders, Tensor[] affines, int[] activations, int[] wiring, int[] stages, float[] scales, bool keep) "
    "-> (Tensor, Tensor, Tensor)"
)
_stack = torch.ops.flowkernels.autoregressive_stack.default
_COMPILED = frozenset(d for d in ("CPU", "CUDA") if _extension.has_kernel("autoregressive_stack", d))  # torch.compile cannot ask
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
        lists = cls([], [], [], [], [], [], [], [], [], [], [])
        for (weights, biases, visible, activations, context_weights, order, wiring, context_biases), scale, form, inverse, affine in maps:
            lists.weights.extend(weights)
            lists.biases.extend(biases)
            lists.context_weights.extend(context_weights)
            lists.context_biases.extend(context_biases)
            lists.visible.extend(visible)
            lists.orders.append(torch.arange(weights[-1].shape[1] // 2, device=weights[-1].device) if order is None else order)
            lists.affines.append(weights[-1].new_empty(0) if affine is None else affine)
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
    if _serves(x) and not any_autocast() and not wants_reference("autoregressive_stack", x.device):
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
        if all(m.affine is None and serves(m.conditioner, x) for m in maps):
            return apply_function(_Plain, x, context, maps, lists, *lists.weights, *lists.biases, *lists.context_weights)
    total = None
    for conditioner, scale, form, inverse, affine in maps:
        own = context if conditioner.context_weights else None
        x, logabsdet = autoregressive(_moved(x, affine), conditioner, own, scale=scale, form=form, inverse=inverse)
        total = logabsdet if total is None else total + logabsdet
    return x, total


def _serves(x: Tensor) -> bool:
    return x.device.type.upper() in _COMPILED and x.dtype in (torch.float32, torch.float64) and not transformed()


def _moved(x: Tensor, affine: Tensor | None) -> Tensor:
    return x if affine is None or not affine.numel() else (x + affine[0]) * affine[1] + affine[2]


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
        ctx.numbers = lists.activations, lists.wiring, lists.stages, lists.scales
        return y, total

    @staticmethod
    def backward(ctx, dy: Tensor, dlogabsdet: Tensor):
        x, context, *tensors = ctx.saved_tensors
        layers, n = len(ctx.numbers[0]), len(ctx.numbers[2]) // _NUMBERS
        kept, orders, visible, weights, biases, context_weights = _split(tensors, (n, n, layers, layers, layers))
        lists = _Lists(weights, biases, context_weights, [], visible, orders, [x.new_empty(0)] * n, *ctx.numbers)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_gradient(ctx, x, context, lists, dy, dlogabsdet)
        need_dx, dcontext, gradients = ctx.needs_input_grad[0], None, []
        for i, (conditioner, scale, form, inverse, _) in reversed(list(enumerate(lists.maps()))):
            own = context if conditioner.context_weights else None
            if inverse:
                dy, dterm, *parameters = inverse_backward(dy, dlogabsdet, kept[i], own, conditioner, scale, form)
            else:
                wanted = need_dx or i > 0
                dy, dterm, *parameters = training_backward(dy, dlogabsdet, kept[i], own, conditioner, scale, form, wanted)
            dcontext = dcontext if own is None else dterm if dcontext is None else dcontext + dterm
            gradients.insert(0, _split(parameters, (len(conditioner.weights),) * 2))
        by_list = (g for field in zip(*gradients, strict=True) for own in field for g in own)
        return dy if need_dx else None, dcontext, None, None, *by_list


def _split(items: Sequence, sizes: Sequence[int]) -> list[list]:
    """Lists of these sizes, and what remains."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [list(items[a:b]) for a, b in itertools.pairwise(ends)] + [list(items[ends[-1] :])]


def _differentiable_gradient(ctx, z: Tensor, context: Tensor | None, lists: _Lists, dx: Tensor, dlogabsdet: Tensor) -> tuple:
    """The same gradient as a graph of its own, for create_graph=True."""
    x, total = z, None
    for conditioner, scale, form, inverse, _ in lists.maps():
        own = context if conditioner.context_weights else None
        x, logabsdet = autoregressive_reference(x, conditioner, own, scale, form, inverse, linear=masked_linear)
        total = logabsdet if total is None else total + logabsdet
    inputs = (z, context, None, None, *lists.weights, *lists.biases, *lists.context_weights)
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
    gradients = iter(torch.autograd.grad((x, total), wanted, (dx, dlogabsdet), create_graph=True, allow_unused=True))
    return tuple(next(gradients) if needed else None for needed in ctx.needs_input_grad)
