"""Transforms and distributions of Pyro (1.9), taken over."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, TransformedDistribution
from torch.distributions.transforms import AffineTransform, ComposeTransform, _InverseTransform

from ..flows import Flow
from ..layers import MLP, AffineCoupling, FlowBatchNorm, Inverse, MaskedAutoregressive, Permute
from ..ops import ScaleMap
from ..ops.activation import Activation, parse_activation
from .foreign import ForeignLayer, check_same, conditioner_of, freeze_like, is_of_library
from .parts import affine_layer, copied, coupling_layers, expanded, flow_of, is_relu, mlp_of


def from_pyro(module: object) -> MaskedAutoregressive | Flow:
    """The layer, or the flow, that computes what a Pyro transform or distribution computes, from copies of its parameters.

    y = x * exp(clamp(s, -5, 3)) + shift, the clamp's gradient being 1 everywhere, or with `stable` y = x * sigma + (1 - sigma) * shift,
    sigma = sigmoid(s + 2). Both directions of a layer are those of the transform. Pyro's transforms go from noise to data, so in a
    `flows.Flow`, whose layers go from data to noise, one stands as `layers.Inverse(layer)`, and its `inv` as the layer itself.

    A whole distribution may also hold permutations, `AffineCoupling`s of vectors, batch norms in evaluation mode and torch's
    `AffineTransform`s. Couplings whose hypernet is a DenseNN with ReLU run network and map in one kernel, others keep their network.

    Args:
        module: an `AffineAutoregressive` or a `ConditionalAffineAutoregressive` becomes a layer; a `TransformedDistribution` or
            `ConditionalTransformedDistribution` of vectors over independent normals becomes a `flows.Flow`.

    Raises:
        TypeError: module is none of these, or holds another transform, or one that was conditioned already.
        ValueError: the base is not independent normals of vectors, a scale is not positive, a coupling transforms fewer or more than half
            of the features, a network has skip connections or an activation that the kernels do not know, contexts differ, a batch norm
            or dropout is in training mode, or the module computes something else on rows of noise, as a subclass may.
    """
    from pyro.distributions import ConditionalTransformedDistribution
    from pyro.distributions.transforms import AffineAutoregressive, ConditionalAffineAutoregressive

    if isinstance(module, TransformedDistribution | ConditionalTransformedDistribution):
        return _flow(module)
    if not isinstance(module, AffineAutoregressive | ConditionalAffineAutoregressive):
        expected = "a Pyro AffineAutoregressive, ConditionalAffineAutoregressive or (Conditional)TransformedDistribution"
        raise TypeError(f"module must be {expected}; got {type(module).__name__}")
    try:
        layer = _layer(module)
    except (TypeError, ValueError) as error:
        raise type(error)(f"module, {type(module).__name__}, {error}") from None
    transform = lambda context: module if isinstance(module, AffineAutoregressive) else module.condition(context)

    def forward(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        of_context = transform(context)
        return (y := of_context(x)), of_context.log_abs_det_jacobian(x, y)

    def inverse(y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        of_context = transform(context)
        with _default_dtype(y.dtype):
            return (x := of_context.inv(y)), -of_context.log_abs_det_jacobian(x, y)

    check_same(layer, forward, module, inverse=None if is_of_library(module, "pyro") else inverse)
    return layer


def _flow(module: object) -> Flow:
    from pyro.distributions.conditional import ConstantConditionalDistribution

    conditional = not isinstance(module, Distribution)
    given = module.base_dist
    loc, scale = _base(given.base_dist if isinstance(given, ConstantConditionalDistribution) else given)
    transforms = [part for transform in module.transforms for part in _parts(transform, False)]
    layers: list[nn.Module] = []
    contexts: list[int] = []
    for number, (transform, inverted) in reversed(list(enumerate(transforms))):
        try:
            own = _layers(transform, loc, contexts)
        except (TypeError, ValueError) as error:
            raise type(error)(f"transform {number} of the distribution, {type(transform).__name__}, {error}") from None
        layers += own if inverted else map(_inverse, reversed(own))
    learned = (loc.requires_grad, scale.requires_grad)
    if any(learned) or loc.ne(0).any() or scale.ne(1).any():
        layers.append(affine_layer(-loc, -scale.log(), learned=learned))
    flow = flow_of(layers, len(loc), contexts, any(getattr(transform, "training", False) for transform, _ in transforms))

    of_context = lambda context: module.condition(context) if conditional else module

    def density(p: Distribution, x: Tensor, z: Tensor) -> Tensor:
        """log|det| of x to z; of unitwise transforms alone, log_prob has a number for each feature."""
        return p.log_prob(x).view(len(x), -1).sum(1) - flow.base.log_prob(z)

    def to_noise(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        p, z = of_context(context), x
        with _default_dtype(x.dtype):
            for transform in reversed(p.transforms):
                z = transform.inv(z)
            z = (z - loc) / scale
            return z, density(p, x, z)

    def to_data(z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        p, x = of_context(context), loc + z * scale
        with _default_dtype(x.dtype):
            for transform in p.transforms:
                x = transform(x)
            return x, -density(p, x, z)

    own = all(is_of_library(transform, "pyro") or type(transform) is AffineTransform for transform, _ in transforms)
    check_same(flow, to_noise, module, inverse=None if own else to_data)
    return flow


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Pyro's inverse of an autoregressive transform begins with zeros of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _base(base: object) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature."""
    normal = base
    while isinstance(normal, Independent):
        normal = normal.base_dist
    if not isinstance(normal, Normal) or normal.loc.dim() != 1:
        of = f" of {list(base.batch_shape + base.event_shape)}" if isinstance(base, Distribution) else ""
        raise ValueError(f"the base must be independent normals of a vector, Normal(loc, scale); got {base}{of}")
    return normal.loc, normal.scale


