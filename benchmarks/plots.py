"""Figures, from rows of the data file: one for each sweep, with the slope of every curve."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .rows import Row

# told apart without colour too; ours is drawn last and heaviest
STYLES = {
    "flowkernels": ("#c1272d", "o"),
    "nflows": ("#0b6fa4", "s"),
    "zuko": ("#e08e0b", "^"),
    "normflows": ("#5a8f29", "v"),
    "reference": ("#7d5ba6", "D"),
    "dense forward": ("#555555", "x"),
}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of y ~ x^p, by least squares on logarithms."""
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


def plot(rows: Iterable[Row], data: Path) -> list[Path]:
    """Draw every sweep of the data file `data`, beside it and named after it, and return the paths. Wrong rows are not drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    sweeps: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["sweep"] and not row["wrong"] and row.get("seconds"):
            sweeps[row["sweep"]["name"], row["device"]].append(row)
    return [_draw(name, device, points, data) for (name, device), points in sweeps.items()]


def _draw(name: str, device: str, rows: list[Row], data: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    curves: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        curves[row["competitor"]].append(row)
    figure = Figure(figsize=(9.2, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # "MAF" and "MAF, nflows" share a colour, and what is behind the comma a line
    colours: dict[str, Any] = {}
    lines: dict[str, str] = {"": "-"}
    for competitor, points in sorted(curves.items(), key=lambda item: -item[1][-1]["seconds"]):
        points.sort(key=lambda row: row["sweep"]["value"])
        x, y = [row["sweep"]["value"] for row in points], [1e3 * row["seconds"] for row in points]
        low, high = ([1e3 * row[quartile] for row in points] for quartile in ("seconds_q1", "seconds_q3"))
        flow, _, kind = competitor.partition(", ")
        colour, marker = STYLES.get(competitor, (colours.get(flow), "."))
        style = lines.setdefault(kind, ("--", ":", "-.")[(len(lines) - 1) % 3])
        ours = points[0]["ours"]
        label = f"{competitor}, slope {slope(x, y):.2f}" if len(x) > 1 else competitor
        width, order = (2.6, 3) if ours else (1.4, 2)
        (line,) = axes.plot(x, y, color=colour, ls=style, marker=marker, ms=6, lw=width, label=label, zorder=order)
        colours[flow] = line.get_color()
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)
    axes.set(xscale="log", yscale="log", xlabel=rows[0]["sweep"]["axis"], ylabel="milliseconds, median (band: quartiles)")
    values = sorted({row["sweep"]["value"] for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.grid(which="major", color="#dddddd", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)  # beside the curves, which leave no corner free
    axes.set_title(f"{name[0].upper()}{name[1:]}\n", loc="left", fontsize=12)
    axes.text(0, 1.02, _subtitle(rows[0]), transform=axes.transAxes, fontsize=8.5, color="#555555")
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name} {device}".lower()).strip("-").removesuffix("-cpu")
    path = data.with_name(f"{data.stem}-{slug}.png")
    figure.savefig(path, dpi=160)
    return path


def _subtitle(row: Row) -> str:
    what = re.sub(r"\b[A-Z]=[\d,]+, ", "", row["case"].removeprefix(row["sweep"]["name"] + ", "), count=1)
    where = f"{row['cpu']}, {row['threads']} threads" if row["device"] == "cpu" else row["device"]
    return f"{what}; {where}; torch {row['torch']}"
