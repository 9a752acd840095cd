"""The bare ops of the loop, which neither check nor record a gradient: one map, and several one after another."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import library, register_fake
from ..scale_map import Form, PoweredMap, ScaleMap
from .conditioner import WIRING, Conditioner
from .reference import autoregressive_reference

library.define(
    "autoregressive(Tensor x, Tensor? context, Tensor[] weights, Tensor[] biases, Tensor[] context_weights, Tensor[] context_biases, "
    "Tensor[] visible, Tensor? order, int[] activations, int[] wiring, int scale_kind, float scale_p0, float scale_p1, int form, "
    "bool inverse) -> (Tensor, Tensor)"
)

library.define(
    "autoregressive_stack(Tensor x, Tensor? context, Tensor[] weights, Tensor[] biases, Tensor[] context_weights, Tensor[] context_biases, "
    "Tensor[] visible, Tensor[] orders, Tensor[] affines, int[] activations, int[] wiring, int[] stages, float[] scales, bool keep) "
    "-> (Tensor, Tensor, Tensor)"
)
_autoregressive = torch.ops.flowkernels.autoregressive.default
stack_op = torch.ops.flowkernels.autoregressive_stack.default


class MapNumbers(NamedTuple):
    """What `stages` has of one map: MapNumbers in csrc/stack_lists.h."""

    layers: int
    contexts: int
    context_biases: int  # whether each of the context weights has one
    wired: int
    scale_kind: int
    form: int
    bfloat16_weights: int  # whether a GPU rounds the matrices
    inverse: int


NUMBERS = len(MapNumbers._fields)


def begins_with_inverse(stages: Sequence[int]) -> bool:
    return bool(MapNumbers(*stages[:NUMBERS]).inverse)


def _composite(
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
    scale_kind: int,
    scale_p0: float,
    scale_p1: float,
    form: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    conditioner = Conditioner(weights, biases, visible, activations, context_weights, order, wiring, context_biases)
    scale = ScaleMap.from_packed(scale_kind, scale_p0, scale_p1)
    return autoregressive_reference(x, conditioner, context, scale, Form(form), inverse)


library.impl("autoregressive", _composite, "CompositeExplicitAutograd")


@register_fake("autoregressive")
def _(x: Tensor, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


def autoregressive_op(
    x: Tensor, context: Tensor | None, conditioner: Conditioner, scale: ScaleMap | PoweredMap, form: Form, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The bare op: no checks, no gradient."""
    weights, biases, visible, activations, context_weights, order, wiring, context_biases = conditioner
    p0, p1 = scale.packed
    kind, form = int(scale.kind), int(form)
    return _autoregressive(
        x, context, weights, biases, context_weights, context_biases, visible, order, activations, wiring, kind, p0, p1, form, inverse
    )


class Map(NamedTuple):
    """One map of a stack; see `ops.autoregressive`.

    affine: [3, features], or None. The map's input is (x + affine[0]) * affine[1] + affine[2]: batch norm in evaluation, whose
        log|det|, a constant, is left to the caller.
    """

    conditioner: Conditioner
    scale: ScaleMap | PoweredMap
    form: Form
    inverse: bool = False
    affine: Tensor | None = None


class Lists(NamedTuple):
    """The maps as the op takes them, list after list; in `stages` stand the `MapNumbers` of each."""

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
    def of(cls, maps: Sequence[Map], *, bfloat16_weights: bool = False) -> "Lists":
        lists, none = cls([], [], [], [], [], [], [], [], [], [], []), maps[0].conditioner.weights[-1].new_empty(0)
        for (weights, biases, visible, activations, context_weights, order, wiring, context_biases), scale, form, inverse, affine in maps:
            lists.weights.extend(weights)
            lists.biases.extend(biases)
            lists.context_weights.extend(context_weights)
            lists.context_biases.extend(context_biases)
            lists.visible.extend(visible)
            lists.orders.append(torch.arange(len(visible[-1]) // 2, device=visible[-1].device) if order is None else order)
            lists.affines.append(none if affine is None else affine)
            lists.activations.extend(activations)
            lists.wiring.extend(wiring)
            sizes = len(weights), len(context_weights), len(context_biases) > 0, len(wiring) > 0
            lists.stages.extend(MapNumbers(*sizes, int(scale.kind), int(form), bfloat16_weights, inverse))
            lists.scales.extend(scale.packed)
        return lists

    @classmethod
    def without_affines(cls, weights, biases, context_weights, context_biases, visible, orders, *numbers) -> "Lists":
        """From the lists of an op whose maps have no affine map before them."""
        none = [orders[0].new_empty(0)] * len(orders)
        return cls(weights, biases, context_weights, context_biases, visible, orders, none, *numbers)

    def maps(self) -> list[Map]:
        taken = dict.fromkeys(self._fields, 0)

        def take(name: str, n: int) -> list:
            taken[name] += n
            return list(getattr(self, name)[taken[name] - n : taken[name]])

        maps = []
        for order, affine in zip(self.orders, self.affines, strict=True):
            numbers = MapNumbers(*take("stages", NUMBERS))
            conditioner = Conditioner(
                take("weights", numbers.layers),
                take("biases", numbers.layers),
                take("visible", numbers.layers),
                take("activations", numbers.layers),
                take("context_weights", numbers.contexts),
                order,
                take("wiring", WIRING * numbers.layers if numbers.wired else 0),
                take("context_biases", numbers.contexts if numbers.context_biases else 0),
            )
            scale = ScaleMap.from_packed(numbers.scale_kind, *take("scales", 2))
            maps.append(Map(conditioner, scale, Form(numbers.form), bool(numbers.inverse), affine if affine.numel() else None))
        return maps


def in_turn(
    x: Tensor, context: Tensor | None, maps: Sequence[Map], run: Callable[[Tensor, Tensor | None, Map], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Maps one after another, each by `run` of what the affine map before it gives; the sum of their log|det|s. A map that takes no
    context is not given it."""
    total = None
    for m in maps:
        own = context if m.conditioner.context_weights else None
        if m.affine is not None:
            x = ((x + m.affine[0]) * m.affine[1] + m.affine[2]).to(x.dtype)
        x, logabsdet = run(x, own, m)
        total = logabsdet if total is None else total + logabsdet
    return x, total


def _composite_stack(x: Tensor, context: Tensor | None, *lists_and_keep) -> tuple[Tensor, Tensor, Tensor]:
    *lists, keep = lists_and_keep
    outputs = []

    def run(x: Tensor, own: Tensor | None, m: Map) -> tuple[Tensor, Tensor]:
        y, logabsdet = autoregressive_op(x, own, m.conditioner, m.scale, m.form, m.inverse)
        outputs.append(y)
        return y, logabsdet

    x, total = in_turn(x, context, Lists(*lists).maps(), run)
    kept = torch.stack(outputs[:-1]) if keep and len(outputs) > 1 else x.new_empty((0, *x.shape))
    return x, total, kept


library.impl("autoregressive_stack", _composite_stack, "CompositeExplicitAutograd")


@register_fake("autoregressive_stack")
def _(x: Tensor, context, weights, biases, context_weights, context_biases, visible, orders, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1]), x.new_empty((len(orders) - 1 if rest[-1] else 0, *x.shape))
