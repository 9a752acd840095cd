"""From a case to rows of the data file."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from statistics import median

from .accuracy import Accuracy, check
from .case import Call, Case, Competitor, Target, Unavailable
from .machine import MATMUL_SIZE, matmul, version
from .memory import measure_in_process, peak_bytes
from .rows import Row
from .timing import Timing, measure, quartiles


def measure_case(
    case: Case, *, benchmark: str, machine: Row, limits: dict[str, float], quick: bool = False, say: Callable[[str], None] = print
) -> list[Row]:
    """Measure all competitors of a case in turns.

    Args:
        case: what is measured.
        benchmark: name of the benchmark, for the rows and for finding the case again in a fresh process.
        machine: what every row records (`machine.describe`).
        limits: `machine.measure_limits`; where the case needs multiply-adds, the matmul takes turns with the competitors too.
        quick: passed to the benchmark when a fresh process looks for the case.
        say: receives remarks, such as a competitor that is missing.

    Returns:
        One row for each competitor that ran; ratios are to ours, by medians, with the quartiles of the ratios within a round.
    """
    ready = list(_build(case, say))
    accuracies = [check(call) for _, call in ready]
    for (competitor, _), accuracy in zip(ready, accuracies, strict=True):
        if accuracy is not None and accuracy.wrong:
            say(f"{case.name}: {competitor.name} gives a wrong answer (rms {accuracy.rms:.1e}, max {accuracy.max:.1e}); not ranked")
    timings: list[Timing | None] = [None] * len(ready)
    if case.timed:
        calls = [call for _, call in ready]
        if case.macs:
            calls.append(matmul(case.device).build())
        timings = measure(calls, seconds=case.seconds, most_rounds=case.most_rounds, device=case.device)
        if len(calls) > len(ready):
            limits = {**limits, "matmul_gmac_s": MATMUL_SIZE**3 / timings.pop().median / 1e9}

    ours = next((i for i, (competitor, _) in enumerate(ready) if competitor.ours), None)
    trusted = [accuracy is None or not accuracy.wrong for accuracy in accuracies]
    rows = []
    for i, (competitor, call) in enumerate(ready):
        memory = None
        if competitor.memory and case.device.type == "cuda":  # the allocator counts: no fresh process is needed
            memory = peak_bytes(call, case.device)
        elif competitor.memory:
            memory = measure_in_process(benchmark, case.name, competitor.name, quick=quick, device=case.device)
        row = _row(case, competitor, call, accuracies[i], timings[i], memory, limits)
        if ours is not None and trusted[i] and trusted[ours]:
            row.update(_ratios(timings[i], timings[ours]))
        rows.append({"benchmark": benchmark, **row, **limits, **machine})
    if ours is not None:
        rows[ours]["targets"] = [_verdict(target, rows, rows[ours]) for target in case.targets]
    return rows


def _build(case: Case, say: Callable[[str], None]) -> Iterator[tuple[Competitor, Call]]:
    for competitor in case.competitors:
        try:
            yield competitor, competitor.build()
        except Unavailable as reason:
            say(f"{case.name}: {competitor.name} left out: {reason}")


def _row(
    case: Case,
    competitor: Competitor,
    call: Call,
    accuracy: Accuracy | None,
    timing: Timing | None,
    memory: int | None,
    limits: dict[str, float],
) -> Row:
    row: Row = {
        "case": case.name,
        "competitor": competitor.name,
        "ours": competitor.ours,
        "package": competitor.package,
        "package_version": version(competitor.package) if competitor.package else None,
        "note": call.note,
        "wrong": accuracy is not None and accuracy.wrong,
        "error_rms": accuracy.rms if accuracy else None,
        "error_max": accuracy.max if accuracy else None,
        "memory_bytes": memory,
        "macs": case.macs,
        "bytes": case.bytes,
        "sweep": asdict(case.sweep) if case.sweep else None,
    }
    if timing is not None:
        low, high = timing.quartiles
        least = max(case.macs / limits["matmul_gmac_s"], case.bytes / limits["copy_gb_s"]) / 1e9
        row |= {"seconds": timing.median, "seconds_q1": low, "seconds_q3": high}
        row |= {"turns": len(timing.seconds), "calls_per_turn": timing.calls, "least_seconds": least or None}
        if not row["wrong"]:
            row["gmac_s"] = case.macs / timing.median / 1e9 if case.macs else None
            row["share_of_limit"] = least / timing.median if least else None
    return row


def _ratios(timing: Timing | None, ours: Timing | None) -> Row:
    if timing is None or ours is None:
        return {}
    mine = dict(zip(ours.rounds, ours.seconds, strict=True))
    pairs = [seconds / mine[r] for r, seconds in zip(timing.rounds, timing.seconds, strict=True) if r in mine]
    low, high = quartiles(pairs) if pairs else (None, None)
    return {"ratio": timing.median / ours.median, "ratio_q1": low, "ratio_q3": high, "ratio_pairs_median": median(pairs) if pairs else None}


def _verdict(target: Target, rows: list[Row], ours: Row) -> Row:
    value = None if ours["wrong"] else _figure(target, rows, ours)
    verdict = "not measured"
    if ours["wrong"]:
        verdict = "wrong"
    elif value is not None:

        def holds(limit: float | None) -> bool:
            return limit is not None and (value >= limit if target.higher_is_better else value <= limit)

        verdict = "aim" if holds(target.aim) else "must" if holds(target.must) else "MISSED"
    return {**asdict(target), "value": value, "verdict": verdict}


def _figure(target: Target, rows: list[Row], ours: Row) -> float | None:
    if target.figure == "seconds":
        return ours.get("seconds")
    if target.figure == "rate":
        return ours["gmac_s"] / ours["matmul_gmac_s"] if ours.get("gmac_s") else None
    if target.figure == "memory":
        return None if ours["memory_bytes"] is None else ours["memory_bytes"] / ours["threads"]
    if target.figure == "memory share":
        theirs = next((row["memory_bytes"] for row in rows if row["competitor"] == target.against), None)
        return ours["memory_bytes"] / theirs if theirs and ours["memory_bytes"] is not None else None
    ratio = next((row.get("ratio") for row in rows if row["competitor"] == target.against), None)
    if ratio is None:
        return None
    return ratio if target.figure == "speedup" else 1 / ratio
