"""Affine coupling: Glow's and RealNVP's images and vectors, 16 KB to 256 MB, forward, inverse and with gradients."""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flowkernels
from flowkernels import ScaleMap
from flowkernels.ops import coupling

from .case import Call, Case, Competitor, Target, compiled

OURS, EAGER, COMPILED, REFERENCE = "flowkernels", "eager", "torch.compile", "reference"
NFLOWS, COPY = "nflows' arithmetic", "copy of the same bytes"
NODE = "a node that does nothing"  # the floor of one op with a gradient: autograd, and the memory of what it returns
GLOW = {"scale": ScaleMap.sigmoid(bias=2.0), "form": "shift_scale"}
LIKE_NFLOWS = {"scale": ScaleMap.sigmoid(bias=2.0, floor=1e-3)}
CHECKED = 16  # samples that are compared with float64


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer, and fewer turns."""
    return [*_images(quick, device), *_vectors(quick, device), *_calls(quick, device), *_sizes(quick, device)]


def _images(quick: bool, device: torch.device) -> Iterator[Case]:
    problem, seconds = Problem((32, 48, 32, 32), device, **GLOW), 0.3 if quick else 2.0
    targets = [Target("speedup", 1.0, 1.4, COMPILED), Target("speedup", 1.4, 2.2, EAGER)]
    yield problem.case("forward", [EAGER, COMPILED, REFERENCE, COPY], targets, seconds)
    targets = [Target("speedup", 1.0, 1.3, COMPILED), Target("speedup", 1.3, 1.8, EAGER)]
    yield problem.case("forward + backward", [EAGER, COMPILED, NODE], targets, seconds)
    if quick:
        return
    yield problem.case("inverse", [REFERENCE, COPY], [], seconds)
    yield Problem(problem.shape, device, dtype=torch.bfloat16, **GLOW).case("forward", [REFERENCE], [], seconds)
    yield Problem(problem.shape, device, channels_last=True, **GLOW).case("forward", [REFERENCE], [], seconds)
    for part in ("odd", "checkerboard_even"):
        yield Problem(problem.shape, device, part=part).case("forward", [REFERENCE], [], seconds)


def _vectors(quick: bool, device: torch.device) -> Iterator[Case]:
    problem = Problem((100_000, 8), device, **LIKE_NFLOWS)
    yield problem.case("forward", [NFLOWS, REFERENCE, COPY], [Target("speedup", 4.0, 8.0, NFLOWS)], 0.3 if quick else 2.0)


def _calls(quick: bool, device: torch.device) -> Iterator[Case]:
    problem, seconds = Problem((1, 8), device, **GLOW), 0.3 if quick else 1.0
    yield problem.case("forward", [EAGER, REFERENCE], [Target("share", 0.6, 0.4, EAGER)], seconds)
    yield problem.case("forward, recorded", [EAGER], [Target("share", 1.6, 1.0, EAGER)], seconds)
    yield problem.case("forward + backward", [EAGER, NODE], [], seconds)


def _sizes(quick: bool, device: torch.device) -> Iterator[Case]:
    for batch in (64,) if quick else (1, 64, 4096):  # 16 KB, 1 MB, 64 MB
        yield Problem((batch, 16, 16, 16), device, **GLOW).case("forward", [EAGER, COPY], [], 0.5)
    if not quick:
        targets = [Target("share", 1 / 0.8, 1 / 0.9, COPY)]
        yield Problem((64, 64, 128, 128), device, **GLOW).case("forward", [COPY], targets, 3.0)


class Problem:
    """One coupling and its inputs; shift and raw scale are the two halves of a network's output."""

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        **options: Any,
    ) -> None:
        self.shape, self.device, self.dtype, self.channels_last, self.options = shape, device, dtype, channels_last, options

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, shift, raw scale."""
        g = torch.Generator().manual_seed(0)
        batch, channels, *sites = self.shape
        width = 2 * channels if self.options.get("part", "").startswith("checkerboard") else channels
        x, net = (torch.randn(batch, n, *sites, generator=g).to(self.device, self.dtype) for n in (channels, width))
        if self.channels_last:
            x, net = (t.contiguous(memory_format=torch.channels_last) for t in (x, net))
        return (x, *net.chunk(2, 1))

    def moved(self, direction: str) -> float:
        """Bytes: x, shift, raw scale and y; backward dy, what was kept, shift, raw scale and all gradients."""
        values = torch.Size(self.shape).numel()
        net = values * (2 if self.options.get("part", "").startswith("checkerboard") else 1)
        forward, backward = 2 * values + net, 2.5 * values + 2 * net
        return float((forward + (backward if "backward" in direction else 0)) * self.dtype.itemsize)

    def case(self, direction: str, others: list[str], targets: list[Target], seconds: float) -> Case:
        builders = {name: partial(self._call, f, direction) for name, f in FUNCTIONS.items()}
        builders |= {
            OURS: partial(self._call, self._ours(inverse=direction == "inverse"), direction),
            REFERENCE: partial(self._call, partial(_reference, **self.options, inverse=direction == "inverse"), direction),
            COMPILED: partial(self._compiled, direction),
            COPY: partial(self._copy, direction),
        }
        competitors = [Competitor(OURS, builders[OURS], ours=True, package="flowkernels")]
        competitors += [Competitor(name, builders[name], package="torch") for name in others]
        layout = " channels-last" if self.channels_last else ""
        what = ", ".join(str(self.options[key]) for key in ("part", "scale") if key in self.options)
        name = f"{direction}, {list(self.shape)} {str(self.dtype).removeprefix('torch.')}{layout}, {what}"
        return Case(name, competitors, bytes=self.moved(direction), targets=targets, seconds=seconds, device=self.device)

    def _ours(self, inverse: bool) -> Callable[..., Any]:
        """The op as a user calls it: a partial with keywords would merge two dictionaries in every call."""
        part, scale, form = self.options.get("part", "second_half"), self.options.get("scale"), self.options.get("form", "scale_shift")
        return lambda x, shift, s: coupling(x, shift, s, part=part, scale=scale, form=form, inverse=inverse)

    def _call(self, function: Callable[..., Any], direction: str) -> Call:
        x, *net = self.tensors
        if direction.startswith("forward +") or direction.endswith("recorded"):
            leaves = [t.detach().requires_grad_() for t in (x, *net)]
            gradients = "backward" in direction
            return Call(partial(_with_gradients, function, leaves) if gradients else partial(function, *leaves), grad=True)
        rows = torch.arange(min(CHECKED, len(x)), device=self.device)
        few = [t[: len(rows)] for t in (x, *net)]
        inverse = direction == "inverse"
        exact = lambda: _reference(*(t.double() for t in few), **self.options, inverse=inverse)
        return Call(partial(function, x, *net), exact if self.dtype == torch.float32 else None, rows)

    def _compiled(self, direction: str) -> Call:
        call = self._call(compiled(glow, fullgraph=True), direction)
        started = perf_counter()
        with torch.inference_mode(not call.grad):
            call.run()
        call.note = f"compiled in {perf_counter() - started:.0f} s"
        return call

    def _copy(self, direction: str) -> Call:
        source = torch.ones(int(self.moved(direction)) // 8, device=self.device)
        return Call(partial(torch.empty_like(source).copy_, source))


def glow(x: Tensor, shift: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Glow's coupling as its PyTorch ports write it, with the log-determinant in its stable form."""
    first, second = x.chunk(2, 1)
    s = s + 2.0
    return torch.cat([first, (second + shift) * torch.sigmoid(s)], 1), F.logsigmoid(s).flatten(1).sum(1)


def nflows_arithmetic(x: Tensor, shift: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """nflows' AffineCouplingTransform after its network: indexed features, log of the scale, an indexed output."""
    half = x.shape[1] // 2
    identity, transformed = torch.arange(half, device=x.device), torch.arange(half, x.shape[1], device=x.device)
    scale = torch.sigmoid(s + 2.0) + 1e-3
    y = torch.empty_like(x)
    y[:, identity], y[:, transformed] = x[:, identity], x[:, transformed] * scale + shift
    return y, torch.log(scale).sum(-1)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, shift, s)
        return torch.empty_like(x), x.new_empty(len(x))

    @staticmethod
    def backward(ctx, dy: Tensor, dlogabsdet: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


FUNCTIONS = {EAGER: glow, NFLOWS: nflows_arithmetic, NODE: _Node.apply}


def _reference(x: Tensor, shift: Tensor, s: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    with flowkernels.backend("reference"):
        return coupling(x, shift, s, **options)


def _with_gradients(function: Callable[..., Any], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    y, logabsdet = function(*leaves)
    return torch.autograd.grad((y, logabsdet), leaves, (torch.ones_like(y), torch.ones_like(logabsdet)))
