"""What the sequential loop knows about a network: a list of masked layers, and how they are wired."""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..activation import Activation
from ..degrees import check_staircase
from ..scale_map import PoweredMap, ScaleKind, ScaleMap, default_scale


class MaskedLayer(NamedTuple):
    """One layer of a conditioner.

        c     = context_activation(context_bias + context @ context_weight)
        sum_j = bias_j + sum_{k < visible[j]} h_source[k] * weight[k, j]
        h     = activation(sum + c + h_residual),   or with `gate`   activation(sum * c + h_residual)

    weight: input-major, [inputs, outputs]. A unitwise layer, whose unit j sees unit j of its source alone, has one factor a unit,
        [units], or none: that is an activation as the source is read, and the source's own values stay as they were written.
    bias: [outputs]; None in a unitwise layer without weight.
    visible: int32 [outputs], ascending; 1..units in a unitwise layer.
    activation: applied as the output is written.
    context_weight: [context features, outputs], or None. context_bias: [outputs], or None.
    gate: the context term multiplies the sum instead of joining it.
    source, residual: numbers of the values that are read and added; values 0 are the features, and the l-th layer of a list
        (counted from 0) writes values l + 1. By default a layer reads the values before it, and adds none.
    """

    weight: Tensor | None
    bias: Tensor | None
    visible: Tensor
    activation: Activation = Activation.IDENTITY
    context_weight: Tensor | None = None
    context_bias: Tensor | None = None
    context_activation: Activation = Activation.IDENTITY
    gate: bool = False
    source: int | None = None
    residual: int | None = None

    @property
    def unitwise(self) -> bool:
        return self.weight is None or self.weight.dim() == 1


class ContextUse(enum.IntEnum):
    NONE = 0
    ADD = 1
    GATE = 2


class Wiring(NamedTuple):
    """How one layer is wired, as the op's list of integers says it; residual is -1 for none."""

    source: int
    residual: int
    context: ContextUse
    context_activation: Activation

    @classmethod
    def of(cls, number: int, layer: MaskedLayer) -> "Wiring":
        use = ContextUse.NONE if layer.context_weight is None else ContextUse.GATE if layer.gate else ContextUse.ADD
        source = number if layer.source is None else layer.source
        activation = layer.context_activation if use else Activation.IDENTITY
        return cls(source, -1 if layer.residual is None else layer.residual, use, activation)

    @classmethod
    def each(cls, wiring: Sequence[int]) -> "list[Wiring]":
        """Of the layers whose numbers stand one after the other in `wiring`."""
        return [cls(*wiring[i : i + WIRING]) for i in range(0, len(wiring), WIRING)]


WIRING = len(Wiring._fields)  # numbers to a layer


