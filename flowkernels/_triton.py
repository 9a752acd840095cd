"""Triton kernels: which ops have one, whether it can serve a device, and its launch. Triton is imported at the first launch."""

import functools
import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec

import torch

from ._dtypes import FLOATING

_CAPABILITY = (8, 0)  # Triton supports NVIDIA GPUs from here on, and our kernels are compiled for nothing older
_modules: dict[str, str] = {}


def add(op: str, module: str) -> None:
    """`op`_triton in `module` is the Triton implementation of flowkernels::`op`."""
    _modules[op] = module


def ops() -> list[str]:
    """The ops that have a Triton kernel, whatever this machine can run."""
    return list(_modules)


def installed() -> bool:
    """Whether Triton can be found; it is not imported."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def why_not(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the Triton kernel of `op` cannot serve tensors of `dtype` on `device`; None where it can."""
    if device.type == "cuda":
        return _why_not_on_cuda(op, device, dtype)  # remembered: it stands on the way to every launch
    if device.type != "cpu" or not interpreting():
        return f"Triton kernels serve cuda, and the CPU only under TRITON_INTERPRET=1; got tensors on {device}"
    return _why_not_at_all(op, dtype)


def launch(op: str, *args):
    """Run the Triton kernel of `op` on the device of its first argument."""
    device = args[0].get_device()  # -1 on the CPU
    if device < 0 or device == torch.cuda.current_device():
        return _launcher(op)(*args)
    with torch.cuda.device(device):
        return _launcher(op)(*args)


@functools.cache
def _why_not_on_cuda(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if torch.cuda.is_available() and torch.version.hip is None:
        got = torch.cuda.get_device_capability(device)
        if got < _CAPABILITY:
            return f"Triton kernels need compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]}; {device} has {got[0]}.{got[1]}"
    return _why_not_at_all(op, dtype)


def _why_not_at_all(op: str, dtype: torch.dtype) -> str | None:
    if op not in _modules:
        return f"{op} has no Triton kernel"
    if dtype not in FLOATING:
        return f"Triton kernels take floating point; got {dtype}"
    if not installed():
        return "Triton is not installed: pip install triton"
    try:
        _launcher(op)
    except Exception as error:  # a Triton that does not fit its Python, torch or driver fails in many ways
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def _launcher(op: str) -> Callable:
    return getattr(importlib.import_module(_modules[op]), f"{op}_triton")
