"""The READMEs' tables of what was measured, from the result rows: `python -m benchmarks.readme` writes them anew.

A table stands between two comments, `<!-- measured: NAME -->` and `<!-- end -->`. A test compares the READMEs with the rows.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from . import bench_tasks, rows
from .rows import Row
from .table import duration

ROOT = Path(__file__).resolve().parents[1]
READMES = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MEASURED, OTHER_MACHINE = RESULTS / "measured.jsonl", RESULTS / "avx512.jsonl"

# of the sequential inverse: label and case
SIZES = [
    "D=63, H=512x2, batch 1,024",
    "D=784, H=1024x2, batch 1,024",
    "D=784, H=1024x2, batch 100",
    "D=784, H=1024x2, batch 16",
    "D=6, H=100x2, batch 100,000",
    "D=63, H=512x2, batch 1",
]
INVERSE = {size: f"inverse, {size}" for size in SIZES} | {f"density without gradient, {SIZES[0]}": f"density, no gradient, {SIZES[0]}"}
PEERS = ("dense forward", "nflows", "zuko", "normflows", "pyro")

MAP = "ScaleMap.sigmoid(bias=2.0, floor=0.0)"
THROUGH_SAMPLES = (
    "RealNVP, D=8, H=64x2, 8 couplings, batch 1,000",
    "RealNVP, D=64, H=256x2, 6 couplings, batch 1,000",
    "NICE, D=64, H=256x1, 4 couplings, batch 100",
)
SMALL_MAF = "MAF(5), D=6, H=50x2, batch 512"
CONDITIONER = "[16, 6, 16, 16] to 12 channels, hidden 64"
# of everything else: label, benchmark, cases that share the line, and how the line calls those it compares with
OTHERS: list[tuple[str, str, Sequence[str], dict[str, str]]] = [
    (
        "a million samples of MAF(5), D=6, H=50x2",
        "sampling",
        ["1,000,000 samples, MAF(5), D=6, H=50x2"],
        {"zuko": "zuko", "nflows": "nflows", "pyro": "Pyro"},
    ),
    (
        "10,000 samples / one sample of it",
        "sampling",
        ["10,000 samples, MAF(5), D=6, H=50x2", "1 sample, MAF(5), D=6, H=50x2"],
        {"zuko": "zuko", "nflows": "nflows", "pyro": "Pyro"},
    ),
    (
        "10,000 samples given one context of 8 / given each of 100 contexts",
        "sampling",
        ["1 context of 8 x 10,000 samples, MAF(5), D=6, H=50x2", "100 contexts of 8 x 10,000 samples, MAF(5), D=6, H=50x2"],
        {"zuko": "zuko", "nflows": "nflows", "pyro": "Pyro"},
    ),
    (
        "gradient of the inverse, D=63, H=512x2, batch 1,024",
        "gradient",
        ["gradient of the inverse, D=63, H=512x2, batch 1,024"],
        {"dense forward + backward": "dense network, forward and backward"},
    ),
    (
        "the same, batch 128",
        "gradient",
        ["gradient of the inverse, D=63, H=512x2, batch 128"],
        {"dense forward + backward": "dense network", "nflows": "nflows", "reference": "the reference"},
    ),
    (
        "the same of nflows' default layer, two residual blocks, D=63, H=512, batch 128",
        "gradient",
        ["gradient of the inverse, two residual blocks, D=63, H=512, batch 128"],
        {"nflows": "nflows"},
    ),
    (
        "maximum-likelihood step of IAF(5), D=63, H=512x2, batch 1,024",
        "gradient",
        ["maximum-likelihood step of IAF(5), D=63, H=512x2, batch 1,024"],
        {"MAF": "the step of a MAF"},
    ),
    (
        "training step of one layer, D=63, H=512x2, batch 1,024",
        "training",
        ["training step, D=63, H=512x2, batch 1,024"],
        {"dense network": "dense network", "zuko": "zuko", "nflows": "nflows", "nflows, compiled": "compiled", "pyro": "Pyro"},
    ),
    (
        "training step of MAF(5), D=63, H=100x2, batch 100",
        "training",
        ["training step, MAF(5), D=63, H=100x2, batch 100"],
        {"zuko": "zuko", "nflows": "nflows", "nflows, compiled": "compiled", "pyro": "Pyro"},
    ),
    (
        "training step of five of nflows' default layers, two residual blocks, D=63, H=100, batch 100",
        "training",
        ["training step, 5 layers with two residual blocks, D=63, H=100, batch 100"],
        {"nflows": "nflows"},
    ),
    (
        "score of MAF(5), D=6, H=50x2, batch 512 / gradient of a score matching loss / Hessian-vector product",
        "derivatives",
        [f"{work}, {SMALL_MAF}" for work in ("score", "gradient of a score matching loss", "Hessian-vector product")],
        {"zuko": "zuko", "nflows": "nflows"},
    ),
    (
        "the same by torch.func: `vmap(grad)` / gradients of each sample / `jvp`",
        "derivatives",
        [f"{work}, {SMALL_MAF}" for work in ("scores by vmap of grad", "gradients of each sample", "directional derivative by jvp")],
        {"zuko": "zuko", "nflows": "nflows"},
    ),
    (
        "coupling, [32, 48, 32, 32], forward / forward and backward",
        "coupling",
        [f"forward, [32, 48, 32, 32] float32, {MAP}", f"forward + backward, [32, 48, 32, 32] float32, {MAP}"],
        {"torch.compile": "torch.compile", "eager": "eager"},
    ),
    (
        "coupling, 256 MB, forward",
        "coupling",
        [f"forward, [64, 64, 128, 128] float32, {MAP}"],
        {"copy of the same bytes": "a copy of the same bytes"},
    ),
    (
        "RealNVP, D=8, H=64x2, 8 couplings, batch 1,000: sampling / training step",
        "flows",
        [f"{work}, RealNVP, D=8, H=64x2, 8 couplings, batch 1,000" for work in ("sampling", "training step")],
        {"eager": "eager", "torch.compile": "compiled", "normflows": "normflows", "nflows": "nflows", "zuko": "zuko", "pyro": "Pyro"},
    ),
    (
        "RealNVP, D=64, H=256x2, 6 couplings, batch 1,000: sampling / training step",
        "flows",
        [f"{work}, RealNVP, D=64, H=256x2, 6 couplings, batch 1,000" for work in ("sampling", "training step")],
        {"eager": "eager", "torch.compile": "compiled", "normflows": "normflows", "nflows": "nflows", "zuko": "zuko", "pyro": "Pyro"},
    ),
    (
        "training step through samples: RealNVP of D=8 / D=64, as above / NICE of D=64, as below",
        "flows",
        [f"training step through samples, {flow}" for flow in THROUGH_SAMPLES],
        {"eager": "eager", "torch.compile": "compiled", "normflows": "normflows", "nflows": "nflows"},
    ),
    (
        "NICE, D=64, H=256, 4 couplings, batch 100: sampling / training step",
        "flows",
        [f"{work}, NICE, D=64, H=256x1, 4 couplings, batch 100" for work in ("sampling", "training step")],
        {"eager": "eager", "torch.compile": "compiled", "normflows": "normflows", "nflows": "nflows"},
    ),
    (
        "NICE, D=784, H=1000x5, 4 couplings, batch 200: sampling / training step",
        "flows",
        [f"{work}, NICE, D=784, H=1000x5, 4 couplings, batch 200" for work in ("sampling", "training step")],
        {"eager": "eager", "torch.compile": "compiled", "normflows": "normflows", "nflows": "nflows"},
    ),
    (
        "RealNVP on digits: sampling / training step",
        "flows",
        [f"{work}, RealNVP on digits, 2 levels, ResNet 16x1, batch 100" for work in ("sampling", "training step")],
        {"eager": "eager"},
    ),
    (
        "`slogdet` of 96 matrices, C = 12 / 48 / 96",
        "lu",
        [f"slogdet, 96 of C={c}" for c in (12, 48, 96)],
        {"torch batched": "torch batched"},
    ),
    (
        "`slogdet_inverse`, C = 12 / 48 / 96",
        "lu",
        [f"slogdet and inverse, 96 of C={c}" for c in (12, 48, 96)],
        {"torch batched": "torch batched", "torch one by one": "one by one"},
    ),
    (
        f"Glow's conditioner, {CONDITIONER}: forward / forward and backward",
        "conv_net",
        [f"conditioner of Glow, {work}, {CONDITIONER}" for work in ("forward", "forward + backward")],
        {"reference": "torch's convolutions", "torch.compile": "torch.compile"},
    ),
    (
        "four steps of Glow without their conditioners, [32, 48, 16, 16]: forward / inverse",
        "glow",
        [f"4 steps without their conditioners, {direction}, [32, 48, 16, 16]" for direction in ("forward", "inverse")],
        {"normflows": "normflows", "reference": "the reference"},
    ),
    (
        "Glow, 3 levels x 8 steps, hidden 64, [16, 3, 32, 32]: density / sampling / training step",
        "glow",
        [f"{work}, 3 levels x 8 steps, hidden 64, [16, 3, 32, 32]" for work in ("density", "sampling", "training step")],
        {"normflows": "normflows", "reference": "the reference", "torch.compile": "torch.compile"},
    ),
    (
        "the same, one image",
        "glow",
        [f"{work}, 3 levels x 8 steps, hidden 64, [1, 3, 32, 32]" for work in ("density", "sampling", "training step")],
        {"normflows": "normflows", "reference": "the reference"},
    ),
    (
        "the same, 3 levels x 32 steps, 16 images",
        "glow",
        [f"{work}, 3 levels x 32 steps, hidden 64, [16, 3, 32, 32]" for work in ("density", "sampling", "training step")],
        {"normflows": "normflows", "reference": "the reference"},
    ),
]


def tables() -> dict[str, str]:
    """The tables by name."""
    measured, other = rows.read(MEASURED), rows.read(OTHER_MACHINE)
    tasks = bench_tasks.summary([row for row in measured if row["benchmark"] == "tasks"])
    here, there = _by_name(measured), _by_name(other)
    return {
        "headlines": _headlines(here),
        "tasks": tasks[tasks.index("|") :],
        "inverse": _inverse(here),
        "others": _others(here),
        "memory": _memory(here),
        "other_machine_inverse": _inverse(there),
        "other_machine": _others(there),
    }


def _by_name(measured: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    return {(row["benchmark"], row["case"], row["competitor"]): row for row in measured}


def with_tables(text: str, made: dict[str, str]) -> str:
    """A README's text with these tables in their places."""
    place = re.compile(r"(<!-- measured: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
    return place.sub(lambda found: found[1] + made[found[2]] + found[3], text)


def _headlines(found: dict[tuple[str, str, str], Row]) -> str:
    def times(benchmark: str, cases: Sequence[str], peers: Sequence[str]) -> str:
        ratios = sorted(found[benchmark, case, peer]["ratio"] for case in cases for peer in peers)
        return f"{_ratio(ratios[0])} to {_ratio(ratios[-1])} times as fast as {', '.join(peers).replace('pyro', 'Pyro')}"

    glow = [f"{work}, 3 levels x 8 steps, hidden 64, [16, 3, 32, 32]" for work in ("density", "sampling", "training step")]
    lines = {
        "sampling a MAF layer of 63 features": times("autoregressive", [f"inverse, {SIZES[0]}"], ["nflows", "zuko", "normflows", "pyro"]),
        "a million samples of a MAF of 6": times("sampling", ["1,000,000 samples, MAF(5), D=6, H=50x2"], ["nflows", "zuko", "pyro"]),
        "a training step of MAFs": times(
            "training",
            ["training step, D=63, H=512x2, batch 1,024", "training step, MAF(5), D=63, H=100x2, batch 100"],
            ["nflows", "zuko", "pyro"],
        ),
        "Glow, from density to training": times("glow", glow, ["normflows"]),
    }
    return "\n".join(f"- {label}: {figure}" for label, figure in lines.items())


def _inverse(found: dict[tuple[str, str, str], Row]) -> str:
    lines = ["| | flowkernels | dense pass | nflows | zuko | normflows | Pyro | share of the limit |", "|---|---|---|---|---|---|---|---|"]
    for label, case in INVERSE.items():
        ours = found["autoregressive", case, "flowkernels"]
        peers = [found.get(("autoregressive", case, peer)) for peer in PEERS]
        times = [duration(row["seconds"]) if row else "" for row in (ours, *peers)]
        lines.append(f"| {' | '.join([label, *times])} | {ours['share_of_limit']:.2f} |")
    return "\n".join(lines)


def _memory(found: dict[tuple[str, str, str], Row]) -> str:
    def used(benchmark: str, case: str, who: str = "flowkernels") -> str:
        return f"{found[benchmark, case, who]['memory_bytes'] / 1e6:.3g} MB"

    inverse, step = "memory of the inverse, D=63, H=512x2, batch 1,024", "memory of a training step, D=63, H=512x2, batch 8,192"
    large, gradient = "memory of the inverse, D=784, H=1024x2, batch 8,192", "gradient of the inverse, D=63, H=512x2, batch 128"
    return (
        f"Memory beyond inputs and outputs: the inverse takes {used('autoregressive', inverse)} at D=63 and "
        f"{used('autoregressive', large)} at D=784 in two threads,\nwhatever the batch; a training step at D=63, batch 8,192, "
        f"{used('training', step)}, where nflows takes {used('training', step, 'nflows')}; the gradient of the inverse\nat batch 128 "
        f"{used('gradient', gradient)}, where autograd through nflows' inverse takes {used('gradient', gradient, 'nflows')}."
    )


def _others(found: dict[tuple[str, str, str], Row]) -> str:
    lines = ["| | time | against |", "|---|---|---|"]
    for label, benchmark, cases, names in OTHERS:
        if any((benchmark, case, "flowkernels") not in found for case in cases):
            continue  # newer than these rows
        times = " / ".join(duration(found[benchmark, case, "flowkernels"]["seconds"]) for case in cases)
        known = {who: name for who, name in names.items() if all((benchmark, case, who) in found for case in cases)}
        against = (f"{name} {' / '.join(_ratio(found[benchmark, case, who]['ratio']) for case in cases)}" for who, name in known.items())
        lines.append(f"| {label} | {times} | {', '.join(against)} |")
    return "\n".join(lines)


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Write the READMEs' tables anew."""
    made = tables()
    for readme in READMES:
        readme.write_text(with_tables(readme.read_text(), made))


if __name__ == "__main__":
    main()
