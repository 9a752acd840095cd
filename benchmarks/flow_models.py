"""Coupling flows with the same conditioners in every library, and as a user would write them in plain PyTorch."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels import ScaleMap
from flowkernels.flows import NICE, Flow, RealNVP
from flowkernels.flows.networks import ResNet
from flowkernels.layers import MLP, AdditiveCoupling, AffineCoupling, Chain, DiagonalScale, FlowBatchNorm

from .case import Unavailable, compiled
from .peers import PyroTransforms

OURS, EAGER, COMPILED = "flowkernels", "eager", "torch.compile"
SIGMOID = ScaleMap.sigmoid(bias=2.0, floor=1e-3)  # nflows' scale map


@dataclass
class Model:
    """A flow of any library.

    to_noise(module, x) -> (z, logabsdet); to_data(module, z) -> x.
    """

    module: nn.Module
    to_noise: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    to_data: Callable[[nn.Module, Tensor], Tensor]

    def loss(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood under standard normal noise: the same for everybody."""
        z, logabsdet = self.to_noise(self.module, x)
        return (0.5 * z.square().flatten(1).sum(1) - logabsdet).mean() + 0.5 * math.log(2 * math.pi) * x[0].numel()

    def double(self) -> "Model":
        return Model(copy.deepcopy(self.module).double(), self.to_noise, self.to_data)


class CompiledModel(Model):
    """The same by torch.compile."""

    def __init__(self, plain: Model) -> None:
        super().__init__(plain.module, compiled(plain.to_noise), compiled(plain.to_data))
        self.plain = plain

    def double(self) -> Model:
        return self.plain.double()


def ours(flow: Chain) -> Model:
    return Model(flow, lambda module, x: module(x), lambda module, z: module.inverse(z)[0])


def eager(flow: Chain) -> Model:
    """The same flow with its layers in plain PyTorch and plain autograd."""
    flow = copy.deepcopy(flow)
    for layer in flow.modules():
        layer.__class__ = _EAGER.get(type(layer), type(layer))
        if isinstance(getattr(layer, "conditioner", None), MLP):
            layer.conditioner = _in_plain_pytorch(layer.conditioner, interleaved=getattr(layer, "interleaved", False))
    return ours(flow)


def _in_plain_pytorch(network: MLP, interleaved: bool) -> nn.Sequential:
    """The same network of torch's layers; shifts come before raw scales, a memory order that suits eager ops."""
    layers = network.layers
    plain = mlp(layers[0].weight.shape[0], [len(layer.bias) for layer in layers[:-1]], len(layers[-1].bias))
    blocked = torch.arange(len(layers[-1].bias))
    blocked = torch.cat([blocked[0::2], blocked[1::2]]) if interleaved else blocked
    with torch.no_grad():
        for number, (old, new) in enumerate(zip(layers, plain[::2], strict=True)):
            columns = blocked if number + 1 == len(layers) else slice(None)
            new.weight.copy_(old.weight[:, columns].T)
            new.bias.copy_(old.bias[columns])
    return plain


def mlp(features: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """The network as one writes it in plain PyTorch."""
    widths = [features, *hidden]
    parts = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU(inplace=True))]
    return nn.Sequential(*parts, nn.Linear(widths[-1], outputs))


