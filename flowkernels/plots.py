"""Pictures of images and of training curves; matplotlib is imported when one is drawn."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import atomic_write, optional
from .data.digits import LEVELS

_GAP = "#dfe6ee"
_INK, _MUTED, _FLOW, _TRAIN, _BASELINE = "#222222", "#777777", "#1f5fa8", "#9db8d6", "#c0562f"


def require_matplotlib() -> None:
    """Raise the ModuleNotFoundError now that drawing would raise later."""
    optional("matplotlib", "matplotlib", "drawing pictures")


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Images [n, C, height, width] as one picture, row by row, a pixel apart.

    Returns:
        [C, rows (height + 1) + 1, columns (width + 1) + 1]; gaps are NaN.
    """
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    grid = torch.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), float("nan"))
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        grid[:, top : top + height, left : left + width] = image
    return grid


def save_images(path: str | Path, images: Tensor, columns: int, *, levels: int, ink: bool) -> None:
    """Write images [n, C, height, width] of grey levels 0..levels - 1 as one .png.

    Args:
        path: where to.
        images: one channel is shown grey, three are red, green and blue, a fourth is opacity.
        columns: images in a row.
        levels: number of grey levels.
        ink: of one channel, 0 is white and the highest level black, as of the digits; otherwise 0 is black.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message names the extra.
        ValueError: images have two channels.
    """
    if images.shape[1] not in (1, 3, 4):
        raise ValueError(f"a picture needs images of 1, 3 or 4 channels; these have {images.shape[1]}")
    grid = image_grid(images, columns)
    inches = max(1.5, min(12.0, grid.shape[2] / 20))
    figure = _figure(inches, inches * grid.shape[1] / grid.shape[2])
    _draw_grid(figure.add_axes((0, 0, 1, 1)), grid, levels, ink)
    _save(figure, path)


_TITLES = ("real digits (test images)", "samples of the flow")


def save_comparison(path: str | Path, real: Tensor, samples: Tensor, columns: int, titles: tuple[str, str] = _TITLES) -> None:
    """Write real digits beside samples or reconstructions, [rows * columns, 1, height, width] each, as one .png."""
    figure = _figure(11.0, 5.8)
    for left, images, title in zip((0.02, 0.51), (real, samples), titles, strict=True):
        axes = figure.add_axes((left, 0.02, 0.47, 0.9))
        _draw_grid(axes, image_grid(images, columns), LEVELS, ink=True)
        axes.set_title(title, color=_INK, fontsize=12)
    _save(figure, path)


def save_history(path: str | Path, history: Sequence[Sequence[float]], best_epoch: int, baseline: float, features: int) -> None:
    """Write the training curve as one .png.

    Args:
        history: rows (epoch, learning rate, training nats, held-out nats).
        best_epoch: the epoch whose weights are kept.
        baseline: the Gaussian's held-out log-likelihood, nats.
        features: dimensions, for the axis of bits.
    """
    figure = _figure(8.0, 4.8)
    axes = figure.add_axes((0.1, 0.13, 0.79, 0.77))
    epochs = [row[0] for row in history]
    axes.plot(epochs, [row[2] for row in history], color=_TRAIN, linewidth=1.8, label="flow, training images (while training)")
    axes.plot(epochs, [row[3] for row in history], color=_FLOW, linewidth=2.0, label="flow, held-out images")
    axes.axhline(baseline, color=_BASELINE, linewidth=1.5, linestyle="--", label="class-conditional Gaussian, held-out images")
    best = next(row[3] for row in history if row[0] == best_epoch)
    axes.plot([best_epoch], [best], "o", color=_FLOW, markersize=7, label=f"kept: epoch {best_epoch}, {best:.2f} nats")
    values = sorted(value for row in history for value in row[2:4])
    # the first epochs are far below; the interesting part is what comes after, and the legend has its place below it
    low, high = min(baseline, values[len(values) // 8]), max(baseline, values[-1])
    axes.set_ylim(low - 0.45 * (high - low) - 0.5, high + 0.08 * (high - low) + 0.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel("log p(x), nats per image")
    axes.set_title("Training a MAF on 8 x 8 digits", color=_INK)
    per_bit = -features * 0.6931471805599453
    axes.secondary_yaxis("right", functions=(lambda nats: nats / per_bit, lambda bits: bits * per_bit)).set_ylabel("bits per dimension")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.legend(loc="lower right", frameon=True, edgecolor="none", fontsize=9)
    axes.spines[["top"]].set_visible(False)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    # a figure of its own, with no window and no global state
    return optional("matplotlib.figure", "matplotlib", "drawing pictures").Figure(figsize=(width, height), facecolor="white")


def _draw_grid(axes: Any, grid: Tensor, levels: int, ink: bool) -> None:
    if len(grid) == 1:
        name = "gray_r" if ink else "gray"
        colours = optional("matplotlib", "matplotlib", "drawing pictures").colormaps[name].with_extremes(bad=_GAP)
        axes.imshow(grid[0].numpy(), cmap=colours, vmin=0, vmax=levels - 1, interpolation="nearest", aspect="equal")
    else:
        gap = torch.tensor([int(_GAP[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [1.0] * (len(grid) - 3))
        colours = torch.where(grid.isnan(), gap[:, None, None], grid / (levels - 1))
        axes.imshow(colours.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="equal")
    axes.set_axis_off()


def _save(figure: Any, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    atomic_write(path, buffer.getbuffer())
