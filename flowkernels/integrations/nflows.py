"""Transforms and flows of nflows (0.14), taken over."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..flows import Flow
from ..layers import AdditiveCoupling, AffineCoupling, FlowBatchNorm, Inverse, MaskedAutoregressive, Permute
from ..ops import ScaleMap
from ..ops.activation import Activation, parse_activation
from .foreign import check_own_methods, check_same, conditioner_of, freeze_like, is_of_library
from .made import made_layers
from .parts import affine_layer, copied, coupling_layers, flow_of


def from_nflows(module: nn.Module) -> MaskedAutoregressive | Flow:
    """The layer, or the flow, that computes what an nflows transform or flow computes, from copies of its parameters.

    z = x * (softplus(s) + 1e-3) + shift, data to noise in both libraries. The masks, plain or random, become staircases; batch norm of
    networks, in evaluation mode, becomes part of the layers around it. A whole flow may also hold permutations, batch norms, actnorms,
    affine standardisations (which stay fixed), affine and additive couplings (their networks stay what they are, and say by
    `context_features` whether they take the context) and inverses of these.

    What is shared by several transforms is a copy in each. Batch norms train on with the biased variance of a batch, where nflows' is the
    unbiased one; they and actnorms have parameters of another form, so that an optimizer takes other steps. Samples are
    [samples, contexts, features], where nflows gives [contexts, samples, features].

    Args:
        module: a `MaskedAffineAutoregressiveTransform`, or a `MADE` with two outputs a feature, as that transform has one, becomes a
            layer; a `Flow` over a `StandardNormal`, or a `CompositeTransform` or other transform by itself, becomes a `flows.Flow`.

    Raises:
        TypeError: module is none of these, or holds another transform.
        ValueError: its masks are not autoregressive, its activation is none that the kernels know, or it is in training mode with batch
            norm or dropout; the message says which module. Or its base is another one, it embeds its context, its transforms take
            different contexts, or it computes something else on rows of noise, as a subclass may.
    """
    from nflows.transforms import MaskedAffineAutoregressiveTransform, Transform
    from nflows.transforms.made import MADE

    transform = module if isinstance(module, MaskedAffineAutoregressiveTransform) else None
    if transform is None and isinstance(module, Transform):
        return _flow(module, module)
    made = module if transform is None else transform.autoregressive_net
    if not isinstance(made, MADE):
        from nflows.flows import Flow as NFlow

        if isinstance(module, NFlow):
            return _flow(module._transform, module)
        kinds = "MaskedAffineAutoregressiveTransform, MADE, CompositeTransform or Flow"
        raise TypeError(f"module must be an nflows {kinds}; got {_name(module)}")
    layer, floor = _layer(made, transform)

    def map_of_made(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raw_scale, shift = made(x, context).unflatten(1, (-1, 2)).unbind(2)
        sigma = F.softplus(raw_scale) + floor
        return x * sigma + shift, sigma.log().sum(1)

    inverse = None if transform is None or is_of_library(transform, "nflows") else transform.inverse
    check_same(layer, map_of_made if transform is None else transform, module, inverse=inverse)
    return layer


def _layer(made: nn.Module, transform: nn.Module | None) -> tuple[MaskedAutoregressive, float]:
    """The layer of a MADE, and the floor of its scale."""
    features, outputs = made.initial_layer.in_features, made.final_layer.out_features
    if outputs != 2 * features:
        raise ValueError(f"the MADE must have output_multiplier 2, scale and shift of each feature; got {outputs // features}")
    # the context meets the first layer's sum behind the activation, which in feed-forward networks then acts on both
    activation = parse_activation(made.activation)
    first = Activation.IDENTITY if made.use_residual_blocks else activation
    layers = made_layers(made, first=first, first_context=activation, gate=False)
    floor = getattr(transform, "_epsilon", 1e-3)
    layer = MaskedAutoregressive.of(conditioner_of(layers, scale_first=True), scale=ScaleMap.softplus(floor=floor))
    freeze_like(layer, made)
    return layer.train(made.training), floor


def _flow(transform: nn.Module, module: nn.Module) -> Flow:
    """The flow of a transform; module is what was given, the transform itself or a flow around it."""
    whole = module is not transform
    features = _features(transform, module)
    if whole:
        _check_flow(module, features)
    layers: list[nn.Module] = []
    contexts: list[int] = []
    for name, part in _parts(transform, ""):
        try:
            layers += _layers(part, features, contexts)
        except (TypeError, ValueError) as error:
            raise type(error)(f"transform {name or '0'}, {_name(part)}, {error}") from None
    flow = flow_of(layers, features, contexts, module.training)
    inverse = None if all(is_of_library(part, "nflows") for _, part in _parts(transform, "")) else transform.inverse
    check_same(flow, transform, module, inverse=inverse, log_prob=module.log_prob if whole else None)
    return flow


def _parts(transform: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The transforms that a composite one holds, by their numbers in it."""
    from nflows.transforms import CompositeTransform

    if not isinstance(transform, CompositeTransform):
        return [(name, transform)]
    return [part for i, inner in enumerate(transform._transforms) for part in _parts(inner, f"{name}.{i}" if name else str(i))]


