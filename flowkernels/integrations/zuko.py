"""Transformations and flows of zuko (1.6), taken over."""

import functools

import torch
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

from ..flows import Flow
from ..layers import ActNorm, AffineCoupling, MaskedAutoregressive
from ..ops import ScaleMap
from ..ops.activation import parse_activation
from .foreign import ForeignLayer, check_same, conditioner_of, freeze_like, is_of_library
from .parts import ContextAppended, affine_layer, copied, coupling_layers, expanded, flow_of, mlp_of


def from_zuko(module: nn.Module) -> MaskedAutoregressive | Flow:
    """The layer, or the flow, that computes what a zuko transformation or flow computes, from copies of its parameters.

    z = x * exp(s / (1 + |s / log slope|)) + shift, data to noise in both libraries. Orders, passes and adjacencies are read from the
    masks: any nested adjacency becomes an order of degrees.

    Couplings of ReLU networks run network and map in one kernel.

    Args:
        module: a `MaskedAutoregressiveTransform` becomes a layer; a `MAF`, `NICE`, `RealNVP` or other `Flow` made of such transforms and
            of `GeneralCouplingTransform`s, and of `UnconditionalTransform`s of torch's `AffineTransform`, as standardise data, over a
            standard normal base, becomes a `flows.Flow`.

    Raises:
        TypeError: module is none of these, or holds another transformation.
        ValueError: an adjacency is not nested (the message says which output sees which input), the context does not reach all units, the
            univariate transformation is not affine, a standard deviation is not positive, the base is not standard normal, an activation
            of a masked network is none that the kernels know, a coupling transforms fewer or more than half of the features, or the
            module computes something else on rows of noise, as a subclass may.
    """
    from zuko.flows import Flow as ZukoFlow
    from zuko.flows import MaskedAutoregressiveTransform, UnconditionalTransform
    from zuko.flows.coupling import GeneralCouplingTransform

    if isinstance(module, MaskedAutoregressiveTransform):
        layer = _layer(module)
        inverse = None if is_of_library(module, "zuko") else lambda z, context: module(context).inv.call_and_ladj(z)
        check_same(layer, lambda x, context: module(context).call_and_ladj(x), module, inverse=inverse)
        return layer
    if not isinstance(module, ZukoFlow):
        raise TypeError(f"module must be a zuko MaskedAutoregressiveTransform or Flow; got {type(module).__name__}")
    transforms = list(getattr(module.transform, "transforms", [module.transform]))
    if not transforms:
        raise ValueError("module must have at least one transform; got none")
    row = _row(module.base)
    features = len(row)
    layers: list[nn.Module] = []
    sizes: list[tuple[int, int]] = []  # features and context features of each
    for number, transform in enumerate(transforms):
        if isinstance(transform, MaskedAutoregressiveTransform):
            layer = _layer(transform)
            layers.append(layer)
            sizes.append((layer.features, layer.context_features))
        elif isinstance(transform, GeneralCouplingTransform):
            layers += _coupling(transform)
            sizes.append((len(transform.mask), transform.hyper.in_features - int(transform.mask.sum())))
        elif isinstance(transform, UnconditionalTransform) and transform.f is AffineTransform:
            layers.append(_standardisation(transform, row))
        else:
            raise TypeError(
                f"transform {number} of the flow must be a MaskedAutoregressiveTransform, a GeneralCouplingTransform or an "
                f"UnconditionalTransform(AffineTransform, ...); got {type(transform).__name__}"
            )
    if others := {size for size, _ in sizes if size != features}:
        raise ValueError(f"base must be a standard normal, DiagNormal(0, 1), of {others.pop()} features; got {module.base}")
    flow = flow_of(layers, features, [context for _, context in sizes], module.training)
    own = all(is_of_library(part, "zuko") for part in transforms)
    inverse = None if own else lambda z, context: module(context).transform.inv.call_and_ladj(z)
    log_prob = lambda x, context: module(context).log_prob(x)
    check_same(flow, lambda x, context: module(context).transform.call_and_ladj(x), module, inverse=inverse, log_prob=log_prob)
    return flow


