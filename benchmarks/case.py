"""What a benchmark is made of: cases, their competitors, and the figures they are held to."""

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Unavailable(Exception):
    """A competitor cannot run here; the message says why. It is left out, and the reason is printed."""


def compiled(function: Callable, **options: Any) -> Callable:
    """`torch.compile(function, **options)`.

    Raises:
        Unavailable: the C++ that it writes cannot be built here.
    """
    if not has_python_headers():
        raise Unavailable("torch.compile needs Python.h; on Debian and Ubuntu, apt install python3-dev")
    return torch.compile(function, **options)


def has_python_headers() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


@dataclass
class Call:
    """A competitor that is ready to be called.

    run: does the work once. Returns a tensor or a tuple of tensors, or its own time in seconds where `self_timed`.
    exact: the same mathematics in float64 for the rows `rows` of the outputs, in the same structure; None leaves them unchecked.
    rows: rows of the outputs that are checked; None for all.
    grad: run with autograd on. Everything else runs under `torch.inference_mode`.
    note: what a reader should know, such as the time a compilation took.
    first_seconds: how long the first call took, once there was one; it warms up.
    """

    run: Callable[[], Any]
    exact: Callable[[], Any] | None = None
    rows: Tensor | None = None
    self_timed: bool = False
    grad: bool = False
    note: str = ""
    first_seconds: float | None = None


@dataclass(frozen=True)
class Competitor:
    """Somebody who does the work of a case.

    name: as tables show it. build: makes the call; it seeds itself, so that every process builds the same. ours: the one that
    ratios are against, one in a case. package: the distribution whose version is recorded. memory: measure the peak memory of one
    call too, which takes a fresh process.
    """

    name: str
    build: Callable[[], Call]
    ours: bool = False
    package: str | None = None
    memory: bool = False


@dataclass(frozen=True)
class Target:
    """A figure that our time is held to: `must` at the least, `aim` if we can.

    figure: "speedup" (the time of `against` over ours), "share" (ours over the time of `against`), "rate" (ours over the rate of
    the matmul), "memory" (bytes beyond inputs and outputs, a thread), "memory share" (ours over that of `against`) or "seconds".
    """

    figure: str
    must: float
    aim: float | None = None
    against: str | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.figure in ("speedup", "rate")


@dataclass(frozen=True)
class Sweep:
    """A case that is one point of a curve: the curve's name, its axis and the place on it."""

    name: str
    axis: str
    value: float


@dataclass(frozen=True)
class Case:
    """One piece of work, done by all competitors in turns.

    macs: multiply-adds that the work needs. bytes: bytes that it has to move. Both are for the measured limits.
    seconds: about how long each competitor is measured. most_rounds: never more turns than this. timed: False for memory only.
    """

    name: str
    competitors: Sequence[Competitor]
    macs: float = 0.0
    bytes: float = 0.0
    targets: Sequence[Target] = field(default=())
    seconds: float = 2.0
    most_rounds: int = 60
    timed: bool = True
    sweep: Sweep | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