def nice(features: int, couplings: int, hidden: tuple[int, ...]) -> dict[str, Callable[[], Model]]:
    """Additive couplings that alternate; ours, and the eager ones, have NICE's diagonal scale besides."""

    def flow() -> Flow:
        torch.manual_seed(0)
        return NICE(features, couplings=couplings, hidden_features=hidden)

    nets = [(features - features // 2, features // 2), (features // 2, features - features // 2)]
    return {
        OURS: lambda: ours(flow()),
        EAGER: lambda: eager(flow()),
        "nflows": lambda: _nflows("AdditiveCouplingTransform", _alternating(features, couplings), lambda i, o: _PeerMLP(i, hidden, o)),
        "normflows": lambda: _normflows(couplings, lambda k: mlp(nets[k % 2][0], hidden, nets[k % 2][1]), scale=False),
    }


def realnvp(features: int, transforms: int, hidden: tuple[int, ...]) -> dict[str, Callable[[], Model]]:
    """Affine couplings that alternate, without batch norm, each with its library's usual scale map."""

    def flow() -> Flow:
        torch.manual_seed(0)
        return RealNVP(features, transforms=transforms, hidden_features=hidden, batch_norm=False)

    half = features // 2
    if features % 2:
        raise ValueError(f"features must be even, so that all libraries split alike; got {features}")
    return {
        OURS: lambda: ours(flow()),
        EAGER: lambda: eager(flow()),
        "nflows": lambda: _nflows("AffineCouplingTransform", _alternating(features, transforms), lambda i, o: _PeerMLP(i, hidden, o)),
        "normflows": lambda: _normflows(transforms, lambda k: mlp(half, hidden, 2 * half), scale=True),
        "zuko": lambda: _zuko(features, transforms, hidden),
        "pyro": lambda: _pyro(features, transforms, hidden),
    }


class _PeerMLP(nn.Module):
    """The same, called with a context that may be None, as nflows does."""

    def __init__(self, features: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.net = mlp(features, hidden, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


def image_realnvp(shape: tuple[int, int, int], **settings: int) -> dict[str, Callable[[], Model]]:
    """The multi-scale model of images."""

    def flow() -> Flow:
        torch.manual_seed(0)
        return RealNVP(shape, **settings)

    return {OURS: lambda: ours(flow()), EAGER: lambda: eager(flow())}


def channel_couplings(channels: int, couplings: int, hidden_channels: int, blocks: int) -> dict[str, Callable[[], Model]]:
    """Affine couplings over the channels of an image: what RealNVP's scales and nflows' couplings have in common."""
    net = lambda inputs, outputs: ResNet(inputs, hidden_channels, outputs, blocks)

    def flow() -> Chain:
        torch.manual_seed(0)
        half = channels // 2
        parts = ["first_half" if i % 2 else "second_half" for i in range(couplings)]
        return Chain([AffineCoupling(net(half, 2 * half), part=part, scale=SIGMOID) for part in parts])

    masks = [[float((k < channels // 2) == bool(i % 2)) for k in range(channels)] for i in range(couplings)]
    return {OURS: lambda: ours(flow()), "nflows": lambda: _nflows("AffineCouplingTransform", masks, net)}


class EagerAdditive(AdditiveCoupling):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._add(x, context, 1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._add(z, context, -1)

    def _add(self, x: Tensor, context: Tensor | None, sign: int) -> tuple[Tensor, Tensor]:
        part = self.part
        untouched = part.untouched(x)
        shift = self.conditioner(untouched) if context is None else self.conditioner(untouched, context)
        return _merge(part, x, part.transformed(x) + sign * shift, untouched), x.new_zeros(len(x))


class EagerAffine(AffineCoupling):
    """scale_shift with exp(a * tanh(s)), as RealNVP has it."""

    def _apply_map(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.part.is_checkerboard:
            if not hasattr(self, "mask"):
                self.mask = self.part.mask(x).to(x.dtype)  # once
            untouched = x * (1 - self.mask)
        else:
            untouched = self.part.untouched(x)
        out = self.conditioner(untouched) if context is None else self.conditioner(untouched, context)
        shift, s = out.chunk(2, 1)
        log_scale = self.scale_parameter * torch.tanh(s)
        if self.part.is_checkerboard:
            log_scale, shift = log_scale * self.mask, shift * self.mask
            y = (x - shift) * torch.exp(-log_scale) if inverse else x * torch.exp(log_scale) + shift
        else:
            old = self.part.transformed(x)
            new = (old - shift) * torch.exp(-log_scale) if inverse else old * torch.exp(log_scale) + shift
            y = _merge(self.part, x, new, untouched)
        logabsdet = log_scale.flatten(1).sum(1)
        return y, -logabsdet if inverse else logabsdet


class EagerBatchNorm(FlowBatchNorm):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        each, mean, variance = (-1, *[1] * (x.dim() - 2)), self.running_mean, self.running_var
        if self.training:
            rows_and_sites = [0, *range(2, x.dim())]
            mean = x.mean(rows_and_sites)
        centred = x - mean.view(each)
        if self.training:
            variance = centred.square().mean(rows_and_sites)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance, self.momentum)
        log_scale = self._log_scale(variance)
        z = centred * torch.exp(log_scale).view(each)
        z = z if self.bias is None else z + self.bias.view(each)
        return z, (x[0, 0].numel() * log_scale.sum()).expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale = self._log_scale(self.running_var)
        each = (-1, *[1] * (z.dim() - 2))
        x = z if self.bias is None else z - self.bias.view(each)
        return x * torch.exp(-log_scale).view(each) + self.running_mean.view(each), (-z[0, 0].numel() * log_scale.sum()).expand(len(z))

    def _log_scale(self, variance: Tensor) -> Tensor:
        log_scale = -0.5 * torch.log(variance + self.eps)
        return log_scale if self.log_gain is None else self.log_gain + log_scale


class EagerDiagonal(DiagonalScale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * torch.exp(self.log_scale), self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * torch.exp(-self.log_scale), -self.log_scale.sum().expand(len(z))


_EAGER = {AdditiveCoupling: EagerAdditive, AffineCoupling: EagerAffine, FlowBatchNorm: EagerBatchNorm, DiagonalScale: EagerDiagonal}


def _merge(part: Any, x: Tensor, new: Tensor, untouched: Tensor) -> Tensor:
    name = part.name.lower()
    if name in ("first_half", "second_half"):
        return torch.cat([new, untouched] if name == "first_half" else [untouched, new], 1)
    y = x.clone()
    y[:, int(name == "odd") :: 2] = new
    return y


def _alternating(features: int, couplings: int) -> list[list[float]]:
    """Which features are transformed: odd and even ones in turn."""
    return [[float(k % 2 != i % 2) for k in range(features)] for i in range(couplings)]


def _nflows(layer: str, masks: list[list[float]], net: Callable[[int, int], nn.Module]) -> Model:
    transforms = _import("nflows.transforms")
    torch.manual_seed(0)
    layers = [getattr(transforms, layer)(torch.tensor(mask), net) for mask in masks]
    return Model(transforms.CompositeTransform(layers), lambda module, x: module(x), lambda module, z: module.inverse(z)[0])


def _normflows(couplings: int, net: Callable[[int], nn.Module], scale: bool) -> Model:
    block = _import("normflows.flows").AffineCouplingBlock
    torch.manual_seed(0)
    layers = [block(net(k), scale=scale, split_mode="channel_inv" if k % 2 else "channel") for k in range(couplings)]

    def to_noise(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        total = 0.0
        for layer in module:
            x, logabsdet = layer.inverse(x)
            total = total + logabsdet
        return x, total

    def to_data(module: nn.Module, z: Tensor) -> Tensor:
        for layer in reversed(module):
            z, _ = layer(z)
        return z

    return Model(nn.ModuleList(layers), to_noise, to_data)


def _zuko(features: int, transforms: int, hidden: tuple[int, ...]) -> Model:
    torch.manual_seed(0)
    flow = _import("zuko.flows").RealNVP(features, transforms=transforms, hidden_features=hidden, randmask=False)
    return Model(
        flow,
        lambda module, x: module().transform.call_and_ladj(x),
        lambda module, z: module().transform.inv(z),
    )


def _pyro(features: int, transforms: int, hidden: tuple[int, ...]) -> Model:
    """The features are turned round between the couplings, as its split has no parity."""
    library = _import("pyro.distributions.transforms")
    torch.manual_seed(0)
    layers = [
        part
        for _ in range(transforms)
        for part in (library.affine_coupling(features, list(hidden)), library.Permute(torch.arange(features).flip(0)))
    ]
    transforms = PyroTransforms([layer.inv for layer in reversed(layers[:-1])])
    return Model(transforms, lambda module, x: module(x), lambda module, z: module.inverse(z)[0])


def _import(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.split('.')[0]} cannot be imported ({error})") from error