def _parts(transform: object, inverted: bool) -> Iterator[tuple[object, bool]]:
    """The transforms that one is made of, from noise to data, and whether each is inverted."""
    from pyro.distributions.conditional import (
        ConditionalComposeTransformModule,
        ConstantConditionalTransform,
        _ConditionalInverseTransformModule,
    )

    if isinstance(transform, ConstantConditionalTransform):
        yield from _parts(transform.transform, inverted)
    elif isinstance(transform, _InverseTransform | _ConditionalInverseTransformModule):
        yield from _parts(transform.inv, not inverted)
    elif isinstance(transform, ComposeTransform | ConditionalComposeTransformModule):
        parts = transform.parts if isinstance(transform, ComposeTransform) else transform.transforms
        for part in reversed(parts) if inverted else parts:
            yield from _parts(part, inverted)
    else:
        yield transform, inverted


def _layers(transform: object, row: Tensor, contexts: list[int]) -> list[nn.Module]:
    """What a transform of rows like this one becomes, in its own direction. contexts: the width of what it takes is appended, where it
    might take one."""
    from pyro.distributions import transforms as t

    if isinstance(transform, t.AffineAutoregressive | t.ConditionalAffineAutoregressive):
        layer = _layer(transform)
        contexts.append(layer.context_features)
        return [layer]
    if isinstance(transform, t.AffineCoupling | t.ConditionalAffineCoupling):
        return _coupling(transform, len(row), contexts)
    if isinstance(transform, t.Permute):
        _check_dim(transform.dim)
        return [Permute(transform.permutation)]
    if isinstance(transform, t.BatchNorm):
        return [Inverse(_batch_norm(transform))]
    if isinstance(transform, AffineTransform):
        loc, scale = expanded(transform, row)
        if not (scale > 0).all():
            raise ValueError("must have a positive scale")
        return [affine_layer(loc / scale, scale.log(), learned=(loc.requires_grad, scale.requires_grad))]
    raise TypeError("is none of the transforms that are taken over")


def _inverse(layer: nn.Module) -> nn.Module:
    return layer.layer if isinstance(layer, Inverse) else Inverse(layer)


def _layer(transform: nn.Module) -> MaskedAutoregressive:
    from pyro.distributions.transforms import ConditionalAffineAutoregressive
    from pyro.nn import ConditionalAutoRegressiveNN

    conditional = isinstance(transform, ConditionalAffineAutoregressive)
    network = transform.nn if conditional else transform.arn
    _check_unconditioned(network)
    if not isinstance(network, ConditionalAutoRegressiveNN) or network.param_dims != [1, 1]:
        raise TypeError(f"must have an AutoRegressiveNN with param_dims [1, 1]; got {network}")
    settings = transform.kwargs if conditional else vars(transform)
    if settings.get("stable", False):
        scale, form = ScaleMap.sigmoid(bias=settings.get("sigmoid_bias", 2.0)), "gate"
    else:
        scale, form = _clamped(settings), "scale_shift"
    conditioner = conditioner_of(_masked_layers(network), scale_first=False)
    layer = MaskedAutoregressive.of(conditioner, scale=scale, form=form).train(transform.training)
    freeze_like(layer, transform)
    return layer


