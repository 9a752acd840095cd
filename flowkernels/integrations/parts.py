"""What whole flows of other libraries are made of, besides masked networks."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..flows import Flow
from ..layers import MLP, ActNorm, FlowBatchNorm, Permute
from ..ops import Part
from .foreign import check_batch_norm, check_dropout


class ContextAppended(nn.Module):
    """A network that takes the context as more features of its input: network([x, context])."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.network(x if context is None else torch.cat([x, context], 1))


def flow_of(layers: Sequence[nn.Module], features: int, contexts: Sequence[int], training: bool) -> Flow:
    """Layers, from data to noise, over a standard normal base. contexts: width of what each of them takes, of those that might take one.

    Raises:
        ValueError: they do not all take the same context.
    """
    if len(set(contexts)) > 1:
        raise ValueError(f"all transforms must take the same context; theirs have {list(contexts)} features")
    flow = Flow(layers, features, context_features=contexts[0] if contexts else 0)
    for module in flow.modules():
        own = type(module).__module__.startswith(__package__.split(".")[0])
        if own and not isinstance(module, FlowBatchNorm):  # they, and networks that were copied, stay in their mode
            module.training = training
    return flow.to(next(flow.parameters(), torch.empty(0)).device)  # permutations are made on the CPU


def coupling_layers(transformed: Tensor, coupling: Callable[[str], nn.Module]) -> list[nn.Module]:
    """A coupling of these features, [features], between permutations where no part of x has them all.

    coupling: makes the layer that transforms a part of that name; its conditioner sees the others in their order.

    Raises:
        ValueError: fewer or more than half of the features are transformed, which no part has.
    """
    mask = transformed.cpu()
    features, count = len(mask), int(mask.sum())
    parts = [part for part in Part if not part.is_checkerboard and part.count(features) == count and 0 < count < features]
    if not parts:
        halves = " or ".join(map(str, sorted({features // 2, features - features // 2})))
        raise ValueError(f"must transform half of the features, {halves} of {features}; it transforms {count}")
    index = torch.arange(features)
    for part in parts:
        if mask[part.transformed(index[None])[0]].all():
            return [coupling(part.name.lower())]
    part, order = parts[0], torch.empty_like(index)
    order[part.transformed(index[None])[0]] = index[mask]
    order[part.untouched(index[None])[0]] = index[~mask]
    return [Permute(order), coupling(part.name.lower()), Permute(order.argsort())]


def mlp_of(network: nn.Sequential, inputs: int) -> MLP | None:
    """A ReLU network as a `layers.MLP`, which runs inside the kernels; None if it is none. Features beyond the inputs are a context."""
    linears, relus = list(network)[0::2], list(network)[1::2]
    if not relus or len(relus) != len(linears) - 1 or not all(map(is_relu, relus)):
        return None
    weights, biases = ([getattr(linear, name, None) for linear in linears] for name in ("weight", "bias"))
    if not all(isinstance(t, Tensor) and t.dim() == dim for part, dim in ((weights, 2), (biases, 1)) for t in part):
        return None
    widths = [w.shape[0] for w in weights]
    with torch.device("meta"):
        mlp = MLP(inputs, widths[:-1], widths[-1], context_features=weights[0].shape[1] - inputs)
    copy_of = lambda t, like: nn.Parameter(t.detach().clone(memory_format=torch.contiguous_format), requires_grad=like.requires_grad)
    for dense, weight, bias in zip(mlp.layers, weights, biases, strict=True):
        own, context = weight.T.tensor_split([len(dense.weight)])
        dense.weight, dense.bias = copy_of(own, weight), copy_of(bias, bias)
        if dense.context_weight is not None:
            dense.context_weight = copy_of(context, weight)
    return mlp.train(network.training)


def is_relu(module: nn.Module) -> bool:
    return type(module) is nn.ReLU or (type(module) is nn.LeakyReLU and module.negative_slope == 0)


def copied(network: nn.Module) -> nn.Module:
    """The network itself, with parameters of its own.

    Raises:
        ValueError: it normalises by its batch or drops units, as networks in training mode do, or it cannot be copied.
    """
    for name, module in network.named_modules():
        place = f"{type(network).__name__}.{name}" if name else type(network).__name__
        if isinstance(module, _BatchNorm):
            check_batch_norm(module, place)
        if isinstance(module, _DropoutNd):
            check_dropout(module, place)
    try:
        return copy.deepcopy(network)
    except RuntimeError as error:
        raise ValueError(f"{type(network).__name__} cannot be copied: {error}") from None


def expanded(affine: AffineTransform, row: Tensor) -> tuple[Tensor, Tensor]:
    """Its loc and scale for each feature of a row; numbers among them become the row's dtype, on its device."""
    values = (value if isinstance(value, Tensor) else row.new_tensor(value) for value in (affine.loc, affine.scale))
    loc, scale = (value.expand(row.shape) for value in values)
    return loc, scale


def affine_layer(bias: Tensor, log_scale: Tensor, *, learned: tuple[bool, bool]) -> ActNorm:
    """z = (x + bias) * exp(log_scale) of each feature. learned: whether bias is, and log_scale."""
    with torch.device("meta"):
        layer = ActNorm(len(bias))
    layer.bias, layer.log_scale = (
        nn.Parameter(t.detach().clone(), requires_grad=own) for t, own in zip((bias, log_scale), learned, strict=True)
    )
    layer.initialised = torch.tensor(True, device=bias.device)
    return layer
