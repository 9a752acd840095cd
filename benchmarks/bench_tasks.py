"""The four tasks of every flow at growing D: time, slope, and which of them grow as a sequential loop does.

Against the library that one would take otherwise, nflows and for Glow normflows, and against plain PyTorch: our own reference, which masks
its weights and checks its arguments at every call.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import flowkernels
from flowkernels.flows import IAF, MAF, NICE, Flow, Glow, RealNVP

from .bench_glow import normflows_glow
from .case import Call, Case, Competitor, Sweep
from .flow_models import Model, _import, nice, ours, realnvp
from .peers import build_stack
from .plots import slope
from .rows import Row
from .table import duration

TASKS = ("inference", "sampling", "density", "training step")
PLAIN = ", plain PyTorch"
AGAINST_D = " of the five flows against D"
HIDDEN, BATCH = (128, 128), 100
IMAGES = {8: (2, 2, 2), 16: (1, 4, 4), 32: (2, 4, 4), 64: (1, 8, 8), 128: (2, 8, 8)}
FLOWS: dict[str, Callable[[int], Flow]] = {
    "NICE": lambda d: NICE(d, couplings=4, hidden_features=HIDDEN),
    "RealNVP": lambda d: RealNVP(d, transforms=4, hidden_features=HIDDEN, batch_norm=False),
    "Glow": lambda d: Glow(IMAGES[d], levels=1, steps=4, hidden_channels=32),
    "MAF": lambda d: MAF(d, transforms=4, hidden_features=HIDDEN),
    "IAF": lambda d: IAF(d, transforms=4, hidden_features=HIDDEN),
}
LIBRARIES: dict[str, Callable[[int], Model]] = {
    "NICE": lambda d: nice(d, 4, HIDDEN)["nflows"](),
    "RealNVP": lambda d: realnvp(d, 4, HIDDEN)["nflows"](),
    "Glow": lambda d: normflows_glow(4, torch.randn(BATCH, *IMAGES[d]), levels=1, hidden=32),
    "MAF": lambda d: ours(build_stack("nflows", d, HIDDEN, 4)),
    "IAF": lambda d: ours(_import("nflows.transforms").InverseTransform(build_stack("nflows", d, HIDDEN, 4))),
}
LIBRARY = {name: ", normflows" if name == "Glow" else ", nflows" for name in FLOWS}
SEQUENTIAL = 0.5  # a loop of D passes adds 1 to the slope of a pass; half of that tells the two apart


def cases(quick: bool, device: torch.device) -> list[Case]:
    """A case for each task and D; `quick` has fewer D and turns."""
    return list(_cases(quick, device))


def _cases(quick: bool, device: torch.device) -> Iterator[Case]:
    for task in TASKS:
        for features in (8, 32) if quick else (8, 16, 32, 64, 128):
            competitors = [make(name, task, features, device) for name in FLOWS for make in (_ours, _library, _plain)]
            name = f"{task}{AGAINST_D}"
            yield Case(
                f"{name}, D={features}, 4 layers, H=128x2 (Glow: 4 steps, 32 channels), batch {BATCH}",
                competitors,
                seconds=0.02 if quick else 0.15,
                most_rounds=25,
                sweep=Sweep(name, "features D", features),
                device=device,
            )


def summary(rows: Iterable[Row]) -> str:
    """The table of flows and tasks: time at the largest D and slope, with our kernels, in another library and in plain PyTorch."""
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if not row["wrong"]:
            task = row["sweep"]["name"].removesuffix(AGAINST_D)
            curves.setdefault((row["competitor"], task), []).append((row["sweep"]["value"], row["seconds"]))
    largest = max(d for curve in curves.values() for d, _ in curve)
    slopes = {key: slope(*zip(*curve, strict=True)) for key, curve in curves.items() if len(curve) > 1}
    lines = [
        f"time at D={largest:g} (exponent p of time ~ D^p); * grows as a loop of D passes, that is by D^{SEQUENTIAL} "
        "or more faster than the flow's lightest task",
        "",
        "| | " + " | ".join(TASKS) + " |",
        "|---|" + "---|" * len(TASKS),
    ]
    for name in FLOWS:
        for kind in ("", LIBRARY[name], PLAIN):
            cells = [_cell(name + kind, task, curves, slopes, largest) for task in TASKS]
            lines.append(f"| {kind.removeprefix(', ') or f'**{name}**'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(competitor: str, task: str, curves: dict, slopes: dict, largest: float) -> str:
    if (competitor, task) not in slopes:
        return "-"
    p = slopes[competitor, task]
    least = min(slopes[competitor, other] for other in TASKS if (competitor, other) in slopes)
    seconds = dict(curves[competitor, task]).get(largest)
    return f"{'-' if seconds is None else duration(seconds)} ({p:.2f}){'*' if p - least >= SEQUENTIAL else ''}"


def _ours(name: str, task: str, features: int, device: torch.device) -> Competitor:
    def build() -> Call:
        torch.manual_seed(0)
        flow = FLOWS[name](features)
        with torch.no_grad():
            flow(torch.randn(BATCH, *flow.shape))  # Glow's first batch initialises it
        return _call(ours(flow), task, flow.shape, device)

    return Competitor(name, build, ours=True, package="flowkernels")


def _plain(name: str, task: str, features: int, device: torch.device) -> Competitor:
    def build() -> Call:
        call = _ours(name, task, features, device).build()

        def run() -> Tensor:
            with flowkernels.backend("reference"):
                return call.run()

        return replace(call, run=run)

    return Competitor(name + PLAIN, build, package="torch")


def _library(name: str, task: str, features: int, device: torch.device) -> Competitor:
    shape = IMAGES[features] if name == "Glow" else (features,)
    kind = LIBRARY[name]
    return Competitor(name + kind, lambda: _call(LIBRARIES[name](features), task, shape, device), package=kind.removeprefix(", "))


def _call(model: Model, task: str, shape: tuple[int, ...], device: torch.device) -> Call:
    model.module.to(device).train(task == "training step")
    exact = model.double()
    x = torch.randn(BATCH, math.prod(shape), generator=torch.Generator().manual_seed(1)).to(device)
    if task != "sampling":
        x = x.view(BATCH, *shape)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=0.0, fused=True)  # every step has the same loss, which is checked

    def run() -> Tensor:
        result = _run(model, task, x)
        if task == "training step":
            optimizer.zero_grad()
            result.backward()
            optimizer.step()
        return result.detach()

    return Call(run, lambda: _run(exact, task, x.double()).detach(), grad=task == "training step")


def _run(model: Model, task: str, x: Tensor) -> Tensor:
    if task == "sampling":
        return model.to_data(model.module, x)
    if task == "training step":
        return model.loss(x)
    z, logabsdet = model.to_noise(model.module, x)
    return z if task == "inference" else logabsdet - 0.5 * (z.square().flatten(1) + math.log(2 * math.pi)).sum(1)
