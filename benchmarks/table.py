"""The table that is printed, from rows of the data file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from .rows import Row

HEADER = ("", "time", "quartiles", "x ours", "of limit", "memory", "error rms", "max")
FIGURES = {
    "speedup": "{against} / ours",
    "share": "ours / {against}",
    "rate": "rate, of the matmul's",
    "memory": "memory a thread",
    "memory share": "memory, ours / {against}",
    "seconds": "time",
}


def render(rows: Iterable[Row]) -> str:
    """All benchmarks of a data file as text: a block for each case, its targets below it, and the targets once more at the end."""
    parts: list[str] = []
    for (benchmark, device), group in groupby(rows, key=lambda row: (row["benchmark"], row["device"])):
        block = list(group)
        parts += [f"== {benchmark} on {device} ==", _machine(block[0]), *_cases(block), render_targets(block), ""]
    return "\n".join(parts)


def render_case(rows: Sequence[Row]) -> str:
    """One case: a line for each competitor, then its targets."""
    cells = [HEADER, *map(_cells, rows)]
    first, *others = [column for column in zip(*cells, strict=True) if any(column[1:])]
    columns = [_aligned(first, str.ljust), *(_aligned(column, str.rjust) for column in others)]
    lines = [rows[0]["case"], *("  " + "  ".join(line).rstrip() for line in zip(*columns, strict=True))]
    for row in rows:
        if row["note"] and row["note"] != "compiled CPU kernel":
            lines.append(f"  {row['competitor']}: {row['note']}")
        lines += [f"  -> {_target(target)}" for target in row.get("targets", [])]
    return "\n".join(lines)


def render_targets(rows: Sequence[Row]) -> str:
    """A line for each target."""
    lines = [(row["case"], target) for row in rows for target in row.get("targets", [])]
    width = max((len(case) for case, _ in lines), default=0)
    return "\n".join(["targets", *(f"  {case.ljust(width)}  {_target(target)}" for case, target in lines)])


def duration(seconds: float) -> str:
    """Seconds with a unit and three digits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1.0 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def size(count: float) -> str:
    """Bytes in MB of 2^20."""
    return f"{count / 2**20:.1f} MB"


def limits(row: Row) -> str:
    """The machine's measured limits."""
    return f"matmul {row['matmul_gmac_s']:.1f} GMAC/s, copy {row['copy_gb_s']:.1f} GB/s"


def _machine(row: Row) -> str:
    versions = ", ".join(f"{name} {row[name]}" for name in ("python", "torch", "flowkernels", "cuda", "triton") if name in row)
    return (
        f"{row['cpu']}, {row['threads']} threads, {row['capability']}; {limits(row)}; load before {row['load_before']}\n"
        f"{versions}; commit {row['commit']}, {row['date']}; {row['malloc']}\n"
    )


def _cases(rows: list[Row]) -> Iterator[str]:
    for _, group in groupby(rows, key=lambda row: row["case"]):
        yield render_case(list(group)) + "\n"


def _aligned(column: Sequence[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, column))
    return [justify(cell, width) for cell in column]


def _cells(row: Row) -> tuple[str, ...]:
    name = row["competitor"] + (f" {row['package_version']}" if row["package"] not in (None, "torch") else "")
    wrong, seconds = row["wrong"], row.get("seconds")
    return (
        name,
        "WRONG" if wrong else "" if seconds is None else duration(seconds),
        "" if wrong or seconds is None else f"{duration(row['seconds_q1'])} .. {duration(row['seconds_q3'])}",
        f"{row['ratio']:.3g}" if row.get("ratio") else "",
        f"{row['share_of_limit']:.2f}" if row.get("share_of_limit") else "",
        "" if row["memory_bytes"] is None else size(row["memory_bytes"]),
        "" if row["error_rms"] is None else f"{row['error_rms']:.1e}",
        "" if row["error_max"] is None else f"{row['error_max']:.1e}",
    )


def _target(target: Row) -> str:
    def show(value: float | None) -> str:
        if value is None:
            return "-"
        return {"seconds": duration, "memory": size}.get(target["figure"], lambda v: f"{v:.3g}")(value)

    label = FIGURES[target["figure"]].format(against=target["against"])
    return f"{label}: {show(target['value'])}  (must {show(target['must'])}, aim {show(target['aim'])})  {target['verdict']}"
