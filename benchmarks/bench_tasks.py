"""The four tasks of every flow at growing D: time, slope, and which of them grow as a sequential loop does."""

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

import flowkernels
from flowkernels.flows import IAF, MAF, NICE, Flow, Glow, RealNVP

from .case import Call, Case, Competitor, Sweep
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
SEQUENTIAL = 0.5  # a loop of D passes adds 1 to the slope of a pass; half of that tells the two apart


def cases(quick: bool, device: torch.device) -> list[Case]:
    """A case for each task and D; `quick` has fewer D and turns."""
    return list(_cases(quick, device))


def _cases(quick: bool, device: torch.device) -> Iterator[Case]:
    for task in TASKS:
        for features in (8, 32) if quick else (8, 16, 32, 64, 128):
            competitors = [_competitor(name, task, features, device, plain=plain) for name in FLOWS for plain in (False, True)]
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
    """The table of flows and tasks: time at the largest D and slope, with our kernels and in plain PyTorch."""
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if not row["wrong"]:
            task = row["sweep"]["name"].removesuffix(AGAINST_D)
            curves.setdefault((row["competitor"], task), []).append((row["sweep"]["value"], row["seconds"]))
    largest = max(d for curve in curves.values() for d, _ in curve)
    slopes = {key: slope(*zip(*curve, strict=True)) for key, curve in curves.items() if len(curve) > 1}
    lines = [
        f"ours / plain PyTorch: time at D={largest:g} (exponent p of time ~ D^p); * grows as a loop of D passes, that is by D^{SEQUENTIAL} "
        "or more faster than the flow's lightest task",
        "",
        "| | " + " | ".join(TASKS) + " |",
        "|---|" + "---|" * len(TASKS),
    ]
    for name in FLOWS:
        cells = [" / ".join(_cell(name + kind, task, curves, slopes, largest) for kind in ("", PLAIN)) for task in TASKS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(competitor: str, task: str, curves: dict, slopes: dict, largest: float) -> str:
    if (competitor, task) not in slopes:
        return "-"
    p = slopes[competitor, task]
    least = min(slopes[competitor, other] for other in TASKS if (competitor, other) in slopes)
    seconds = dict(curves[competitor, task]).get(largest)
    return f"{'-' if seconds is None else duration(seconds)} ({p:.2f}){'*' if p - least >= SEQUENTIAL else ''}"


def _competitor(name: str, task: str, features: int, device: torch.device, *, plain: bool) -> Competitor:
    def build() -> Call:
        torch.manual_seed(0)
        flow = FLOWS[name](features).to(device)
        x = torch.randn(BATCH, features, generator=torch.Generator().manual_seed(1)).to(device)
        if task != "sampling":
            x = x.view(BATCH, *flow.shape)
        with torch.no_grad():
            flow(x.view(BATCH, *flow.shape))  # Glow's first batch initialises it
        exact = copy.deepcopy(flow).double()
        optimizer = torch.optim.Adam(flow.parameters(), lr=0.0, fused=True)  # every step has the same loss, which is checked

        def run() -> Tensor:
            with flowkernels.backend("reference" if plain else "auto"):
                result = _run(flow, task, x)
                if task == "training step":
                    optimizer.zero_grad()
                    result.backward()
                    optimizer.step()
                return result.detach()

        return Call(run, lambda: _run(exact, task, x.double()).detach(), grad=task == "training step")

    return Competitor(name + (PLAIN if plain else ""), build, package="torch" if plain else "flowkernels")


def _run(flow: Flow, task: str, x: Tensor) -> Tensor:
    if task == "inference":
        return flow(x)[0]
    if task == "sampling":
        return flow.inverse(x)[0]
    return flow.log_prob(x) if task == "density" else -flow.log_prob(x).mean()
