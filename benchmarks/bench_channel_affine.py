"""A shift and a scale for each channel, on images and vectors: actnorm, and flow batch norm in training."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import flowkernels
from flowkernels.layers import FlowBatchNorm
from flowkernels.ops import channel_affine

from .case import Call, Case, Competitor

OURS, EAGER, COPY = "flowkernels", "eager", "copy of the same bytes"
CHECKED = 16  # rows that are compared with float64


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer, and fewer turns."""
    return list(_cases(quick, device))


def _cases(quick: bool, device: torch.device) -> Iterator[Case]:
    seconds = 0.2 if quick else 1.5
    shapes = [(32, 48, 32, 32)] if quick else [(1, 8), (100_000, 8), (32, 48, 32, 32), (64, 64, 128, 128)]
    for shape in shapes:
        g = torch.Generator().manual_seed(0)
        x, shift, log_scale = (torch.randn(size, generator=g).to(device) for size in (shape, shape[1], shape[1]))
        parameters = (shift, 0.3 * log_scale)
        size = 4.0 * x.numel()
        for name, inverse, passes in (("forward", False, 2), ("inverse", True, 2), ("forward + backward", False, 5)):
            if passes == 5 and x.numel() > 2**24:
                continue  # the same bytes a second as one pass shows
            make = partial(_call, x, parameters, inverse=inverse, gradients=passes == 5)
            competitors = [_competitor(OURS, partial(make, channel_affine)), _competitor(EAGER, partial(make, eager))]
            competitors.append(Competitor(COPY, partial(_copy, passes * size, device), package="torch"))
            yield Case(f"{name}, {list(shape)}", competitors, bytes=passes * size, seconds=seconds, device=device)
    x = torch.randn((32, 48, 32, 32), generator=torch.Generator().manual_seed(0)).to(device)
    competitors = [_competitor(name, partial(_batch_norm, x, plain=name == EAGER)) for name in (OURS, EAGER)]
    yield Case(f"flow batch norm in training, forward + backward, {list(x.shape)}", competitors, seconds=seconds, device=device)


def eager(x: Tensor, shift: Tensor, log_scale: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Actnorm as its PyTorch ports write it."""
    columns = (-1,) + (1,) * (x.dim() - 2)
    shift, log_scale, sites = shift.view(columns), log_scale.view(columns), x.shape[2:].numel()
    logabsdet = (sites * log_scale.sum()).expand(len(x))
    if inverse:
        return x * torch.exp(-log_scale) - shift, -logabsdet
    return (x + shift) * torch.exp(log_scale), logabsdet


def _competitor(name: str, build: Callable[[], Call]) -> Competitor:
    return Competitor(name, build, ours=name == OURS, package="flowkernels" if name == OURS else "torch")


def _call(x: Tensor, parameters: tuple[Tensor, Tensor], function: Callable, *, inverse: bool, gradients: bool) -> Call:
    if not gradients:
        rows = torch.arange(min(CHECKED, len(x)), device=x.device)
        exact = lambda: eager(x[: len(rows)].double(), *(p.double() for p in parameters), inverse=inverse)
        return Call(partial(function, x, *parameters, inverse=inverse), exact, rows)
    leaves = [t.detach().requires_grad_() for t in (x, *parameters)]

    def run() -> tuple[Tensor, ...]:
        y, logabsdet = function(*leaves)
        return torch.autograd.grad((y, logabsdet), leaves, (x, x.new_ones(len(x))))

    return Call(run, grad=True)


def _batch_norm(x: Tensor, *, plain: bool) -> Call:
    """Statistics of the batch, and the gradient through them."""
    layer = FlowBatchNorm(x.shape[1]).to(x.device).train()
    leaves = [x.detach().requires_grad_(), *layer.parameters()]

    def run() -> tuple[Tensor, ...]:
        with flowkernels.backend("reference" if plain else "auto"):
            outputs = _plain_batch_norm(layer, leaves[0]) if plain else layer(leaves[0])
            return torch.autograd.grad(outputs, leaves, (x, x.new_ones(len(x))))

    return Call(run, grad=True)


def _plain_batch_norm(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, its statistics in two passes: torch.var_mean is slower on a CPU."""
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims, keepdim=True)
    with torch.no_grad():
        layer.running_mean.lerp_(mean.flatten(), layer.momentum)
        layer.running_var.lerp_(variance.flatten(), layer.momentum)
    columns = (-1,) + (1,) * (x.dim() - 2)
    log_scale = layer.log_gain.view(columns) - 0.5 * torch.log(variance + layer.eps)
    return (x - mean) * log_scale.exp() + layer.bias.view(columns), (x.shape[2:].numel() * log_scale.sum()).expand(len(x))


def _copy(size: float, device: torch.device) -> Call:
    source = torch.ones(int(size) // 8, device=device)
    return Call(partial(torch.empty_like(source).copy_, source))
