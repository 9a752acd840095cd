"""Actnorm and invertible 1x1 convolution, alone and folded, against normflows' layers."""

import copy
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.layers import ActNormConv1x1

from .case import Call, Case, Competitor, Unavailable

NORMFLOWS, EAGER, CONV = "normflows", "two layers", "product alone"


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer, and fewer turns."""
    return [case for channels in ((48,) if quick else (12, 48, 96)) for case in _cases(channels, quick, device)]


def _cases(channels: int, quick: bool, device: torch.device) -> Iterator[Case]:
    images = 32 if device.type == "cpu" else 2**24 // (256 * channels)  # on a GPU 64 MB, which no cache holds
    shape = (images, channels, 16, 16)
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1).to(device)
    seconds, work = 0.3 if quick else 2.0, {"macs": float(x.numel() * channels), "bytes": 8.0 * x.numel()}
    for direction in ("forward", "inverse", "inverse, frozen", "forward and gradients"):
        if quick and direction.startswith("inverse"):
            continue
        competitors = [_ours(x, direction), _two_layers(x, direction), _normflows(x, direction), _product(x)]
        macs = 3 if direction == "forward and gradients" else 1
        yield Case(
            f"actnorm + 1x1 convolution, {direction}, {list(shape)}",
            competitors[: 3 if direction == "forward and gradients" else 4],
            macs=macs * work["macs"],
            bytes=work["bytes"],
            seconds=seconds,
            device=device,
        )


def _step(x: Tensor) -> ActNormConv1x1:
    torch.manual_seed(1)
    step = ActNormConv1x1(x.shape[1]).to(x.device)
    step(x)
    return step


def _ours(x: Tensor, direction: str) -> Competitor:
    def build() -> Call:
        step = _step(x)
        if direction == "inverse, frozen":
            step.eval()
            step.conv.freeze()
        return _call(step, x, direction, exact=copy.deepcopy(step).double())

    return Competitor("flowkernels", build, ours=True, package="flowkernels")


def _two_layers(x: Tensor, direction: str) -> Competitor:
    """The same without the fold."""

    class TwoLayers(nn.Module):
        def __init__(self, step: ActNormConv1x1) -> None:
            super().__init__()
            self.actnorm, self.conv = step.actnorm, step.conv

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x, a = self.actnorm(x)
            x, b = self.conv(x)
            return x, a + b

        def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
            z, b = self.conv.inverse(z)
            z, a = self.actnorm.inverse(z)
            return z, a + b

    def build() -> Call:
        step = _step(x)
        if direction == "inverse, frozen":
            step.eval()
            step.conv.freeze()
        return _call(TwoLayers(step), x, direction, exact=copy.deepcopy(step).double())

    return Competitor(EAGER, build, package="flowkernels")


def _normflows(x: Tensor, direction: str) -> Competitor:
    """Its layers go from noise to data: their inverse is our forward map."""

    class Pair(nn.Module):
        def __init__(self, flows: Any) -> None:
            super().__init__()
            self.conv, self.actnorm = flows.Invertible1x1Conv(x.shape[1], use_lu=True), flows.ActNorm((x.shape[1], 1, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x, a = self.actnorm.inverse(x)
            x, b = self.conv.inverse(x)
            return x, a + b

        def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
            z, b = self.conv(z)
            z, a = self.actnorm(z)
            return z, a + b

    def build() -> Call:
        try:
            flows = import_module("normflows").flows
        except ImportError as error:
            raise Unavailable(f"normflows cannot be imported ({error})") from error
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls the deprecated torch.lu
            pair = Pair(flows).to(x.device)
        pair(x)  # initialises actnorm
        return _call(pair, x, direction, exact=None)

    return Competitor(NORMFLOWS, build, package="normflows")


def _product(x: Tensor) -> Competitor:
    """The matrix product by torch, with a weight that is given: the floor on this machine."""

    def build() -> Call:
        weight, rows = torch.randn(x.shape[1], x.shape[1], device=x.device), x.flatten(2)
        return Call(lambda: torch.matmul(weight, rows))

    return Competitor(CONV, build, package="torch")


def _call(module: nn.Module, x: Tensor, direction: str, exact: nn.Module | None) -> Call:
    if direction == "forward and gradients":
        parameters = [p for p in module.parameters() if p.requires_grad]
        input = x.clone().requires_grad_()

        def run() -> Any:
            z, logabsdet = module(input)
            return torch.autograd.grad(z.square().sum() / 2 - logabsdet.sum(), [input, *parameters])[0]

        return Call(run, grad=True)
    name = "forward" if direction == "forward" else "inverse"
    run: Callable[[], Any] = lambda: getattr(module, name)(x)
    return Call(run, None if exact is None else lambda: getattr(exact, name)(x.double()))