def _layers(part: nn.Module, features: int, contexts: list[int]) -> list[nn.Module]:
    """What a transform becomes. contexts: the width of what it takes is appended, where it might take one."""
    from nflows import transforms as t

    if isinstance(part, t.MaskedAffineAutoregressiveTransform):
        layer, _ = _layer(part.autoregressive_net, part)
        contexts.append(layer.context_features)
        return [layer]
    if isinstance(part, t.Permutation):
        if part._dim != 1:
            raise ValueError(f"must permute dimension 1, the features; got dim={part._dim}")
        return [Permute(part._permutation)]
    if isinstance(part, t.BatchNorm):
        return [_batch_norm(part)]
    if isinstance(part, t.ActNorm):
        if not part.initialized:
            raise ValueError("has not been initialised: give it a batch in training mode before it is taken over")
        return [affine_layer(part.shift / part.scale, part.log_scale, learned=(part.shift.requires_grad, part.log_scale.requires_grad))]
    if isinstance(part, t.PointwiseAffineTransform):
        shift, scale = (value.expand(features) for value in (part._shift, part._scale))
        return [affine_layer(shift / scale, scale.log(), learned=(False, False))]
    if isinstance(part, t.InverseTransform):
        inner = [layer for _, own in _parts(part._transform, "") for layer in _layers(own, features, contexts)]
        return [Inverse(layer) for layer in reversed(inner)]
    if isinstance(part, t.AffineCouplingTransform) and part.unconditional_transform is None:
        contexts.append(getattr(part.transform_net, "context_features", None) or 0)
        mask = torch.zeros(part.features, dtype=torch.bool, device=part.transform_features.device)
        mask[part.transform_features] = True
        return coupling_layers(mask, _coupling(part))
    raise TypeError("is none of the transforms that are taken over")


def _coupling(part: nn.Module) -> Callable[[str], nn.Module]:
    from nflows.transforms import AdditiveCouplingTransform

    network = copied(part.transform_net)
    if isinstance(part, AdditiveCouplingTransform):
        return lambda name: AdditiveCoupling(network, part=name)
    return lambda name: AffineCoupling(network, part=name, scale=ScaleMap.sigmoid(bias=2.0, floor=1e-3))


def _batch_norm(part: nn.Module) -> FlowBatchNorm:
    if part.training:
        raise ValueError("normalises by the batch it sees; call eval() on the flow before it is taken over")
    with torch.device("meta"):
        norm = FlowBatchNorm(len(part.bias), eps=part.eps, momentum=part.momentum)
    norm.log_gain, norm.bias = (nn.Parameter(t.detach().clone()) for t in (part.weight.log(), part.bias))
    norm.running_mean, norm.running_var = part.running_mean.clone(), part.running_var.clone()
    return norm.eval()


def _features(transform: nn.Module, module: nn.Module) -> int:
    """How many features the first of its parts that says so takes, or else the base of the flow around it."""
    for _, part in _parts(transform, ""):
        part = getattr(part, "_transform", part)  # of an inverse
        if (count := getattr(part, "features", None)) is not None:
            return count
        for name in ("_permutation", "bias", "log_scale"):
            if (t := getattr(part, name, None)) is not None:
                return len(t)
    shape = getattr(getattr(module, "_distribution", None), "_shape", ())
    if len(shape) == 1:
        return shape[0]
    raise ValueError(f"module must hold a transform that knows how many features there are; got {_name(transform)}")


def _check_flow(flow: nn.Module, features: int) -> None:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow as NFlow

    check_own_methods(flow, NFlow, ("_sample", "sample", "sample_and_log_prob"))
    base, embedding = flow._distribution, flow._embedding_net
    if type(base) is not StandardNormal or tuple(base._shape) != (features,):
        shape = f" of {list(base._shape)}" if hasattr(base, "_shape") else ""
        raise ValueError(f"the flow's distribution must be a StandardNormal of [{features}]; got {_name(base)}{shape}")
    if type(embedding) is not nn.Identity:
        remedy = "take over flow._transform, and give it embedded contexts"
        raise ValueError(f"the flow's embedding_net must be the identity; got {_name(embedding)}: {remedy}")


def _name(module: object) -> str:
    return type(module).__name__
