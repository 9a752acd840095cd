"""The masked linear map and its two gradients, against the dense product of a weight that was masked beforehand."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from flowkernels.ops import masked_linear
from flowkernels.ops.masked_linear.reference import staircase_mask

from .case import Call, Case, Competitor, Target

OURS, DENSE, MASKED = "flowkernels", "pre-masked dense", "weight * mask"
SIZES = ((512, 1024), (1024, 1024), (100, 100))  # units of a square staircase, batch
TARGETS = {"forward": (0.8, 0.95), "dx": (0.75, 0.9), "dweight": (0.75, 0.9)}


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer, and fewer turns."""
    return [case for units, batch in SIZES[: 1 if quick else None] for case in _cases(units, batch, quick, device)]


def _cases(units: int, batch: int, quick: bool, device: torch.device) -> Iterator[Case]:
    visible = torch.arange(1, units + 1, dtype=torch.int32, device=device)  # unit j sees units up to itself
    for product, (must, aim) in TARGETS.items():
        competitors = [
            Competitor(name, partial(_build, name, product, visible, batch), ours=name == OURS, package=package)
            for name, package in ((OURS, "flowkernels"), (DENSE, "torch"), (MASKED, "torch"))
            if (name, product) != (MASKED, "dx")  # autograd has kept the product of the forward pass: a dense dx
        ]
        pairs = units * (units + 1) // 2
        size = 4.0 * (2 * batch * units + pairs)
        targets = [Target("rate", must, aim)] if batch > 100 else []  # smaller ones are bound by the call
        name = f"{product}, {units} x {units}, batch {batch:,}"
        yield Case(name, competitors, float(batch * pairs), size, targets, seconds=0.3 if quick else 2.0, device=device)


def _build(name: str, product: str, visible: Tensor, batch: int) -> Call:
    g = torch.Generator().manual_seed(0)
    units = len(visible)
    shapes = {"x": (batch, units), "dy": (batch, units), "weight": (units, units), "bias": (units,)}
    x, dy, weight, bias = (torch.randn(shape, generator=g).to(visible.device) for shape in shapes.values())
    mask = staircase_mask(visible, units).float()
    rows = torch.linspace(0, (units if product == "dweight" else batch) - 1, min(units, batch, 256)).round().long().to(visible.device)
    return Call(_calls(name, x, dy, weight, bias, visible, mask)[product], _exact(product, x, dy, weight * mask, bias, mask, rows), rows)


def _calls(
    name: str, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, visible: Tensor, mask: Tensor
) -> dict[str, Callable[[], Tensor]]:
    if name == OURS:
        return {
            "forward": lambda: masked_linear(x, weight, bias, visible),
            "dx": lambda: torch.ops.flowkernels.masked_linear_dx(dy, weight, visible),
            "dweight": lambda: torch.ops.flowkernels.masked_linear_dweight(x, dy, visible),
        }
    masked = weight * mask
    if name == DENSE:  # dweight is masked too, or the weight would not stay as it is
        return {
            "forward": lambda: torch.addmm(bias, x, masked),
            "dx": lambda: dy @ masked.T,
            "dweight": lambda: (x.T @ dy).mul_(mask),
        }
    return {"forward": lambda: torch.addmm(bias, x, weight * mask), "dweight": lambda: (x.T @ dy) * mask}


def _exact(product: str, x: Tensor, dy: Tensor, masked: Tensor, bias: Tensor, mask: Tensor, rows: Tensor) -> Callable[[], Tensor]:
    return {
        "forward": lambda: torch.addmm(bias.double(), x[rows].double(), masked.double()),
        "dx": lambda: dy[rows].double() @ masked.double().T,
        "dweight": lambda: (x[:, rows].double().T @ dy.double()) * mask[rows],
    }[product]
