"""What all 1x1 convolutions of a flow compute in one go: matrices, with the scale of an actnorm or without, log|det|s and inverses."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from .._wide import wide
from ..ops import lu_fold, slogdet, slogdet_inverse

if TYPE_CHECKING:
    from .invertible_conv1x1 import ActNormConv1x1, InvertibleConv1x1


class Frozen(NamedTuple):
    """What `freeze` keeps of a layer: its weight, log|det| of it, and its inverse, computed in float64."""

    weight: Tensor
    logabsdet: Tensor
    inverse: Tensor
    versions: tuple[tuple[Tensor, int], ...]  # of the parameters and buffers that this was made of


class Folded(NamedTuple):
    """What `fold` makes of actnorms and convolutions: a matrix for each, in the direction asked for, and log|det| of each, [layers]."""

    weights: Sequence[Tensor]
    logabsdets: Tensor


def fold(layers: "Sequence[ActNormConv1x1]", *, inverse: bool = False) -> Folded:
    """The matrix of each layer, W diag(exp(log_scale)) or its inverse, and log|det| of it.

    What all layers of one size need is computed in one go: a deep Glow has as many factorisations, and as many calls, as it has distinct
    sizes. An actnorm that is not initialised yet changes what its layer's matrix is.
    """
    parts = [layer._modules for layer in layers]  # without a detour: a small flow feels each
    convs, log_scales = [each["conv"] for each in parts], [each["actnorm"]._parameters["log_scale"] for each in parts]
    kept = [conv.kept() for conv in convs]
    groups: dict[tuple, list[int]] = {}
    for i, conv in enumerate(convs):
        groups.setdefault((_kind(conv), kept[i] is None), []).append(i)
    made = []
    for (_, anew), members in groups.items():
        scales = [log_scales[i] for i in members]
        if anew:
            made.append(compose([convs[i] for i in members], scales, inverse=inverse))
        else:
            made.append(_recall([kept[i] for i in members], scales, inverse=inverse))
    if len(made) == 1:
        return made[0]
    order = [i for members in groups.values() for i in members]
    weights, logabsdets = (dict(zip(order, [t for each in made for t in each[k]], strict=True)) for k in (0, 1))
    return Folded([weights[i] for i in range(len(layers))], torch.stack([logabsdets[i] for i in range(len(layers))]))


@torch.inference_mode(False)  # what is kept may be needed by a gradient later
@torch.no_grad()
def freeze_weights(layers: "Mapping[str, InvertibleConv1x1]") -> None:
    """Keep the weight of each named layer, its log|det| and its inverse: all weights of one size are inverted in one call, in float64.

    A parametrized layer keeps nothing: what its parameters are made of is for others to watch.

    Raises:
        ValueError: a weight is singular to the precision of float64; the message names the layer and its condition number.
    """
    groups: dict[tuple, list[tuple[str, InvertibleConv1x1]]] = {}
    for name, layer in layers.items():
        layer._frozen = None
        if not is_parametrized(layer):
            groups.setdefault(_kind(layer)[1:], []).append((name, layer))
    frozen: list[tuple[InvertibleConv1x1, Frozen]] = []
    for members in groups.values():
        versions = [layer._versions() for _, layer in members]  # before the weights: whoever writes meanwhile is noticed later
        weights = torch.stack([layer.weight() for _, layer in members])
        exact = wide(weights)
        _, logabsdets, inverses = slogdet_inverse(exact)
        # in the 1-norm; what is not a number is not less
        condition = torch.linalg.matrix_norm(exact, 1) * torch.linalg.matrix_norm(inverses, 1)
        regular = (condition < 1 / torch.finfo(exact.dtype).eps).tolist()
        for i, (name, layer) in enumerate(members):
            if not regular[i]:
                number = torch.linalg.cond(exact[i]).item() if exact[i].any() else torch.inf  # of a matrix of zeros torch says nan
                raise ValueError(f"{name} cannot be frozen: its weight is singular, with condition number {number:.1e}")
            logabsdet = logabsdets[i].to(torch.promote_types(weights.dtype, torch.float32))
            frozen.append((layer, Frozen(weights[i], logabsdet, inverses[i].to(weights.dtype), versions[i])))
    for layer, kept in frozen:
        layer._frozen = kept


def _kind(layer: "InvertibleConv1x1") -> tuple:
    """Layers of one kind compute together."""
    parameter = _tensor(layer, "factors" if layer.parametrization == "lu" else "plain_weight")
    return layer.parametrization, layer.channels, parameter.dtype, parameter.device


def _tensor(layer: "InvertibleConv1x1", name: str) -> Tensor:
    for own in (layer._parameters, layer._buffers):
        if name in own:
            return own[name]
    return getattr(layer, name)  # what parametrizations and pruning make


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def compose(layers: "Sequence[InvertibleConv1x1]", log_scales: Sequence[Tensor] = (), *, inverse: bool = False) -> Folded:
    """W diag(exp(log_scale)) of some layers of one kind, or its inverse, which is computed in float64, in one call."""
    if layers[0].parametrization == "lu":
        names = ("factors", "log_diagonal", "sign", "row")
        weights, logabsdets = lu_fold(*([_tensor(layer, name) for layer in layers] for name in names), log_scales, inverse=inverse)
        return Folded(weights.unbind(), logabsdets)
    weights = _stack([layer.plain_weight for layer in layers])
    if inverse:
        _, logabsdets, weights = slogdet_inverse(weights, in_float64=True)
    else:
        _, logabsdets = slogdet(weights, in_float64=True)
    return _scaled(weights, logabsdets, log_scales, inverse)


def _recall(kept: Sequence[Frozen], log_scales: Sequence[Tensor], *, inverse: bool = False) -> Folded:
    """The same from what `freeze` keeps."""
    return _scaled(_stack([k.inverse if inverse else k.weight for k in kept]), _stack([k.logabsdet for k in kept]), log_scales, inverse)


def _scaled(weights: Tensor, logabsdets: Tensor, log_scales: Sequence[Tensor], inverse: bool) -> Folded:
    """weights: of the convolutions, or their inverses. logabsdets: of the convolutions."""
    if log_scales:
        scales = _stack(log_scales)
        weights = weights * (scales.neg().exp()[:, :, None] if inverse else scales.exp()[:, None])
        logabsdets = logabsdets + scales.to(logabsdets.dtype).sum(1)
    return Folded(weights.unbind(), logabsdets.neg() if inverse else logabsdets)


def logabsdets_of(layers: "Sequence[InvertibleConv1x1]") -> Tensor:
    """log|det W| of each of some layers of one kind, [layers]: one call of `ops.slogdet` for all plain weights."""
    if layers[0].parametrization == "plain":
        return slogdet(_stack([layer.plain_weight for layer in layers]), in_float64=True)[1]
    log_diagonal = _stack([layer.log_diagonal for layer in layers])
    return log_diagonal.to(torch.promote_types(log_diagonal.dtype, torch.float32)).sum(1)
