"""Glow's conditioner, against torch's convolutions, one by one and under torch.compile."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

import flowkernels
from flowkernels.flows.networks import ConvNet
from flowkernels.ops import conv_net
from flowkernels.ops.conv_net.reference import conv_net_reference

from . import case
from .case import Call, Case, Competitor

OURS, REFERENCE, COMPILED = "flowkernels", "reference", "torch.compile"
# [batch, channels, H, W], hidden channels and outputs: the levels of a Glow of 32 x 32 images, one image, and a wider network
SIZES = (
    ((16, 6, 16, 16), 64, 12),
    ((16, 12, 8, 8), 64, 24),
    ((16, 24, 4, 4), 64, 48),
    ((1, 6, 16, 16), 64, 12),
    ((16, 6, 16, 16), 128, 12),
)


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer, and fewer turns, and compiles nothing."""
    return [case for size in (SIZES[:1] if quick else SIZES) for case in _cases(*size, quick, device)]


def _cases(shape: tuple[int, ...], hidden: int, outputs: int, quick: bool, device: torch.device) -> Iterator[Case]:
    tensors = [t.to(device) for t in next(filter(_smooth, (_tensors(shape, hidden, outputs, seed) for seed in count())))]
    taps = 9 * 2 / 3  # two sums of three taps side by side need four products rather than six (csrc/cpu/conv_net_kernel.h)
    macs = tensors[0][:, 0].numel() * (taps * shape[1] * hidden + hidden**2 + taps * hidden * outputs)
    for direction, products in (("forward", 1), ("forward + backward", 3)):
        functions: dict[str, Callable] = {OURS: conv_net, REFERENCE: _reference}
        if not quick:
            functions[COMPILED] = conv_net_reference
        calls = {name: partial(_call, f, tensors, name == COMPILED, products > 1) for name, f in functions.items()}
        competitors = [Competitor(name, call, ours=name == OURS, package=OURS if name == OURS else "torch") for name, call in calls.items()]
        name = f"conditioner of Glow, {direction}, {list(shape)} to {outputs} channels, hidden {hidden}"
        yield Case(name, competitors, products * macs, seconds=0.2 if quick else 1.5, device=device)


def _tensors(shape: tuple[int, ...], hidden: int, outputs: int, seed: int) -> list[Tensor]:
    """x and the parameters of a conditioner."""
    torch.manual_seed(seed)
    net = ConvNet(shape[1], hidden, outputs)
    modules = net.conv_in, net.conv_mid, net.conv_out
    parameters = [p.detach() for m in modules for p in (m.weight, m.bias)] + [net.conv_out.log_gain.detach()]
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return [x, *(p + 0.05 * torch.randn_like(p) for p in parameters)]


def _smooth(tensors: list[Tensor]) -> bool:
    """Whether no relu is so near to its kink that float32 may be on the other side, where the exact gradient is another."""
    x, weight_in, bias_in, weight_mid, bias_mid, *_ = (t.double() for t in tensors)
    first = F.conv2d(x, weight_in, bias_in, padding=1)
    second = F.conv2d(first.relu(), weight_mid, bias_mid)
    return min(float(h.abs().min()) for h in (first, second)) > 1e-6


def _reference(*tensors: Tensor) -> Tensor:
    with flowkernels.backend("reference"):
        return conv_net(*tensors)


def _call(function: Callable, tensors: list[Tensor], compiled: bool, gradients: bool) -> Call:
    def run(function: Callable, tensors: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        if not gradients:
            return function(*tensors)
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    call = Call(partial(run, function, tensors), partial(run, conv_net_reference, [t.double() for t in tensors]), grad=gradients)
    if not compiled:
        return call
    torch._dynamo.reset()  # it allows a function eight sizes
    function = case.compiled(function, fullgraph=True, dynamic=False)
    started = perf_counter()
    with torch.inference_mode(not gradients):
        run(function, tensors)
    return replace(call, run=partial(run, function, tensors), note=f"compiled in {perf_counter() - started:.0f} s")