def _clamped(settings: dict) -> ScaleMap:
    return ScaleMap.exp_clamped(settings.get("log_scale_min_clip", -5.0), settings.get("log_scale_max_clip", 3.0))


def _masked_layers(network: nn.Module) -> list[ForeignLayer]:
    if network.skip_layer is not None:
        raise ValueError("has skip connections from inputs to outputs, which no layer here has")
    activation = parse_activation(network.f)
    *hidden, last = (
        ForeignLayer(f"layers.{number}", linear.weight.detach(), linear.bias.detach(), linear.mask.bool(), activation)
        for number, linear in enumerate(network.layers)
    )
    if network.context_dim:  # it stands before the features, and all units see it
        context, own = hidden[0].weight.tensor_split([network.context_dim], dim=1)
        hidden[0] = hidden[0]._replace(weight=own, mask=hidden[0].mask[:, network.context_dim :], context_weight=context)
    order = _side_by_side(len(last.bias))
    last = last._replace(weight=last.weight[order], bias=last.bias[order], mask=last.mask[order], activation=Activation.IDENTITY)
    return [*hidden, last]


def _side_by_side(outputs: int) -> Tensor:
    """Shift and raw scale of each feature next to each other, where all shifts stood before all raw scales."""
    return torch.arange(outputs).view(2, -1).T.flatten()


def _coupling(transform: nn.Module, features: int, contexts: list[int]) -> list[nn.Module]:
    """The first split_dim features condition the others."""
    from pyro.distributions.transforms import ConditionalAffineCoupling

    settings = transform.kwargs if isinstance(transform, ConditionalAffineCoupling) else vars(transform)
    _check_dim(settings.get("dim", -1))
    _check_unconditioned(transform.nn)
    contexts.append(getattr(transform.nn, "context_dim", 0))
    own = _dense(transform.nn, transform.split_dim)
    network, scale = own or _Hypernet(copied(transform.nn)), _clamped(settings)
    transformed = torch.arange(features) >= transform.split_dim
    return coupling_layers(transformed, lambda part: AffineCoupling(network, part=part, scale=scale, interleaved=own is not None))


def _dense(hypernet: nn.Module, inputs: int) -> MLP | None:
    """A ReLU DenseNN as a `layers.MLP`; None if it is none. The context comes before the features in what it reads."""
    from pyro.nn import ConditionalDenseNN, DenseNN

    if type(hypernet) not in (DenseNN, ConditionalDenseNN) or not is_relu(hypernet.f):
        return None
    parts: list[nn.Module] = []
    for linear in hypernet.layers:
        if type(linear) is not nn.Linear:
            return None
        parts += [_Dense(linear.weight, linear.bias), hypernet.f]
    first, last = parts[0], parts[-2]
    first.weight = _like(torch.cat([first.weight[:, -inputs:], first.weight[:, :-inputs]], 1), first.weight)
    order = _side_by_side(len(last.bias))
    last.weight, last.bias = (_like(t[order], t) for t in (last.weight, last.bias))
    return mlp_of(nn.Sequential(*parts[:-1]).train(hypernet.training), inputs)


class _Dense(nn.Module):
    """The parameters of a linear layer."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias


def _like(t: Tensor, parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(t.detach(), requires_grad=parameter.requires_grad)


class _Hypernet(nn.Module):
    """A network that returns shift and raw scale apart, and takes the context by its name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.cat(self.network(x) if context is None else self.network(x, context=context), 1)


def _batch_norm(part: nn.Module) -> FlowBatchNorm:
    """From data to noise."""
    if part.training:
        raise ValueError("normalises by the batch it sees; call eval() on it before it is taken over")
    with torch.device("meta"):
        norm = FlowBatchNorm(part.input_dim, eps=part.epsilon, momentum=part.momentum)
    gain, bias = part.constrained_gamma.log(), part.beta
    norm.log_gain, norm.bias = _like(gain.clone(), part.gamma), _like(bias.clone(), bias)
    norm.running_mean, norm.running_var = part.moving_mean.clone(), part.moving_variance.clone()
    return norm.eval()


def _check_dim(dim: int) -> None:
    if dim != -1:
        raise ValueError(f"must act on the last dimension, the features; got dim={dim}")


def _check_unconditioned(network: object) -> None:
    if isinstance(network, partial):
        raise TypeError("has been conditioned; take over the distribution or transform on which condition(context) was called")
