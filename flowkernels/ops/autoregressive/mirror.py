"""Which networks the GPU's loop mirrors, for the gradient of the inverse: csrc/autoregressive_mirror.h, counted. A kernel could say so only
in its error."""

import functools

import torch

from ..activation import Activation
from .conditioner import Conditioner, ContextUse, Wiring

_CHAIN, _FACTORS, _READ = range(3)  # a masked layer; unit by unit, with factors or without


def mirrored_layers(network: Conditioner) -> int | None:
    """How many layers the mirrored loop has; None where the features are read by several layers, or unit by unit, or added, or where values
    are neither read nor added."""
    if is_plain(network):
        return len(network.weights)
    kinds = (_CHAIN if w.dim() == 2 else _FACTORS if w.numel() else _READ for w in network.weights)
    chain = (Wiring(layer, -1, ContextUse.NONE, Activation.IDENTITY) for layer in range(len(network.weights)))
    wiring = network.wiring or [n for layer in chain for n in layer]
    count = _count.__wrapped__ if torch.compiler.is_compiling() else _count
    return count(tuple(wiring), tuple(network.activations), tuple(kinds))


def is_plain(network: Conditioner) -> bool:
    """Whether it is a chain of masked layers, to whose sums the context is added in all of them, in the first, or in none."""
    return not network.wiring and all([w.dim() == 2 for w in network.weights])  # without a wiring there may be layers of one factor a unit


@functools.lru_cache(1024)
def _count(wiring: tuple[int, ...], activations: tuple[int, ...], kinds: tuple[int, ...]) -> int | None:
    layers = Wiring.each(wiring)
    n = len(layers)
    readers, adders = (
        [[i for i in range(n) if getattr(layers[i], way) == values] for values in range(n)] for way in ("source", "residual")
    )
    if len(readers[0]) != 1 or adders[0] or kinds[readers[0][0]] != _CHAIN:
        return None

    def is_passed_on(i: int) -> bool:
        """Whether the layer only activates what one product reads."""
        read = readers[i + 1]
        return kinds[i] == _READ and layers[i].residual < 0 and len(read) == 1 and not adders[i + 1] and kinds[read[0]] == _CHAIN

    count = 1
    for i, layer in enumerate(layers[:-1]):
        read, added = readers[i + 1], adders[i + 1]
        if is_passed_on(i):
            continue
        if not (read or added):
            return None
        count += len(read) + max(len(added) - 1, 0) + (layer.context == ContextUse.GATE)
        is_gate_of_product = len(read) == 1 and not added and kinds[read[0]] == _CHAIN
        count += not read or (activations[i] != Activation.IDENTITY and not is_gate_of_product)
    return count
