"""Measure, keep the rows, and show them: `python -m benchmarks --help`."""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from . import machine, plots, rows, table
from .measure import measure_case

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def names() -> list[str]:
    """Benchmarks: every file bench_NAME.py."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 where ours gave a wrong answer."""
    options = _parse(arguments)
    out = options.out or RESULTS / ("quick.jsonl" if options.quick else "measured.jsonl")
    chosen = options.names or names()
    wrong = False
    if not options.show and len(chosen) > 1:
        os.environ.setdefault(machine.LOAD, str(machine.load()))  # before our own
        wrong = any([_run_in_process(name, out, options) for name in chosen])
    elif not options.show:
        malloc = machine.raise_malloc_thresholds()
        print(malloc)
        wrong = _run(chosen[0], out, malloc, options, torch.device(options.device))
    kept = [row for row in rows.read(out) if row["benchmark"] in chosen]
    if not kept:
        print(f"no rows of {', '.join(chosen)} in {out}", file=sys.stderr)
        return 1
    if options.show:
        print(table.render(kept))
        for name in chosen:
            _summarise(name, [row for row in kept if row["benchmark"] == name])
    else:
        print(f"\nrows are in {out}")
    if options.plot:
        for path in plots.plot(kept, out):
            print(f"figure: {path}")
    return int(wrong)


def _run_in_process(name: str, out: Path, options: argparse.Namespace) -> bool:
    """One of several benchmarks: what the others leave behind, such as compiled graphs and a scattered heap, slows Python by a tenth."""
    command = [sys.executable, "-m", "benchmarks", name, "--out", str(out), "--device", options.device]
    if options.quick:
        command.append("--quick")
    if options.seconds is not None:
        command += ["--seconds", str(options.seconds)]
    return subprocess.run(command, check=False).returncode != 0


def _run(name: str, out: Path, malloc: str, options: argparse.Namespace, device: torch.device) -> bool:
    started, quick = time.perf_counter(), options.quick
    who = {**machine.describe(device), "malloc": malloc, "quick": quick}
    if who["load_before"] > 0.5:
        print(f"others keep the machine busy (load {who['load_before']} before we began): ratios suffer too, mind the quartiles")
    limits = machine.measure_limits(device)
    cases = import_module(f"benchmarks.bench_{name}").cases(quick, device)
    if options.seconds is not None:
        cases = [replace(case, seconds=min(case.seconds, options.seconds)) for case in cases]
    print(f"\n{name}: {len(cases)} cases on {who['device']}; {table.limits(limits)}\n")
    done: list[rows.Row] = []
    unfinished = out.with_name(f"{out.name}.unfinished")  # an interrupted run leaves its rows there, and the results as they were
    for case in cases:
        fresh = measure_case(case, benchmark=name, machine=who, limits=limits, quick=quick)
        done += fresh
        rows.replace(unfinished, done, benchmark=name, device=str(who["device"]))
        print(table.render_case(fresh) + "\n", flush=True)
    rows.replace(out, done, benchmark=name, device=str(who["device"]))
    unfinished.unlink(missing_ok=True)
    _summarise(name, done)
    print(f"{table.render_targets(done)}\n\n{name}: {time.perf_counter() - started:.0f} s")
    return any(row["wrong"] for row in done if row["ours"])


def _summarise(name: str, done: list[rows.Row]) -> None:
    """What a benchmark makes of all its rows, where it has a `summary`."""
    summary = getattr(import_module(f"benchmarks.bench_{name}"), "summary", None) if done else None
    if summary is not None:
        print(f"{summary(done)}\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    description = "Measure flowkernels against its peers and the machine's limits."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=description)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks to run; all without one: {', '.join(names())}")
    parser.add_argument("--quick", action="store_true", help="fewer cases and fewer turns: a look, not a result")
    parser.add_argument("--seconds", type=float, metavar="S", help="measure each competitor of a case for about so long at most")
    parser.add_argument("--out", type=Path, metavar="FILE", help="data file, one JSON object a line (benchmarks/results/measured.jsonl)")
    parser.add_argument("--plot", action="store_true", help="draw the figures, from the data file, beside it")
    parser.add_argument("--show", action="store_true", help="measure nothing; show what the data file holds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(names())):
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(names())}")
    return options


if __name__ == "__main__":
    sys.exit(main())
