"""Timing in turns: all competitors take part in every round, so that a noisy moment falls on all of them."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from .case import Call

TURN_SECONDS = 0.004  # a turn lasts at least this long; a quick call is repeated in it
QUICK_SECONDS = 0.05  # a turn of a quick call begins with an untimed one, which brings its data back into the caches
SLOW_SECONDS = 0.5  # one call is warm-up enough
LEAST_ROUNDS = 2


@dataclass
class Timing:
    """Seconds of one call: one entry for each turn, with the round it was in.

    calls: a turn is the mean over so many calls. warm: an untimed call precedes them.
    """

    calls: int
    warm: bool
    seconds: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.seconds)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile, by linear interpolation."""
    first, third = torch.tensor(list(values), dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    return first, third


def measure(calls: Sequence[Call], *, seconds: float, most_rounds: int, device: torch.device) -> list[Timing]:
    """Time the calls in turns, each for about `seconds` and at least twice.

    A slow call sits out most rounds, evenly, rather than having the others measured as seldom as itself.
    """
    timings, turns = [], []
    for call in calls:
        once = _warm_up(call, device)
        timing = Timing(calls=max(1, math.ceil(TURN_SECONDS / once)), warm=once < QUICK_SECONDS)
        if call.self_timed:
            timing = Timing(calls=1, warm=False)
        timings.append(timing)
        spent = once * (timing.calls + timing.warm)
        turns.append(min(most_rounds, max(LEAST_ROUNDS, int(seconds / spent))))
    rounds = max(turns)
    for number in range(rounds):
        for call, timing, count in zip(calls, timings, turns, strict=True):
            if (number + 1) * count // rounds > number * count // rounds:
                if timing.warm:
                    _timed(call, 1, device)
                timing.seconds.append(_timed(call, timing.calls, device))
                timing.rounds.append(number)
    return timings


def _warm_up(call: Call, device: torch.device) -> float:
    if call.first_seconds is None:
        call.first_seconds = _timed(call, 1, device)
    compiles = device.type == "cuda"  # in the first call, which then says nothing of those that follow
    if call.self_timed or (call.first_seconds > SLOW_SECONDS and not compiles):
        return max(call.first_seconds, 1e-7)
    return max(_timed(call, 1, device), 1e-7)


def _timed(call: Call, repeats: int, device: torch.device) -> float:
    """Mean seconds of a call."""
    with torch.inference_mode(not call.grad):
        if call.self_timed:
            return sum(call.run() for _ in range(repeats)) / repeats
        run, wait = call.run, waiter(device)
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        wait()
        return (time.perf_counter() - start) / repeats


def waiter(device: torch.device) -> Callable[[], None]:
    """Waits for what a device has been given to do."""
    return torch.cuda.synchronize if device.type == "cuda" else _nothing


def _nothing() -> None:
    pass
