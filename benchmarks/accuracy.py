"""Error of a competitor against the same mathematics in float64."""

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .case import Call

# relative to the output's root mean square: float32 is off by 1e-7 to 1e-5, a wrong answer by far more
WRONG_RMS, WRONG_MAX = 1e-4, 1e-2


@dataclass(frozen=True)
class Accuracy:
    """Root mean square and largest error, relative to the root mean square of the exact output; the worst of all outputs."""

    rms: float
    max: float
    wrong: bool


def check(call: Call) -> Accuracy | None:
    """Run a call once and compare; None where there is nothing to compare with."""
    if call.exact is None:
        return None
    with torch.inference_mode(not call.grad):
        started = perf_counter()
        outputs = _tensors(call.run())
        call.first_seconds = perf_counter() - started
        exact = _tensors(call.exact())
    if len(outputs) != len(exact):
        raise ValueError(f"exact must have {len(outputs)} outputs, like run; got {len(exact)}")
    rms = largest = 0.0
    finite = True
    for got, wanted in zip(outputs, exact, strict=True):
        rows = got if call.rows is None else got[call.rows]
        if rows.shape != wanted.shape:
            raise ValueError(f"exact must have shape {list(rows.shape)}, like the checked rows; got {list(wanted.shape)}")
        finite &= bool(torch.isfinite(got).all() and torch.isfinite(wanted).all())
        error = (rows.to(wanted) - wanted).abs()
        scale = float(wanted.square().mean().sqrt()) or 1.0
        rms = max(rms, float(error.square().mean().sqrt()) / scale)
        largest = max(largest, float(error.max()) / scale)
    return Accuracy(rms, largest, not (finite and rms <= WRONG_RMS and largest <= WRONG_MAX))


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