def _coupling(transform: nn.Module) -> list[nn.Module]:
    """Shift and raw scale of each feature stand side by side."""
    scale, hyper = _scale(transform), transform.hyper
    network = mlp_of(hyper, int(transform.mask.sum())) or ContextAppended(copied(hyper))
    return coupling_layers(~transform.mask, lambda part: AffineCoupling(network, part=part, scale=scale, interleaved=True))


def _layer(transform: nn.Module) -> MaskedAutoregressive:
    scale = _scale(transform)
    layers = _layers(transform.hyper, transform.hyper.out_features // 2)
    layer = MaskedAutoregressive.of(conditioner_of(layers, scale_first=False), scale=scale).train(transform.training)
    freeze_like(layer, transform)
    return layer


def _scale(transform: nn.Module) -> ScaleMap:
    from zuko.transforms import MonotonicAffineTransform

    univariate, settings = transform.univariate, {}
    if isinstance(univariate, functools.partial) and not univariate.args:
        univariate, settings = univariate.func, univariate.keywords
    if univariate is not MonotonicAffineTransform or not settings.keys() <= {"slope"}:
        raise ValueError(f"univariate must be MonotonicAffineTransform; got {transform.univariate}")
    return ScaleMap.softclip(**settings)


def _layers(hyper: nn.Sequential, features: int) -> list[ForeignLayer]:
    from zuko.nn import MaskedLinear, Residual

    layers: list[ForeignLayer] = []
    for name, part in hyper.named_children():
        if isinstance(part, MaskedLinear):
            layers.append(_linear(name, part))
        elif isinstance(part, Residual):
            stream, (first, activation, second) = len(layers), part
            layers.append(_linear(f"{name}.0", first, activation=parse_activation(activation)))
            layers.append(_linear(f"{name}.2", second, residual=stream))
        else:
            layers[-1] = layers[-1]._replace(activation=parse_activation(part))
    return [_without_context(layers[0], features), *layers[1:]]


def _linear(name: str, linear: nn.Module, **more) -> ForeignLayer:
    return ForeignLayer(f"hyper.{name}", linear.weight.detach(), linear.bias.detach(), linear.mask.bool(), **more)


def _without_context(first: ForeignLayer, features: int) -> ForeignLayer:
    """zuko appends the context to the features; here it has a weight of its own."""
    if first.mask.shape[1] == features:
        return first
    unseen = (~first.mask[:, features:]).nonzero().tolist()
    if unseen:
        unit, column = unseen[0]
        raise ValueError(f"every unit must see the whole context; in {first.name}, output {unit} does not see context feature {column}")
    own, context = first.weight.split([features, first.mask.shape[1] - features], dim=1)
    return first._replace(weight=own, mask=first.mask[:, :features], context_weight=context)


def _standardisation(transform: nn.Module, row: Tensor) -> ActNorm:
    loc, scale = expanded(transform(), row)
    if not (scale > 0).all():
        raise ValueError(f"an UnconditionalTransform(AffineTransform, ...) must have a positive scale; got {scale.tolist()}")
    return affine_layer(loc / scale, scale.log(), learned=(loc.requires_grad, scale.requires_grad))


def _row(base: nn.Module) -> Tensor:
    """As many numbers as there are features.

    Raises:
        ValueError: the base is not a standard normal.
    """
    from zuko.distributions import DiagNormal

    normal = getattr(base, "f", None) is DiagNormal and base().base_dist
    if not normal or normal.loc.dim() != 1 or normal.loc.ne(0).any() or normal.scale.ne(torch.ones(())).any():
        raise ValueError(f"base must be a standard normal, DiagNormal(0, 1), of a vector; got {base}")
    return normal.loc
