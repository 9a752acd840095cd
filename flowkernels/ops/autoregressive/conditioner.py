"""What the sequential loop knows about a network: a list of masked layers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..activation import Activation


class MaskedLayer(NamedTuple):
    """One masked layer: h_out = activation(bias + context @ context_weight + sum_{k < visible[j]} h_in[k] weight[k, j]).

    weight: input-major, [inputs, outputs]. bias: [outputs]. visible: int32 [outputs], ascending.
    context_weight: [context features, outputs], or None. activation: applied as the output is written.
    """

    weight: Tensor
    bias: Tensor
    visible: Tensor
    activation: Activation = Activation.IDENTITY
    context_weight: Tensor | None = None


class Conditioner(NamedTuple):
    """A MADE (Germain et al. 2015) as the fused loop takes it: masked layers whose units are sorted by degree.

    Entry l of each list belongs to layer l: hidden layers, then the output layer. `Conditioner.of(layers)` makes the lists from
    `MaskedLayer`s, and `layers` gives them back; lists are what the op's schema takes, and small flows feel every conversion.

    weights: input-major, [inputs, outputs]. Inputs of the first layer are the features in the order in which they are generated;
        outputs 2p and 2p + 1 of the last are shift and raw scale of the p-th generated feature.
    biases: [outputs].
    visible: int32 [outputs], ascending: how many inputs each output sees.
    activations: codes of `Activation`.
    context_weights: [context features, outputs] each, or an empty list where there is no context.
    order: the k-th entry is the feature generated k-th, int64 [features]; None for 0, 1, 2, ...

    What each unit may see is in `visible` alone; degrees are how one makes it (`ops.degrees`). Features whose outputs are ready at
    the same time form one step of the loop, so partial orders need nothing special.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    visible: list[Tensor]
    activations: list[int]
    context_weights: list[Tensor]
    order: Tensor | None = None

    @classmethod
    def of(cls, layers: Sequence[MaskedLayer], order: Tensor | None = None) -> "Conditioner":
        """The network of these layers, the output layer last."""
        weights, biases, visible, activations, contexts = zip(*layers, strict=True)
        context_weights = [c for c in contexts if c is not None]
        if context_weights and len(context_weights) != len(weights):
            raise ValueError("context_weight must be given for every layer or for none")
        return cls(list(weights), list(biases), list(visible), [int(a) for a in activations], context_weights, order)

    @property
    def layers(self) -> list[MaskedLayer]:
        contexts = self.context_weights or [None] * len(self.weights)
        codes = [Activation(a) for a in self.activations]
        return list(map(MaskedLayer, self.weights, self.biases, self.visible, codes, contexts))

    def to(self, dtype: torch.dtype) -> "Conditioner":
        """The same network with its parameters in another dtype."""
        cast = lambda tensors: [t.to(dtype) for t in tensors]
        return self._replace(weights=cast(self.weights), biases=cast(self.biases), context_weights=cast(self.context_weights))


def check_conditioner(conditioner: Conditioner) -> list[list[int]]:
    """Check that a network is autoregressive, and return its steps: steps[s][l] units of layer l are known after step s.

    Reads the staircases, so it belongs where a network is built, not where it is called.

    Raises:
        ValueError: shapes do not fit, a staircase does not ascend or leaves its inputs, order is not a permutation, or an
            output depends on itself or on a later feature (the message says which).
    """
    layers = conditioner.layers
    features = layers[0].weight.shape[0]
    if conditioner.order is not None and sorted(conditioner.order.tolist()) != list(range(features)):
        raise ValueError(f"order must be a permutation of 0..{features - 1}; got {conditioner.order.tolist()}")
    staircases = []
    for number, layer in enumerate(layers):
        inputs, outputs = layer.weight.shape
        expected = layers[number - 1].weight.shape[1] if number else features
        if inputs != expected:
            raise ValueError(f"layer {number} must have {expected} inputs, the outputs of the layer before; got {inputs}")
        visible = layer.visible.tolist()
        if len(visible) != outputs:
            raise ValueError(f"layer {number}: visible must have one entry per output ({outputs}); got {len(visible)}")
        if visible != sorted(visible) or (visible and not 0 <= visible[0] <= visible[-1] <= inputs):
            raise ValueError(f"layer {number}: visible must ascend from 0 to at most {inputs}; got {visible}")
        staircases.append(visible)
    if layers[-1].weight.shape[1] != 2 * features:
        raise ValueError(
            f"the last layer must have {2 * features} outputs, shift and raw scale of {features} features; got {layers[-1].weight.shape[1]}"
        )
    return _steps(features, staircases)


def _steps(features: int, staircases: list[list[int]]) -> list[list[int]]:
    ready = [0] * (len(staircases) + 1)
    steps = []
    while ready[0] < features or not steps:
        before = ready[-1]
        for number, visible in enumerate(staircases, start=1):
            end = ready[number]
            while end < len(visible) and visible[end] <= ready[number - 1]:
                end += 1
            ready[number] = end
        ready[-1] -= ready[-1] % 2  # a feature is known when both its shift and its raw scale are
        if ready[-1] == before:
            raise ValueError(
                f"the network is not autoregressive: feature {ready[-1] // 2} in the order of generation can see itself or a later one "
                f"(its outputs see {staircases[-1][ready[-1]]} and {staircases[-1][ready[-1] + 1]} units, of which {ready[-2]} "
                f"can be known when {ready[0]} features are)"
            )
        steps.append(list(ready))
        ready[0] = ready[-1] // 2
    return steps


def context_features(conditioner: Conditioner) -> int:
    """Width of the context that the network takes; 0 for none."""
    return conditioner.context_weights[0].shape[0] if conditioner.context_weights else 0
