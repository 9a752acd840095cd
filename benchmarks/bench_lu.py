"""Log-determinants and inverses of the weights of a Glow: 96 matrices of C rows."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import flowkernels
from flowkernels.ops import slogdet, slogdet_inverse

from .case import Call, Case, Competitor, Target

MATRICES = 96
ONE_BY_ONE, BATCHED = "torch one by one", "torch batched"


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer, and fewer turns."""
    return [case for channels in ((12, 48) if quick else (12, 24, 48, 96, 192)) for case in _cases(channels, quick, device)]


def _cases(channels: int, quick: bool, device: torch.device) -> Iterator[Case]:
    # rotations that training has moved
    g = torch.Generator().manual_seed(channels)
    rotation = torch.linalg.qr(torch.randn(MATRICES, channels, channels, generator=g, dtype=torch.float64))[0]
    w = (rotation + 0.3 / channels**0.5 * torch.randn(rotation.shape, generator=g, dtype=torch.float64)).float().to(device)
    seconds, floor = 0.3 if quick else 2.0, MATRICES * channels**3
    must, aim = {12: (2, 4), 48: (2, 4), 96: (1.2, 2)}.get(channels, (None, None))
    targets = [] if must is None else [Target("speedup", must, aim, BATCHED)]

    def competitor(name: str, run: Callable[[], object], outputs: int, *, ours: bool = False) -> Competitor:
        # logabsdet and inverse; a sign is right or wrong as a whole, and shows in neither
        exact = partial(_exact, w, outputs)
        return Competitor(name, lambda: Call(run, exact), ours=ours, package="flowkernels" if ours else "torch")

    def reference() -> tuple[Tensor, ...]:
        with flowkernels.backend("reference"):
            return slogdet_inverse(w)[1:]

    yield Case(
        f"slogdet, {MATRICES} of C={channels}",
        [
            competitor("flowkernels", lambda: slogdet(w)[1], 1, ours=True),
            competitor("flowkernels in float64", lambda: slogdet(w, in_float64=True)[1], 1),
            competitor(BATCHED, lambda: torch.linalg.slogdet(w)[1], 1),
            competitor(ONE_BY_ONE, lambda: torch.stack([torch.linalg.slogdet(m)[1] for m in w]), 1),
        ],
        macs=floor / 3,
        bytes=4 * w.numel(),
        targets=targets,
        seconds=seconds,
        device=device,
    )
    targets = [Target("speedup", must, against=ONE_BY_ONE) for must in [{12: 20, 48: 8, 96: 4}.get(channels)] if must]
    yield Case(
        f"slogdet and inverse, {MATRICES} of C={channels}",
        [
            competitor("flowkernels", lambda: slogdet_inverse(w)[1:], 2, ours=True),
            competitor("reference", reference, 2),
            competitor(BATCHED, lambda: (torch.linalg.slogdet(w)[1], torch.linalg.inv(w)), 2),
            competitor(ONE_BY_ONE, lambda: _one_by_one(w), 2),
        ],
        macs=floor,
        bytes=8 * w.numel(),
        targets=targets,
        seconds=seconds,
        device=device,
    )


def _one_by_one(w: Tensor) -> tuple[Tensor, Tensor]:
    """As Glow codes do it, layer after layer."""
    return tuple(map(torch.stack, zip(*((torch.linalg.slogdet(m)[1], torch.linalg.inv(m)) for m in w), strict=True)))


def _exact(w: Tensor, outputs: int) -> Tensor | tuple[Tensor, Tensor]:
    """One by one: torch's batched call has been seen wrong in float64, with MKL on two threads."""
    logabsdet, inverse = _one_by_one(w.double())
    return (logabsdet, inverse) if outputs == 2 else logabsdet
