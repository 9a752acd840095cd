"""Runs of autoregressive layers, with the permutations and normalisations between them, as one call of `ops.autoregressive_stack`."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..ops import Map, autoregressive_stack
from .batch_norm import FlowBatchNorm
from .inverse import Inverse
from .masked_autoregressive import MaskedAutoregressive
from .permute import Permute


def run(layers: Iterable[nn.Module], x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Apply layers in the order given, all forward or all inverse: the result, and the sum of their log|det|s."""
    total = None
    for group in _groups(layers, inverse):
        if len(group) == 1:
            x, logabsdet = (group[0].inverse if inverse else group[0])(x, context)
        else:
            x, logabsdet = _run_stack(group, x, context, inverse)
        total = logabsdet if total is None else total + logabsdet
    return x, total


def _groups(layers: Iterable[nn.Module], inverse: bool) -> list[list[nn.Module]]:
    """Layers that run together. Each group but those of one layer begins and ends with an autoregressive one."""
    groups: list[list[nn.Module]] = []
    gap: list[nn.Module] = []  # what has come since the last autoregressive layer, if it may stand between two of them
    open_ = False
    for layer in layers:
        if _is_autoregressive(layer):
            if open_:
                groups[-1] += [*gap, layer]
            else:
                groups.append([layer])
            gap, open_ = [], True
        elif open_ and _may_stand_between(layer, gap, inverse):
            gap.append(layer)
        else:
            groups += [[each] for each in (*gap, layer)]
            gap, open_ = [], False
    return groups + [[each] for each in gap]


def _is_autoregressive(layer: nn.Module) -> bool:
    while _is_plain(layer, Inverse):
        layer = layer.layer
    return _is_plain(layer, MaskedAutoregressive)


def _may_stand_between(layer: nn.Module, gap: Sequence[nn.Module], inverse: bool) -> bool:
    if _is_plain(layer, FlowBatchNorm):
        return (inverse or not layer.training) and not any(isinstance(other, FlowBatchNorm) for other in gap)
    return _is_plain(layer, Permute)


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the layer does what its class says, and nothing more: neither a subclass nor hooks."""
    return type(layer) is kind and not layer._forward_hooks and not layer._forward_pre_hooks


def _run_stack(group: Sequence[nn.Module], x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    maps: list[Map] = []
    affine = None
    permutation = None  # column k of what a layer is given is column permutation[k] of what goes through the op
    constant = None  # log|det| of the normalisations
    for layer in group:
        if isinstance(layer, Permute):
            step = torch.argsort(layer.permutation) if inverse else layer.permutation
            permutation = step if permutation is None else permutation[step]
        elif isinstance(layer, FlowBatchNorm):
            affine, log_scale = layer.evaluation_affine(inverse=inverse)
            affine = affine if permutation is None else affine[:, torch.argsort(permutation)]
            constant = log_scale.sum() if constant is None else constant + log_scale.sum()
        else:
            backwards = inverse
            while isinstance(layer, Inverse):
                layer, backwards = layer.layer, not backwards
            network = layer.conditioner()
            if permutation is not None:
                network = network._replace(order=permutation[network.order])
            maps.append(Map(network, layer.scale, layer.form, backwards, affine))
            affine = None
    y, logabsdet = autoregressive_stack(x, maps, context)
    if permutation is not None:
        y = y[:, permutation]
    return y, logabsdet if constant is None else logabsdet + constant.to(logabsdet.dtype)
