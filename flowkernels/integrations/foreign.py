"""A masked network as other libraries keep it, and its conversion: units are permuted once, so that masks become staircases."""

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import Activation, Conditioner, MaskedLayer

Map = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class ForeignLayer(NamedTuple):
    """One layer of a foreign network; see `ops.MaskedLayer` for what its fields do.

    name: of the module, for messages. weight, mask: as in nn.Linear, [outputs, inputs]; a layer without mask is unitwise.
    context_weight: [outputs, context features].
    """

    name: str
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    activation: Activation = Activation.IDENTITY
    context_weight: Tensor | None = None
    context_bias: Tensor | None = None
    context_activation: Activation = Activation.IDENTITY
    gate: bool = False
    source: int | None = None
    residual: int | None = None


def conditioner_of(layers: Sequence[ForeignLayer], *, scale_first: bool) -> Conditioner:
    """The same network with its units sorted by degree.

    Outputs 2i and 2i + 1 of the last layer belong to feature i: raw scale and shift with `scale_first`, shift and raw scale without.

    Raises:
        ValueError: the masks are not autoregressive, or no order of degrees makes staircases of them; the message says which output
            sees which input.
    """
    layers = [layer._replace(source=number if layer.source is None else layer.source) for number, layer in enumerate(layers)]
    _check_dependencies(_reached(layers))
    groups = _groups(layers)
    orders = _orders(layers, groups)
    features = orders[0]
    pair = torch.tensor([1, 0] if scale_first else [0, 1], device=features.device)
    orders[groups[-1]] = (2 * features[:, None] + pair).flatten()
    return Conditioner.of([_sorted(layer, orders[groups[layer.source]], orders[groups[n + 1]]) for n, layer in enumerate(layers)], features)


def _reached(layers: Sequence[ForeignLayer]) -> Tensor:
    """reached[i, j]: the outputs of feature i see input j."""
    first = next(layer.mask for layer in layers if layer.mask is not None)
    reached = [torch.eye(first.shape[1], dtype=torch.bool, device=first.device)]
    for layer in layers:
        seen = reached[layer.source]
        if layer.mask is not None:
            seen = layer.mask.double() @ seen.double() > 0
        reached.append(seen if layer.residual is None else seen | reached[layer.residual])
    return reached[-1][0::2] | reached[-1][1::2]


def _check_dependencies(reached: Tensor) -> None:
    itself = reached.diagonal().nonzero().flatten().tolist()
    if itself:
        raise ValueError(f"the masks are not autoregressive: the output of feature {itself[0]} sees input {itself[0]}")
    mutual = (reached & reached.T).nonzero().tolist()
    if mutual:
        i, j = mutual[0]
        raise ValueError(
            f"the masks are not autoregressive: the output of feature {i} sees input {j}, and the output of feature {j} sees input {i}"
        )
    by_count = reached.sum(1).argsort(stable=True).tolist()
    for i, j in pairwise(by_count):
        missing = (reached[i] & ~reached[j]).nonzero().flatten().tolist()
        if missing:
            other = (reached[j] & ~reached[i]).nonzero().flatten().tolist()
            raise ValueError(
                f"no order of degrees expresses these masks: the output of feature {i} sees input {missing[0]} and not input {other[0]}, "
                f"and the output of feature {j} sees input {other[0]} and not input {missing[0]}"
            )


def _groups(layers: Sequence[ForeignLayer]) -> list[int]:
    """Values that are added to each other, or made of each other unit by unit, share their order: the number of each one's group."""
    groups = [0]
    for number, layer in enumerate(layers):
        if layer.residual is not None:
            groups.append(groups[layer.residual])
        else:
            groups.append(groups[layer.source] if layer.mask is None else number + 1)
    return groups


def _orders(layers: Sequence[ForeignLayer], groups: list[int]) -> dict[int, Tensor]:
    """For each group its units by ascending degree: those that see less come first, and among equals those that more units see."""
    sees: dict[int, Tensor] = {}
    seen_by: dict[int, Tensor] = {}
    masked = [(number, layer.source, layer.mask) for number, layer in enumerate(layers) if layer.mask is not None]
    for number, source, mask in masked:
        # the outputs' order is that of the features: what comes out of one goes into it in the inverse
        above, counts = (0, mask[0::2].sum(1)) if number == len(layers) - 1 else (groups[number + 1], mask.sum(1))
        sees[above] = sees.get(above, 0) + counts
        seen_by[groups[source]] = seen_by.get(groups[source], 0) + mask.sum(0)
    orders = {}
    for group, counts in sees.items():
        others = seen_by.get(group, torch.zeros_like(counts))
        orders[group] = (counts * (others.max() + 1) - others).argsort(stable=True)
    return orders


