"""What joining Glow's coupling with the actnorm and 1x1 convolution after it is worth, with channels last, and on a GPU first too."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import flowkernels
from flowkernels import ScaleMap
from flowkernels.ops import coupling, glow_step

from .case import Call, Case, Competitor

OURS, APART, REFERENCE = "flowkernels", "coupling and a product by torch", "reference"
SHAPES = ((16, 16, 16, 12), (16, 8, 8, 24), (16, 4, 4, 48), (32, 16, 16, 48))  # of a Glow of 32 x 32 images, and a wider one
LARGE = ((5461, 16, 16, 12), (1365, 16, 16, 48), (682, 16, 16, 96))  # 64 MB, which no cache of a GPU holds


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer, and fewer turns."""
    shapes, orders = SHAPES[:1] if quick else SHAPES, (False,)
    if device.type == "cuda":
        shapes, orders = LARGE[1:2] if quick else SHAPES[:1] + LARGE, (False, True)
    return [case for shape in shapes for first in orders for case in _cases(shape, quick, device, channels_first=first)]


def _cases(shape: tuple[int, ...], quick: bool, device: torch.device, *, channels_first: bool) -> Iterator[Case]:
    g = torch.Generator().manual_seed(0)
    channels = shape[-1]
    sizes = (shape, shape, (channels, channels), channels)
    x, raw, weight, bias = (torch.randn(size, generator=g).to(device) for size in sizes)
    if channels_first:
        x, raw = (t.movedim(-1, 1).contiguous().movedim(1, -1) for t in (x, raw))
    tensors = (x, raw, weight / channels**0.5, bias)
    macs = float(x.numel() * channels)
    for direction in ("forward", "inverse", "forward + backward"):
        gradients, inverse = "backward" in direction, direction == "inverse"
        functions = {OURS: glow_step, APART: apart, REFERENCE: _reference}
        competitors = [_competitor(name, partial(_call, tensors, f, inverse, gradients)) for name, f in functions.items()]
        moved, products = (8.0, 3.0) if gradients else (3.0, 1.0)  # x, raw, y; backward dy, x, raw, and the gradients of x and raw
        name = f"{direction}, {list(shape)}, channels {'first' if channels_first else 'last'}"
        yield Case(name, competitors, products * macs, 4 * moved * x.numel(), seconds=0.2 if quick else 1.5, device=device)


def apart(x: Tensor, raw: Tensor, weight: Tensor, bias: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Layer by layer: our coupling, and the convolution as one product by torch; and the half that the next conditioner reads."""
    x, raw = x.movedim(-1, 1), raw.movedim(-1, 1)
    h, logabsdet = coupling(x, raw[:, 0::2], raw[:, 1::2], scale=ScaleMap.sigmoid(bias=2.0), form="shift_scale", inverse=inverse)
    h = h.movedim(1, -1)
    y = torch.nn.functional.linear(h, weight, -bias) if inverse else torch.nn.functional.linear(h + bias, weight)
    return y, logabsdet, y[..., : y.shape[-1] // 2].contiguous()


def _reference(*tensors: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    with flowkernels.backend("reference"):
        return glow_step(*tensors, inverse=inverse)


def _competitor(name: str, build: Callable[[], Call]) -> Competitor:
    return Competitor(name, build, ours=name == OURS, package="torch" if name == REFERENCE else "flowkernels")


def _call(tensors: tuple[Tensor, ...], function: Callable, inverse: bool, gradients: bool) -> Call:
    if not gradients:
        return Call(partial(function, *tensors, inverse=inverse), lambda: _reference(*(t.double() for t in tensors), inverse=inverse))
    cotangent = tensors[0]

    def run(function: Callable, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y, logabsdet, passing = function(*leaves)
        given = (cotangent.to(y.dtype), logabsdet.new_ones(len(logabsdet)), torch.ones_like(passing))
        return torch.autograd.grad((y, logabsdet, passing), leaves, given)

    exact = tuple(t.double() for t in tensors)
    return Call(partial(run, function, tensors), partial(run, _reference, exact), grad=True)
