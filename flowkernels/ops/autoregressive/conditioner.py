"""What the sequential loop knows about a network: a list of masked layers. See docs in `Conditioner`."""

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

    layers: hidden layers, then the output layer. Inputs of the first are the features in the order in which they are generated.
        Outputs 2p and 2p + 1 of the last are shift and raw scale of the p-th generated feature.
    order: the k-th entry is the feature generated k-th, int64 [features]; None for 0, 1, 2, ...

    What each unit may see is in the `visible` of its layer alone; degrees are how one makes them (`ops.degrees`). Features whose
    outputs are ready at the same time form one step of the loop, so partial orders need nothing special.
    """

    layers: tuple[MaskedLayer, ...]
    order: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """Everything that may want a gradient."""
        return [t for layer in self.layers for t in (layer.weight, layer.bias, layer.context_weight)]


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


def flatten(conditioner: Conditioner) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """The lists that the op's schema wants: weights, biases, context weights (empty without context), visible, activations."""
    weights, biases, visible, activations, contexts = zip(*conditioner.layers, strict=True)
    return list(weights), list(biases), [c for c in contexts if c is not None], list(visible), [int(a) for a in activations]


def unflatten(
    weights: list[Tensor],
    biases: list[Tensor],
    context_weights: list[Tensor],
    visible: list[Tensor],
    order: Tensor | None,
    activations: list[int],
) -> Conditioner:
    """The inverse of `flatten`."""
    contexts = context_weights or [None] * len(weights)
    codes = [Activation(a) for a in activations]
    layers = map(MaskedLayer, weights, biases, visible, codes, contexts)
    return Conditioner(tuple(layers), order)


def context_features(conditioner: Conditioner) -> int:
    """Width of the context that the network takes; 0 for none."""
    weight = conditioner.layers[0].context_weight
    return 0 if weight is None else weight.shape[0]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The loop computes in float64 for float64, in float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)