def _sorted(layer: ForeignLayer, below: Tensor, above: Tensor) -> MaskedLayer:
    take = lambda t: None if t is None else t.detach()[above]
    if layer.mask is None:
        weight, visible = take(layer.weight), torch.arange(1, len(above) + 1, dtype=torch.int32, device=above.device)
    else:
        mask = layer.mask[above][:, below]
        visible = mask.sum(1)
        stairs = torch.arange(len(below), device=mask.device) < visible[:, None]
        if visible.diff().lt(0).any() or mask.ne(stairs).any():
            j, k = (mask & ~stairs | (visible < visible.cummax(0).values)[:, None]).nonzero()[0].tolist()
            raise ValueError(
                f"no order of degrees expresses the mask of {layer.name}: its output {int(above[j])} sees input {int(below[k])}, "
                f"but not all that units of a lower degree see"
            )
        weight, visible = (layer.weight.detach()[above][:, below] * mask).T.contiguous(), visible.to(torch.int32)
    return MaskedLayer(
        weight,
        take(layer.bias),
        visible,
        layer.activation,
        None if layer.context_weight is None else take(layer.context_weight).T.contiguous(),
        take(layer.context_bias),
        layer.context_activation,
        layer.gate,
        layer.source,
        layer.residual,
    )


def check_batch_norm(module: nn.Module, name: str) -> None:
    """Raises ValueError where a batch norm normalises by the statistics of the batch."""
    if module.training or module.running_var is None:
        raise ValueError(
            f"{name} normalises by the batch it sees, which mixes its rows; call eval() on the network before it is taken over"
        )


def batch_norm_affine(module: nn.BatchNorm1d, name: str) -> tuple[Tensor, Tensor]:
    """Factor and summand of each unit that a batch norm in evaluation mode is.

    Raises:
        ValueError: it normalises by the statistics of the batch.
    """
    check_batch_norm(module, name)
    factor = torch.rsqrt(module.running_var + module.eps)
    if module.weight is not None:
        factor = factor * module.weight.detach()
    summand = -module.running_mean * factor
    return factor, summand if module.bias is None else summand + module.bias.detach()


def is_of_library(module: nn.Module, library: str) -> bool:
    """Whether its class is the library's own, and no method of it was replaced: then its two directions belong together."""
    replaced = any(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())
    return type(module).__module__.split(".")[0] == library and not replaced


def check_own_methods(module: nn.Module, library_class: type, names: Sequence[str]) -> None:
    """Raises ValueError where a subclass draws samples in another way, which nobody could compare."""
    for name in names:
        if name in vars(module) or getattr(type(module), name) is not getattr(library_class, name):
            raise ValueError(f"{type(module).__name__} has a {name} of its own, which would not be taken over; take over its parts")


def check_dropout(module: nn.Module, name: str) -> None:
    """Raises ValueError where a dropout is at work."""
    if module.training and module.p > 0:
        raise ValueError(f"{name} drops units at random while it trains; call eval() on the network before it is taken over")


def freeze_like(layer: nn.Module, foreign: nn.Module) -> None:
    """Freezes a layer whose foreign parameters are all frozen. Where some are, it says that ours, which are made of them, are not."""
    trained = [p.requires_grad for p in foreign.parameters()]
    if not any(trained):
        layer.requires_grad_(False)
    elif not all(trained):
        warnings.warn(
            f"some parameters of {type(foreign).__name__} are frozen; those made of them are not: freeze them again", stacklevel=2
        )


@torch.no_grad()
def check_same(
    ours: nn.Module,
    theirs: Map,
    module: object,
    *,
    inverse: Map | None = None,
    log_prob: Callable[[Tensor, Tensor | None], Tensor] | None = None,
) -> None:
    """Compare a layer or a flow with the map it was made from, on a few rows of noise, data to noise; also its inverse and its density,
    where they are given.

    Raises:
        ValueError: they differ: module's class overrides a part of the map, or its library is of a version with another one.
    """
    like = next((t for t in (*ours.parameters(), *ours.buffers()) if t.is_floating_point()), torch.empty(0))
    if like.is_meta:
        return
    draws = torch.Generator().manual_seed(0)
    noise = lambda width: torch.randn(16, width, generator=draws, dtype=torch.float64).to(like) if width else None
    x, context = noise(ours.features), noise(ours.context_features)
    with torch.autocast(like.device.type, enabled=False):
        pairs = [*zip(ours(x, context), theirs(x, context), strict=True)]
        if inverse is not None:
            few, of_few = x[:2], None if context is None else context[:2]  # by D passes of their network
            pairs += zip(ours.inverse(few, of_few), inverse(few, of_few), strict=True)
        if log_prob is not None:
            pairs.append((ours.log_prob(x, context), log_prob(x, context)))
    for mine, other in pairs:
        if torch.equal(mine.isfinite(), other.isfinite()):  # NaN in a foreign parameter is in ours too, and says nothing
            mine, other = mine[mine.isfinite()], other[other.isfinite()]
        far, size = ((mine - other).abs().max().item(), other.abs().max().item()) if len(other) else (0.0, 0.0)
        if not far <= torch.finfo(like.dtype).eps ** 0.5 * (1 + size):
            raise ValueError(
                f"{type(module).__name__} does not compute what this version of its library's does: on 16 rows of noise the layer made of "
                f"it differs by up to {far:.1e}"
            )
