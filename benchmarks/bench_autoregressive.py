"""The masked autoregressive layer: sampling (the sequential inverse), density (the parallel forward map), memory, import time."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch

from .autoregressive_problem import DENSE, OURS, Problem, compiled_forward, dense_forward, ours, peer, peers, reference
from .case import Call, Case, Competitor, Sweep, Target

MB = 2**20
SWEEP = "sampling time against D"


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer, and fewer turns."""
    return [*_inverse(quick, device), *_density(quick, device), *_memory(quick, device), *_import_time(quick), *_sweep(quick, device)]


def _case(kind: str, problem: Problem, competitors: list[Competitor], *targets: Target, seconds: float) -> Case:
    name = f"{kind}, {problem.name}"
    return Case(name, competitors, problem.macs, problem.bytes, targets, seconds=seconds, device=problem.device)


def _inverse(quick: bool, device: torch.device) -> Iterator[Case]:
    seconds = 0.3 if quick else 2.0

    problem = Problem(63, (512, 512), 1024, device)
    others = [peer("nflows", problem, "inverse")] if quick else [*peers(problem, "inverse"), reference(problem, "inverse")]
    targets = [Target("rate", 0.8, 0.95), Target("speedup", 110, 140, "nflows"), Target("share", 0.55, 0.48, DENSE)]
    yield _case("inverse", problem, [ours(problem, "inverse"), dense_forward(problem), *others], *targets, seconds=seconds)

    for batch, targets in (
        (1024, [Target("share", 0.7, 0.57, DENSE)]),
        (100, [Target("rate", 0.65, 0.8), *([] if quick else [Target("speedup", 1200, 1600, "nflows")])]),
        (16, [Target("share", 1.3, 1.0, DENSE)]),
        (1, []),
    ):
        if quick and batch in (1024, 1):
            continue
        problem = Problem(784, (1024, 1024), batch, device, check_rows=16)
        competitors = [ours(problem, "inverse"), dense_forward(problem)]
        if batch == 100 and not quick:
            competitors.append(peer("nflows", problem, "inverse"))
        yield _case("inverse", problem, competitors, *targets, seconds=seconds)

    problem = Problem(6, (100, 100), 100_000, device, check_rows=16_384)
    others = [peer("nflows", problem, "inverse"), peer("zuko", problem, "inverse")]
    if not quick:
        others += [peer("normflows", problem, "inverse"), peer("pyro", problem, "inverse"), reference(problem, "inverse")]
    targets = [Target("speedup", 20, 28, "nflows"), Target("speedup", 30, 45, "zuko")]
    yield _case("inverse", problem, [ours(problem, "inverse"), dense_forward(problem), *others], *targets, seconds=seconds)

    problem = Problem(63, (512, 512), 1, device)
    others = [] if quick else peers(problem, "inverse")
    targets = [Target("share", 0.6, 0.45, DENSE)]
    yield _case("inverse", problem, [ours(problem, "inverse"), dense_forward(problem), *others], *targets, seconds=seconds)


def _density(quick: bool, device: torch.device) -> Iterator[Case]:
    problem = Problem(63, (512, 512), 1024, device)
    others = [] if quick else [*peers(problem, "forward"), reference(problem, "forward"), compiled_forward(problem)]
    competitors = [ours(problem, "forward"), dense_forward(problem), *others]
    yield _case("density, no gradient", problem, competitors, Target("share", 0.55, 0.48, DENSE), seconds=0.3 if quick else 2.0)


def _memory(quick: bool, device: torch.device) -> Iterator[Case]:
    sizes = [(63, 512, 1024, 16), (63, 512, 32_768, 16), (63, 512, 1024, 0), (784, 1024, 1024, 0), (784, 1024, 8192, 0)]
    for features, hidden, batch, context_features in sizes[:1] if quick else sizes:
        problem = Problem(features, (hidden, hidden), batch, device, context_features=context_features, check_rows=16)
        competitors = [ours(problem, "inverse", memory=True)]
        if (batch, context_features) == (1024, 0):
            competitors.append(dense_forward(problem, memory=True))
        if (features, batch, context_features) == (63, 1024, 0):
            competitors.append(peer("nflows", problem, "inverse", memory=True))
        yield Case(f"memory of the inverse, {problem.name}", competitors, targets=[Target("memory", 4 * MB)], timed=False, device=device)


def _import_time(quick: bool) -> Iterator[Case]:
    cache = tempfile.TemporaryDirectory()

    def importing(name: str, statement: str, first: str) -> Competitor:
        code = f"import sys, time; {first}; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"

        def run() -> float:
            # with compiled bytecode at hand, as an installed package has it
            with_bytecode = ["-X", f"pycache_prefix={cache.name}"]
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
            done = subprocess.run([sys.executable, *with_bytecode, "-c", code], capture_output=True, text=True, check=True, env=environment)
            return float(done.stdout.split()[-1])

        return Competitor(name, lambda: Call(run, self_timed=True), ours=name == OURS)

    competitors = [importing(OURS, "import flowkernels", "import torch"), importing("import torch", "import torch", "pass")]
    rounds = 2 if quick else 7
    targets = [Target("seconds", 0.2, 0.05)]
    yield Case("import flowkernels after import torch", competitors, targets=targets, seconds=60.0, most_rounds=rounds)


def _sweep(quick: bool, device: torch.device) -> Iterator[Case]:
    for features in (8, 16, 32) if quick else (8, 16, 32, 64, 128, 256, 512):
        problem = Problem(features, (512, 512), 256, device, check_rows=16)
        others = [peer("nflows", problem, "inverse"), peer("zuko", problem, "inverse"), reference(problem, "inverse")]
        yield Case(
            f"{SWEEP}, {problem.name}",
            [ours(problem, "inverse"), *(others[:1] if quick else others), dense_forward(problem)],
            problem.macs,
            problem.bytes,
            seconds=0.1 if quick else 0.7,
            most_rounds=25,
            sweep=Sweep(SWEEP, "features D", features),
            device=device,
        )
