"""Which implementation serves an op: automatic by the tensor's device, or chosen by hand."""

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from . import _extension, _triton
from ._library import library
from ._torch import when_cuda_starts

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
_DEVICE_OF = {"cpp": "cpu", "cuda": "cuda"}


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


_FROM_ENVIRONMENT = _known(os.environ.get("FLOWKERNELS_BACKEND", "auto"), "FLOWKERNELS_BACKEND")


class _Choice(threading.local):
    def __init__(self) -> None:
        self.name = _FROM_ENVIRONMENT
        self.loop_weights = torch.float32


_choice = _Choice()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of every op that is called inside a `with` block, in this thread. Gradients follow the calls that they are
    gradients of, wherever they are asked for.

    Args:
        name: "auto" (the tensor's device decides, and the reference serves where nothing was compiled), "reference"
            (plain PyTorch), "cpp" (compiled CPU kernels), "cuda" (CUDA C++ kernels) or "triton".

    Raises:
        ValueError: the name is unknown.
        RuntimeError: raised by the op that is called inside, where the device or the build does not have it. Only "auto" falls back. What
            an op leaves to torch by its size or dtype (matrices of more than 256 rows, conditioners of more than 512 hidden channels or in
            half precision) is torch's under any choice.
    """
    before = _choice.name
    _choice.name = _known(name, "backend")
    _route_cpu_to_triton()
    try:
        yield
    finally:
        _choice.name = before


@contextmanager
def loop_weights(dtype: torch.dtype) -> Iterator[None]:
    """Choose how the CUDA kernel of the sequential loop holds the weights of float32 networks, for calls inside a `with` block, in this
    thread: those of MAF and IAF that ask for no gradient, in either direction. Everything else computes as it does outside.

    With torch.bfloat16 each matrix W of a network is rounded, W' = W.bfloat16().float(), relative error at most 2^-8, so that half the
    bytes stream through a multiprocessor and a stage holds twice as many weights; sums are in float32, biases, context and x as they
    are. A flow that is in bfloat16 itself is served so without asking, as its weights lose nothing. Not made for gradients, for which
    samples and their derivatives would belong to different networks.

    Args:
        dtype: torch.float32, exact, or torch.bfloat16.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"loop_weights must be torch.float32 or torch.bfloat16; got {dtype!r}")
    before = _choice.loop_weights
    _choice.loop_weights = dtype
    try:
        yield
    finally:
        _choice.loop_weights = before


def rounds_loop_weights(x: torch.Tensor) -> bool:
    """Whether the loop was allowed to round the weights of a call for x without gradient."""
    return _choice.loop_weights is torch.bfloat16 and x.is_cuda and x.dtype is torch.float32


def chosen() -> str:
    """The name of the choice in force."""
    return _choice.name


def as_called(backward: Callable) -> Callable:
    """The backward of an autograd.Function under the choice that its call was made under, `ctx.backend = chosen()`. A GPU's gradients are
    asked for by another thread, in which nothing was chosen."""

    @functools.wraps(backward)
    def run(ctx, *cotangents):
        if ctx.backend == _choice.name:
            return backward(ctx, *cotangents)
        with backend(ctx.backend):
            return backward(ctx, *cotangents)

    return run


def prefers_compiled() -> bool:
    """Whether compiled kernels may serve, by choice or because nothing was chosen."""
    return _choice.name in ("auto", "cpp")


def wants_reference(op: str, device: torch.device) -> bool:
    """Whether a call of `op` on `device` is to run the reference by choice; False leaves it to the dispatcher."""
    name = _choice.name
    if name == "auto":
        return False
    if name == "reference":
        return True
    if name == "triton":
        if torch.compiler.is_compiling():  # the kernel's own check runs with the graph
            return False
        why_not = _triton.why_not(op, device)
    elif device.type != _DEVICE_OF[name]:
        why_not = f"{op} was called with tensors on {device}; it serves {_DEVICE_OF[name]}"
    elif name == "cuda" and op in _triton.ops():
        why_not = f"{op} has no CUDA C++ kernel: on CUDA it is a Triton kernel"
    else:
        why_not = _extension.status().why_not(op, name.replace("cpp", "cpu").upper())
        why_not = why_not or (_extension.unserved_gpus.get(device.index) if name == "cuda" else None)
    if why_not is not None:
        raise RuntimeError(f"backend {name!r} was chosen, but {why_not}")
    return False


def register_triton(op: str, module: str, reference: Callable) -> None:
    """Let the Triton kernel of `op` (`op`_triton in `module`) serve CUDA tensors, if Triton can be found.

    `reference`, which has the op's signature, serves what the kernel cannot, unless "triton" was chosen by hand.
    """
    _triton.add(op, module)
    if not _triton.installed():
        return

    def serve(*args):
        why_not = _triton.why_not(op, args[0].device, args[0].dtype)
        if why_not is None:
            return _triton.launch(op, *args)
        if _choice.name == "triton":
            raise RuntimeError(f"backend 'triton' was chosen, but {why_not}")
        _say_once(why_not)
        return reference(*args)

    library.impl(op, serve, "CUDA")
    _route_cpu_to_triton()


@functools.cache
def _say_once(why_not: str) -> None:
    warnings.warn(f"flowkernels: {why_not}. Until then the reference serves in the place of Triton kernels", stacklevel=2)


def look_at_gpus_later() -> None:
    """When CUDA is first used, say once why the compiled library cannot serve, and let the reference do so on such GPUs."""
    status = _extension.status()
    if status.cuda_library or isinstance(status.cuda_error, _extension.CannotLoadError):
        when_cuda_starts(_look_at_gpus)  # as torch checks its own binaries


def _look_at_gpus() -> None:
    reasons = list(_extension.find_unserved_gpus().values())
    if isinstance(_extension.status().cuda_error, _extension.CannotLoadError):
        reasons.append(str(_extension.status().cuda_error))
    for reason in reasons:
        warnings.warn(f"flowkernels: {reason}. Until then the reference serves in the place of CUDA C++ kernels", stacklevel=2)
    if _extension.unserved_gpus:
        for op in _extension.cuda_ops():
            if op not in _triton.ops():
                _route_unserved_gpus(op)


def _route_unserved_gpus(op: str) -> None:
    # what other devices run is the reference
    kernel, reference = (torch.library.get_kernel(f"flowkernels::{op}", key) for key in ("CUDA", "MPS"))

    def serve(keys, *args):
        return (reference if args[0].device.index in _extension.unserved_gpus else kernel).call_boxed(keys, *args)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden
        library.impl(op, serve, "CUDA", with_keyset=True, allow_override=True)


def _route_cpu_to_triton() -> None:
    """If Triton's interpreter was chosen: CPU tensors go there while "triton" is chosen, and where they went before otherwise."""
    if _choice.name == "triton" and _triton.interpreting():
        for op in _triton.ops():
            _route_cpu_op(op)


@functools.cache
def _route_cpu_op(op: str) -> None:
    before = torch.library.get_kernel(f"flowkernels::{op}", "CPU")

    def serve(keys, *args):
        return _triton.launch(op, *args) if _choice.name == "triton" else before.call_boxed(keys, *args)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden
        library.impl(op, serve, "CPU", with_keyset=True, allow_override=True)
