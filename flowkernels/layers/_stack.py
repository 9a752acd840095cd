"""Runs of autoregressive layers and of couplings of vectors, with the permutations and normalisations between them, as one call of
`ops.autoregressive_stack`."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .._torch import has_global_hooks
from ..ops import Map, autoregressive_stack
from ._coupling_map import most_rows
from ._plain import is_plain
from ._programs import Step, checked
from .batch_norm import FlowBatchNorm, evaluation_affines
from .coupling import AdditiveCoupling, AffineCoupling
from .inverse import Inverse
from .masked_autoregressive import MaskedAutoregressive
from .permute import Permute

_Part = tuple[nn.Module, Map | None]  # a layer, and the map that it is where it can be one


def run(
    layers: Sequence[nn.Module], x: Tensor, context: Tensor | None, *, inverse: bool, steps: list[Step] | None = None
) -> tuple[Tensor, Tensor]:
    """Apply layers in the order given, all forward or all inverse: the result, and the sum of their log|det|s. What is run is appended to
    `steps`, and an empty step where another call might need another one."""
    together = not has_global_hooks()
    if together and (plain := _autoregressive_alone(layers, inverse)):  # a small flow feels every detour
        maps = [Map(layer.conditioner(), layer.scale, layer.form, own) for layer, own in plain]
        if steps is not None:
            steps.append(Step(layers, maps))
        return _run_maps(x, context, maps)
    total = None
    group: list[_Part] = []  # layers that run together: the first and the last are maps
    gap: list[_Part] = []  # what has come since, if it may stand between two maps

    def add(y: Tensor, logabsdet: Tensor) -> None:
        nonlocal x, total
        x, total = y, logabsdet if total is None else total + logabsdet

    def call(layer: nn.Module) -> None:
        add(*checked(layer, (layer.inverse if inverse else layer)(x, context)))

    def apply_all() -> None:
        if steps is not None:
            if group:
                steps.append(_step(group, inverse))
            steps.extend(map(_alone, [layer for layer, _ in gap]))
        if group:
            add(*_run_stack(x, context, group, inverse))
        for layer, _ in gap:
            call(layer)

    for layer in layers:
        own = _as_map(layer, x, inverse) if together else None  # no map changes what it needs to know of x
        if own is not None:
            group += [*gap, (layer, own)]
            gap = []
        elif group and _may_stand_between(layer, gap, x, inverse):
            gap.append((layer, None))
        else:
            apply_all()
            group, gap = [], []
            if steps is not None:
                steps.append(_alone(layer))
            call(layer)
    apply_all()
    return x, total


def _alone(layer: nn.Module) -> Step:
    """The layer by itself; a batch norm in training will be joined to maps one day."""
    return Step() if isinstance(layer, FlowBatchNorm) and layer.training else Step([layer])


def _step(group: Sequence[_Part], inverse: bool) -> Step:
    if any(isinstance(layer, Permute) for layer, _ in group):  # whose orders are made anew for every call
        return Step()
    norms = [layer for layer, _ in group if isinstance(layer, FlowBatchNorm)]
    with torch.inference_mode(False):  # it outlives the mode that this call may be in
        affines = norms[0].running_var.new_empty(len(norms), 3, norms[0].features) if norms else torch.empty(0)
    of_norms, maps = iter(affines), []
    for (before, _), (_, own) in pairwise([(None, None), *group]):
        if own is not None:
            maps.append(own._replace(affine=next(of_norms)) if isinstance(before, FlowBatchNorm) else own)

    def write_affines() -> Tensor:
        return evaluation_affines(norms, inverse=inverse, out=affines)[1]

    couplings = [own for layer, own in group if own is not None and not isinstance(_direct(layer), MaskedAutoregressive)]
    limits = [most for own in couplings if (most := most_rows(own.conditioner.weights)) is not None]
    return Step([layer for layer, _ in group], maps, min(limits, default=None), write_affines if norms else None)


def _direct(layer: nn.Module) -> nn.Module:
    while isinstance(layer, Inverse):
        layer = layer.layer
    return layer


def _autoregressive_alone(layers: Sequence[nn.Module], inverse: bool) -> list[tuple[MaskedAutoregressive, bool]]:
    """The layers, and whether each is inverted, if they are autoregressive ones alone."""
    found = []
    for layer in layers:
        own = inverse
        while is_plain(layer, Inverse):
            layer, own = layer.layer, not own
        if not is_plain(layer, MaskedAutoregressive):
            return []
        found.append((layer, own))
    return found


def _as_map(layer: nn.Module, x: Tensor, inverse: bool) -> Map | None:
    while is_plain(layer, Inverse):
        layer, inverse = layer.layer, not inverse
    if is_plain(layer, MaskedAutoregressive):
        return Map(layer.conditioner(), layer.scale, layer.form, inverse)
    if is_plain(layer, AffineCoupling) or is_plain(layer, AdditiveCoupling):
        return layer.as_map(x, inverse=inverse)
    return None


def _may_stand_between(layer: nn.Module, gap: Sequence[_Part], x: Tensor, inverse: bool) -> bool:
    if is_plain(layer, FlowBatchNorm):
        fits = x.dim() == 2 and x.shape[1] == layer.features
        return fits and (inverse or not layer.training) and not any(isinstance(other, FlowBatchNorm) for other, _ in gap)
    return is_plain(layer, Permute) and x.dim() == 2 and x.shape[1] == layer.features


def _run_stack(x: Tensor, context: Tensor | None, group: Sequence[_Part], inverse: bool) -> tuple[Tensor, Tensor]:
    maps: list[Map] = []
    norms = [layer for layer, _ in group if isinstance(layer, FlowBatchNorm)]
    affines, constant = evaluation_affines(norms, inverse=inverse) if norms else (None, None)
    affine, done = None, 0
    permutation = None  # column k of what a layer is given is column permutation[k] of what goes through the op
    for layer, own in group:
        if isinstance(layer, Permute):
            step = torch.argsort(layer.permutation) if inverse else layer.permutation
            permutation = step if permutation is None else permutation[step]
        elif isinstance(layer, FlowBatchNorm):
            affine, done = affines[done] if permutation is None else affines[done][:, torch.argsort(permutation)], done + 1
        else:
            if permutation is not None:
                own = own._replace(conditioner=own.conditioner._replace(order=permutation[own.conditioner.order]))
            maps.append(own if affine is None else own._replace(affine=affine))
            affine = None
    y, logabsdet = _run_maps(x, context, maps)
    if permutation is not None:
        y = y[:, permutation]
    return y, logabsdet if constant is None else logabsdet + constant.to(logabsdet.dtype)


def _run_maps(x: Tensor, context: Tensor | None, maps: Sequence[Map]) -> tuple[Tensor, Tensor]:
    if context is not None and not all(m.conditioner.context_weights for m in maps):  # each layer is given it, as by itself
        raise ValueError(f"context was given, {list(context.shape)}, but a network of the chain takes none")
    return autoregressive_stack(x, maps, context)
