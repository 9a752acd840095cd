"""Layers and models of normflows (1.7), taken over."""

import torch
from torch import Tensor, nn

from ..flows import Flow
from ..layers import MLP, AdditiveCoupling, AffineCoupling, Inverse, MaskedAutoregressive, Permute
from ..ops import ScaleMap
from ..ops.activation import Activation
from .foreign import check_own_methods, check_same, conditioner_of, freeze_like, is_of_library
from .made import made_layers
from .parts import affine_layer, copied, coupling_layers, flow_of, mlp_of


def from_normflows(module: nn.Module) -> MaskedAutoregressive | Flow:
    """The layer, or the flow, that computes what a normflows flow or model computes, from copies of its parameters.

    z = x * (sigmoid(s + 2) + 1e-3) + shift. Both directions of a layer are those of the module: normflows' own models use its forward
    direction from noise to data, so in a `flows.Flow`, whose layers go from data to noise, it stands as `layers.Inverse(layer)`.

    A whole model may also hold permutations, initialised actnorms and `AffineCouplingBlock`s by channels; those whose network is normflows'
    MLP with ReLU run network and map in one kernel, others keep theirs. Mean and scale of its base become a layer over a standard normal
    one. What is shared by several flows is a copy in each. `flow.sample(n, context)` gives n samples of each context, where normflows
    gives one of each; `model(z)` is `flow.inverse(z)`.

    Args:
        module: a `MaskedAffineAutoregressive`, or a `MADE` with two outputs a feature, as that flow has one, becomes a layer; a
            `NormalizingFlow` or `ConditionalNormalizingFlow` of vectors over a `DiagGaussian` becomes a `flows.Flow`.

    Raises:
        TypeError: module is none of these, or holds another flow.
        ValueError: its masks are not autoregressive, its activation is none that the kernels know, it preprocesses its inputs, or it is
            in training mode with batch norm or dropout; the message says which module. Or its base is another one, or it computes
            something else on rows of noise, as a subclass may.
    """
    from normflows import NormalizingFlow
    from normflows.flows import MaskedAffineAutoregressive
    from normflows.nets.made import MADE

    if isinstance(module, NormalizingFlow):
        return _flow(module)
    made = module.autoregressive_net if isinstance(module, MaskedAffineAutoregressive) else module
    if not isinstance(made, MADE):
        raise TypeError(f"module must be a normflows MaskedAffineAutoregressive, MADE or NormalizingFlow; got {type(module).__name__}")
    layer = _layer(made)

    def map_of_made(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raw_scale, shift = made(x, context).unflatten(1, (-1, 2)).unbind(2)
        sigma = (raw_scale + 2).sigmoid() + 1e-3
        return x * sigma + shift, sigma.log().sum(1)

    inverse = None if made is module or is_of_library(module, "normflows") else module.inverse
    check_same(layer, map_of_made if made is module else module, module, inverse=inverse)
    return layer


def _layer(made: nn.Module) -> MaskedAutoregressive:
    features, outputs = made.initial_layer.in_features, made.final_layer.out_features
    if outputs != 2 * features:
        raise ValueError(f"the MADE must have output_multiplier 2, scale and shift of each feature; got {outputs // features}")
    if not isinstance(made.preprocessing, nn.Identity):
        raise ValueError(f"preprocessing must be None; got {made.preprocessing}. Put it into a layer of its own before this one")
    layers = made_layers(made, first=Activation.IDENTITY, first_context=Activation.IDENTITY, gate=True)
    scale = ScaleMap.sigmoid(bias=2.0, floor=1e-3)
    layer = MaskedAutoregressive.of(conditioner_of(layers, scale_first=True), scale=scale).train(made.training)
    freeze_like(layer, made)
    return layer


def _flow(model: nn.Module) -> Flow:
    from normflows import ConditionalNormalizingFlow, NormalizingFlow

    conditional = isinstance(model, ConditionalNormalizingFlow)
    check_own_methods(model, ConditionalNormalizingFlow if conditional else NormalizingFlow, ("sample",))
    base = _base(model.q0)
    layers: list[nn.Module] = []
    contexts: list[int] = []
    for number, part in reversed(list(enumerate(model.flows))):
        try:
            layers += _layers(part, len(base.bias), contexts)
        except (TypeError, ValueError) as error:
            raise type(error)(f"flow {number} of the model, {type(part).__name__}, {error}") from None
    flow = flow_of([*layers, base], len(base.bias), contexts, model.training)

    def to_noise(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        given = (context,) if conditional else ()
        z = (model.inverse(x, *given) - model.q0.loc) * (-model.q0.log_scale).exp()
        return z, model.log_prob(x, *given) - flow.base.log_prob(z)  # inverse_and_log_det adds up in float32

    def to_data(z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        given = (context,) if conditional else ()
        x, total = model.q0.loc + z * model.q0.log_scale.exp(), model.q0.log_scale.sum()
        for part in model.flows:  # forward_and_log_det adds up in float32
            x, logabsdet = part(x, *given)
            total = total + logabsdet
        return x, total

    own = all(is_of_library(part, "normflows") for outer in model.flows for part in (outer, *getattr(outer, "flows", ())))
    check_same(flow, to_noise, model, inverse=None if own else to_data)
    return flow


def _base(base: nn.Module) -> nn.Module:
    """What takes the base's samples to those of a standard normal."""
    from normflows.distributions import DiagGaussian

    if type(base) is not DiagGaussian or base.temperature is not None or len(base.shape) != 1:
        shape = f" of shape {base.shape}, temperature {base.temperature}" if type(base) is DiagGaussian else ""
        raise ValueError(f"q0 must be a DiagGaussian of vectors without temperature; got {type(base).__name__}{shape}")
    return affine_layer(-base.loc[0], -base.log_scale[0], learned=(base.loc.requires_grad, base.log_scale.requires_grad))


def _layers(part: nn.Module, features: int, contexts: list[int]) -> list[nn.Module]:
    """What a flow becomes, from data to noise. contexts: the width of what it takes is appended, where it might take one."""
    from normflows import flows

    if isinstance(part, flows.MaskedAffineAutoregressive):
        layer = _layer(part.autoregressive_net)
        contexts.append(layer.context_features)
        return [Inverse(layer)]
    if isinstance(part, flows.Permute):
        return [Permute(_permutation(part))]
    if isinstance(part, flows.ActNorm):
        if not part.data_dep_init_done:
            raise ValueError("has not been initialised: give the model a batch before it is taken over")
        log_scale, shift = part.s.flatten(), part.t.flatten()
        return [affine_layer(-shift, -log_scale, learned=(part.t.requires_grad, part.s.requires_grad))]
    if isinstance(part, flows.AffineCouplingBlock):
        contexts.append(0)
        return _coupling(part, features)
    raise TypeError("is none of the flows that are taken over")


def _permutation(part: nn.Module) -> Tensor:
    """From data to noise: z[:, k] = x[:, permutation[k]]."""
    if part.mode == "shuffle":
        return part.inv_perm
    first = torch.arange(part.num_channels).split([(part.num_channels + 1) // 2, part.num_channels // 2])
    return torch.cat(first[::-1])


def _coupling(part: nn.Module, features: int) -> list[nn.Module]:
    """The first half, the larger one of an odd number of features, conditions the second; shift and raw scale stand side by side."""
    split, coupling, _ = part.flows
    if split.mode not in ("channel", "channel_inv"):
        raise ValueError(f"split_mode must be 'channel' or 'channel_inv'; got {split.mode!r}")
    transformed = torch.arange(features) < (features + 1) // 2
    transformed = transformed if split.mode == "channel_inv" else ~transformed
    network = _network(coupling.param_map, features - int(transformed.sum()))
    if not coupling.scale:
        make = lambda name: Inverse(AdditiveCoupling(network, part=name))
    elif coupling.scale_map == "exp":
        make = lambda name: Inverse(AffineCoupling(network, part=name, scale=ScaleMap.exp(), interleaved=True))
    elif coupling.scale_map == "sigmoid_inv":
        make = lambda name: Inverse(AffineCoupling(network, part=name, scale=ScaleMap.sigmoid(bias=2.0), interleaved=True))
    elif coupling.scale_map == "sigmoid" and isinstance(network, MLP):  # z = (x - shift) * sigma
        with torch.no_grad():
            last = network.layers[-1]
            last.weight[:, 0::2].neg_()
            last.bias[0::2].neg_()
        make = lambda name: AffineCoupling(network, part=name, scale=ScaleMap.sigmoid(bias=2.0), form="shift_scale", interleaved=True)
    else:
        raise ValueError(f"scale_map must be 'exp' or 'sigmoid_inv', or 'sigmoid' with a ReLU MLP; got {coupling.scale_map!r}")
    return coupling_layers(transformed, make)


def _network(network: nn.Module, inputs: int) -> nn.Module:
    from normflows.nets import MLP as TheirMLP

    own = mlp_of(network.net, inputs) if type(network) is TheirMLP else None
    return copied(network) if own is None else own