class Conditioner(NamedTuple):
    """A MADE (Germain et al. 2015) as the fused loop takes it: masked layers whose units are sorted by degree.

    Entry l of each list belongs to layer l: hidden layers, then the output layer. `Conditioner.of(layers)` makes the lists from
    `MaskedLayer`s, and `layers` gives them back; lists are what the op's schema takes, and small flows feel every conversion.

    weights: input-major, [inputs, outputs]; [units], or empty, where the layer is unitwise. Values 0 are the features in the order
        in which they are generated, of which a layer may have weights for the first alone; outputs 2p and 2p + 1 of the last layer
        are shift and raw scale of the p-th generated feature, output p the shift where sigma is 1 (`ScaleMap.unit`). Where there are
        fewer, and `order` says how many features there are, the outputs belong to the last features, and those before them pass
        unchanged: that is a coupling.
    biases: [outputs].
    visible: int32 [outputs], ascending: how many inputs each output sees.
    activations: codes of `Activation`.
    context_weights: [context features, outputs], one for each layer that takes the context; an empty list where there is none.
    order: the k-th entry is the feature generated k-th, int64 [features]; None for 0, 1, 2, ...
    wiring: the numbers of a `Wiring` for each layer, one after the other; empty for a plain chain, where each layer reads the one
        before it and context terms are added in every layer, in the first, or in none.
    context_biases: one for each of context_weights, or an empty list for zeros.

    What each unit may see is in `visible` alone; degrees are how one makes it (`ops.degrees`). Features whose outputs are ready at
    the same time form one step of the loop, so partial orders need nothing special.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    visible: list[Tensor]
    activations: list[int]
    context_weights: list[Tensor]
    order: Tensor | None = None
    wiring: list[int] = []
    context_biases: list[Tensor] = []

    @classmethod
    def of(cls, layers: Sequence[MaskedLayer], order: Tensor | None = None) -> "Conditioner":
        """The network of these layers, the output layer last."""
        for number, layer in enumerate(layers):
            if layer.weight is None and layer.bias is not None:
                raise ValueError(f"layer {number}: a layer without weight takes no bias; got one of shape {list(layer.bias.shape)}")
        like = layers[-1].weight
        given = lambda t: like.new_empty(0) if t is None else t
        context = [layer for layer in layers if layer.context_weight is not None]
        biased = any(layer.context_bias is not None for layer in context)
        return cls(
            [given(layer.weight) for layer in layers],
            [given(layer.bias) for layer in layers],
            [layer.visible for layer in layers],
            [int(layer.activation) for layer in layers],
            [layer.context_weight for layer in context],
            order,
            wiring(layers),
            [like.new_zeros(len(c.visible)) if c.context_bias is None else c.context_bias for c in context] if biased else [],
        )

    @property
    def features(self) -> int:
        return self.visible[-1].shape[0] // 2 if self.order is None else self.order.shape[0]  # len of a tensor takes a microsecond

    def passing(self, scale: ScaleMap | PoweredMap) -> int:
        """How many features, the first in the order of generation, pass unchanged."""
        outputs, each = self.visible[-1].shape[0], 1 if scale.kind == ScaleKind.UNIT else 2
        if self.order is None and each == 1:
            raise ValueError("order is missing: a network that gives shifts alone names the order of its features")
        passing = self.features - outputs // each
        if outputs % each or passing < 0:
            what = "the shift" if each == 1 else "shift and raw scale"
            raise ValueError(f"the last layer must give {what} of at most {self.features} features; got {outputs} outputs")
        return passing

    @property
    def layers(self) -> list[MaskedLayer]:
        weights, biases = iter(self.context_weights), iter(self.context_biases)
        layers, wired = [], Wiring.each(self.wiring)
        parts = zip(self.weights, self.biases, self.visible, self.activations, strict=True)
        for number, (weight, bias, visible, activation) in enumerate(parts):
            alone = weight.dim() == 1 and not weight.numel()
            layer = MaskedLayer(None if alone else weight, None if alone else bias, visible, Activation(activation))
            if wired:
                source, residual, use, context_activation = wired[number]
                layer = layer._replace(source=source, residual=None if residual < 0 else residual, gate=use == ContextUse.GATE)
                layer = layer._replace(context_activation=Activation(context_activation))
            else:
                use = ContextUse.ADD if number < len(self.context_weights) else ContextUse.NONE
            if use != ContextUse.NONE:
                layer = layer._replace(context_weight=next(weights), context_bias=next(biases, None))
            layers.append(layer)
        return layers

    def to(self, dtype: torch.dtype) -> "Conditioner":
        """The same network with its parameters in another dtype."""
        cast = lambda tensors: [t.to(dtype) for t in tensors]
        weights, biases = cast(self.weights), cast(self.biases)
        contexts, context_biases = cast(self.context_weights), cast(self.context_biases)
        return self._replace(weights=weights, biases=biases, context_weights=contexts, context_biases=context_biases)


def wiring(layers: Sequence[MaskedLayer]) -> list[int]:
    """`Conditioner.wiring` of these layers: empty where they are a plain chain."""
    wired = [Wiring.of(number, layer) for number, layer in enumerate(layers)]
    numbers = range(len(wired))
    takes = (range(0), range(1), numbers)  # the layers that a chain's context joins
    chains = ([Wiring(n, -1, ContextUse.ADD if n in some else ContextUse.NONE, Activation.IDENTITY) for n in numbers] for some in takes)
    if wired in chains and all(layer.context_bias is None for layer in layers):
        return []
    return [int(number) for w in wired for number in w]


def check_conditioner(conditioner: Conditioner, scale: ScaleMap | None = None) -> list[list[int]]:
    """Check that a network is autoregressive, and return its steps: steps[s][l] units of values l are known after step s.

    Reads the staircases, so it belongs where a network is built, not where it is called. The scale map matters where it is
    `ScaleMap.unit()`, whose networks give shifts alone.

    Args:
        conditioner: the network.
        scale: the scale map that it is used with; any but `ScaleMap.unit()` by default.

    Raises:
        ValueError: shapes do not fit, a staircase does not ascend or leaves its inputs, order is not a permutation, or an
            output depends on itself or on a later feature (the message says which).
    """
    takes = [layer for layer in Wiring.each(conditioner.wiring) if layer.context != ContextUse.NONE]
    allowed = [len(takes)] if conditioner.wiring else [0, 1, len(conditioner.weights)]
    if len(conditioner.context_weights) not in allowed:
        raise ValueError(
            "context_weights must have one entry for each layer that takes the context, "
            f"{' or '.join(map(str, dict.fromkeys(allowed)))}; got {len(conditioner.context_weights)}"
        )
    layers = conditioner.layers
    last = layers[-1]
    features = conditioner.features
    if conditioner.order is None:
        features = layers[0].weight.shape[0] if not layers[0].unitwise else len(layers[0].visible)
    if conditioner.order is not None and sorted(conditioner.order.tolist()) != list(range(features)):
        raise ValueError(f"order must be a permutation of 0..{features - 1}; got {conditioner.order.tolist()}")
    widths, staircases, reads = [features], [], []
    for number, layer in enumerate(layers):
        source, residual, *_ = Wiring.of(number, layer)
        if not 0 <= source <= number or not -1 <= residual <= number:
            raise ValueError(f"layer {number} must read values 0 to {number}; got source {source} and residual {residual}")
        inputs = widths[source]
        if source == 0 and not layer.unitwise:
            inputs = min(inputs, layer.weight.shape[0])
        _check_shapes(number, layer, inputs, context_features(conditioner))
        visible = check_staircase(layer.visible, inputs, f"layer {number}: ")
        if residual >= 0 and widths[residual] != len(visible):
            raise ValueError(f"layer {number}: residual must be {len(visible)} wide, like the layer; got {widths[residual]}")
        widths.append(len(visible))
        staircases.append(visible)
        reads.append((source, residual))
    scale = default_scale() if scale is None else scale
    if conditioner.order is None and scale.kind != ScaleKind.UNIT and widths[-1] != 2 * features:
        raise ValueError(f"the last layer must have {2 * features} outputs, shift and raw scale of {features} features; got {widths[-1]}")
    passing = conditioner.passing(scale)
    if last.unitwise or last.gate or last.residual is not None or last.activation != Activation.IDENTITY:
        raise ValueError("the last layer must be a masked layer with neither gate nor residual nor activation")
    return _steps(features, passing, staircases, reads)


def _check_shapes(number: int, layer: MaskedLayer, inputs: int, contexts: int) -> None:
    outputs = len(layer.visible)
    if layer.unitwise:
        if outputs != inputs:
            raise ValueError(f"layer {number} must have {inputs} units, like what it acts on unit by unit; got {outputs}")
        if layer.visible.tolist() != list(range(1, outputs + 1)):
            raise ValueError(f"layer {number}: visible of a unitwise layer must be 1..{outputs}; got {layer.visible.tolist()}")
        if layer.context_weight is not None:
            raise ValueError(f"layer {number} is unitwise and cannot take a context")
    elif layer.weight.shape[0] != inputs:
        raise ValueError(f"layer {number} must have {inputs} inputs, the outputs of the layer it reads; got {layer.weight.shape[0]}")
    elif layer.weight.shape[1] != outputs:
        raise ValueError(f"layer {number}: visible must have one entry per output ({layer.weight.shape[1]}); got {outputs}")
    wanted = {"weight": (outputs,)} if layer.unitwise else {}
    wanted |= {"bias": (outputs,), "context_weight": (contexts, outputs), "context_bias": (outputs,)}
    for name, shape in wanted.items():
        value = getattr(layer, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"layer {number}: {name} must have shape {list(shape)}; got {list(value.shape)}")


def _steps(features: int, passing: int, staircases: list[list[int]], reads: list[tuple[int, int]]) -> list[list[int]]:
    ready = [passing] + [0] * len(staircases)
    each = len(staircases[-1]) // (features - passing) if features > passing else 1
    steps = []
    while ready[0] < features or not steps:
        before = ready[-1]
        for number, (visible, (source, residual)) in enumerate(zip(staircases, reads, strict=True), start=1):
            end, most = ready[number], len(visible) if residual < 0 else ready[residual]
            while end < most and visible[end] <= ready[source]:
                end += 1
            ready[number] = end
        ready[-1] -= ready[-1] % each  # a feature is known when both its shift and its raw scale are
        if ready[-1] == before:
            raise ValueError(
                f"the network is not autoregressive: feature {passing + ready[-1] // each} in the order of generation can see itself or a "
                f"later one (its outputs see {' and '.join(map(str, staircases[-1][ready[-1] : ready[-1] + each]))} units, of which "
                f"{ready[reads[-1][0]]} can be known when {ready[0]} features are)"
            )
        steps.append(list(ready))
        ready[0] = passing + ready[-1] // each
    return steps


def context_features(conditioner: Conditioner) -> int:
    """Width of the context that the network takes; 0 for none."""
    return conditioner.context_weights[0].shape[0] if conditioner.context_weights else 0
