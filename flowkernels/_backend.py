"""Which implementation serves an op: automatic by the tensor's device, or chosen by hand."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import _extension

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
_DEVICE_OF = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}
_TRITON_OPS: frozenset[str] = frozenset()


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


class _Choice(threading.local):
    def __init__(self) -> None:
        self.name = _known(os.environ.get("FLOWKERNELS_BACKEND", "auto"), "FLOWKERNELS_BACKEND")


_choice = _Choice()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of every op inside a `with` block, in this thread.

    Args:
        name: "auto" (the tensor's device decides, and the reference serves where nothing was compiled), "reference"
            (plain PyTorch), "cpp" (compiled CPU kernels), "cuda" (CUDA C++ kernels) or "triton".

    Raises:
        ValueError: the name is unknown.
        RuntimeError: raised by the op that is called inside, when the choice cannot be honoured. Only "auto" falls back.
    """
    before = _choice.name
    _choice.name = _known(name, "backend")
    try:
        yield
    finally:
        _choice.name = before


def wants_reference(op: str, device: torch.device) -> bool:
    """Whether a call of `op` on `device` is to run the reference by choice; False leaves it to the dispatcher."""
    name = _choice.name
    if name == "auto":
        return False
    if name == "reference":
        return True
    if name == "triton" and op not in _TRITON_OPS:
        raise RuntimeError(f"backend 'triton' was chosen, but {op} has no Triton kernel; use 'auto' or 'reference'")
    if device.type != _DEVICE_OF[name]:
        raise RuntimeError(f"backend {name!r} was chosen, but {op} was called with tensors on {device}; it serves {_DEVICE_OF[name]}")
    key = {"cpp": "CPU", "cuda": "CUDA", "triton": "CUDA"}[name]
    why_not = _extension.status().why_not(op, key)
    if why_not is not None:
        raise RuntimeError(f"backend {name!r} was chosen, but {why_not}")
    return False
