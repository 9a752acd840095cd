"""MAF(5), whole flows at the sizes of the paper: sampling, density, the gradient of sampling and a training step.

The targets are those for a GPU (an H200, float32 exact). On a CPU there are none, and what would take peers minutes is left out.
"""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import flowkernels
from flowkernels.flows import MAF

from .autoregressive_problem import OURS
from .case import Call, Case, Competitor, Target, compiled
from .peers import build_stack, forward_of, inverse_of

TRANSFORMS = 5
Run = Callable[[str, nn.Module, Tensor], tuple[Tensor, ...]]


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has smaller batches and fewer peers."""
    found = [*_sampling(quick, device), *_gradients(quick, device)]
    return found if device.type == "cuda" else [replace(case, targets=[]) for case in found]


def _sampling(quick: bool, device: torch.device) -> Iterator[Case]:
    sizes = [
        (784, (1024, 1024), 100, (), [Target("seconds", 4e-3, 1.5e-3)]),
        (784, (1024, 1024), 2000, (), [Target("seconds", 4e-3, 1.5e-3)]),
        (63, (512, 512), 1000, ("nflows", "zuko"), [Target("speedup", 50, 100, library) for library in ("nflows", "zuko")]),
        (63, (512, 512), 100_000, ("nflows", "zuko"), [Target("speedup", 50, 100, library) for library in ("nflows", "zuko")]),
        (6, (50, 50), 10_000, (), [Target("seconds", 60e-6, 30e-6)]),
    ]
    for features, hidden, batch, libraries, targets in sizes:
        if quick and batch in (2000, 100_000):
            continue
        if device.type == "cpu" and batch > 10_000:
            libraries = ()
        competitors = [_competitor(name, features, hidden, batch, device, _inverse) for name in (OURS, *libraries)]
        if device.type == "cuda":
            competitors.append(_competitor(OURS, features, hidden, batch, device, _inverse, graph=True))
            competitors.append(_competitor(OURS, features, hidden, batch, device, _inverse, graph=True, loop_weights=torch.bfloat16))
        yield _case("sampling", features, hidden, batch, competitors, targets, device)


def _gradients(quick: bool, device: torch.device) -> Iterator[Case]:
    features, hidden, batch = 63, (512, 512), 1000
    names = (OURS,) if quick else (OURS, "nflows")
    make = lambda run, names=names, **options: [_competitor(n, features, hidden, batch, device, run, **options) for n in names]
    targets = [] if quick else [Target("speedup", 50, 100, "nflows")]
    yield _case("gradient of sampling", features, hidden, batch, make(_gradient(_inverse), grad=True), targets, device)
    compiled = [] if quick else make(_gradient(_forward), ("nflows",), grad=True, compile=True)
    targets = [] if quick else [Target("speedup", 1.5, 3, "nflows, compiled")]
    yield _case("gradient of the density", features, hidden, batch, [*make(_gradient(_forward), grad=True), *compiled], targets, device)
    compiled = [] if quick else make(_forward, ("zuko",), compile=True)
    targets = [] if quick else [Target("speedup", 2, 4, "zuko, compiled")]
    yield _case("density", features, hidden, batch, [*make(_forward, (OURS, *(() if quick else ("zuko",)))), *compiled], targets, device)


def _case(
    work: str,
    features: int,
    hidden: tuple[int, ...],
    batch: int,
    competitors: list[Competitor],
    targets: list[Target],
    device: torch.device,
) -> Case:
    name = f"{work}, MAF({TRANSFORMS}), D={features}, H={hidden[0]}x{len(hidden)}, batch {batch:,}"
    # weights once, and input and output of the flow
    pairs = TRANSFORMS * (features * hidden[0] + hidden[0] * hidden[1] + 2 * hidden[1] * features) / 2
    macs, size = float(pairs * batch), 4.0 * (pairs + 2 * features * batch)
    return Case(name, competitors, macs * (3 if "gradient" in work else 1), size, targets, seconds=1.0, device=device)


def _inverse(name: str, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    found = module.inverse(x) if name == OURS else inverse_of(name, module)(x)
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _forward(name: str, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(module(x) if name == OURS else forward_of(name, module)(x))


def _gradient(direction: Run) -> Run:
    """Of the sum of squared outputs and log-determinants, by the input and all parameters; a row's own is what is compared."""

    def run(name: str, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y, logabsdet = direction(name, module, x)
        loss = y.square().sum() / 2 - logabsdet.sum()
        return torch.autograd.grad(loss, [x, *module.parameters()])[:1]

    return run


def _competitor(
    name: str,
    features: int,
    hidden: tuple[int, ...],
    batch: int,
    device: torch.device,
    run: Run,
    *,
    grad: bool = False,
    compile: bool = False,
    graph: bool = False,
    loop_weights: torch.dtype = torch.float32,
) -> Competitor:
    """graph: replay a CUDA graph, as a sampler that draws the same number again and again would: what is left is the GPU's own time.
    loop_weights: how the loop that is captured holds its weights."""

    def build() -> Call:
        torch.manual_seed(0)
        module = (
            MAF(features, transforms=TRANSFORMS, hidden_features=hidden)
            if name == OURS
            else build_stack(name, features, hidden, TRANSFORMS)
        )
        module = module.to(device).eval()
        x = torch.randn(batch, features, generator=torch.Generator().manual_seed(1)).to(device)
        work, note = partial(run, name, module), ""
        if compile:
            work = compiled(work)
            started = time.perf_counter()
            with torch.inference_mode(not grad):
                work(x)
            note = f"compiled in {time.perf_counter() - started:.0f} s"
        rows = torch.linspace(0, batch - 1, 16).round().long().to(device)

        def exact() -> tuple[Tensor, ...]:
            with flowkernels.backend("reference"):
                return run(name, deepcopy(module).double(), x[rows].double())

        with flowkernels.loop_weights(loop_weights):
            call = _captured(partial(work, x)) if graph else partial(work, x)
        return Call(call, exact, rows, grad=grad, note=note)

    label = f"{name}, compiled" if compile else f"{name}, CUDA graph" if graph else name
    if loop_weights != torch.float32:
        label += ", bfloat16 weights"
    return Competitor(label, build, ours=name == OURS and not graph, package=name)


def _captured(work: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    with torch.inference_mode():
        for _ in range(2):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = work()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay
