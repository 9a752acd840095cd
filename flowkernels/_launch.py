"""Launches of Triton kernels for little host time.

`kernel[grid](...)` binds, specializes and hashes every argument on every call, which takes longer than a small kernel runs. What that comes
to depends on shapes, strides, dtypes and options alone, and on which pointers are aligned. So an op keeps a plan for each combination
of the former (`Plans`), and each kernel in it (`Launch`) what Triton compiled, for each device and alignment; the next launch hands that
to the driver. The ordinary way is left to whatever is not known here: the interpreter, other versions of Triton, hooks, debug modes.
"""

import functools
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_KNOWN = triton.__version__.startswith(("3.6.", "3.7."))  # CompiledKernel.run takes the arguments that are given to it here
_MOST_PLANS = 1024
_LARGEST = (1 << 31) - 1  # integers beyond it have another type in the kernel


def cdiv(a: int, b: int) -> int:
    """a / b rounded up: triton.cdiv for host code, which takes 20 times longer there."""
    return -(-a // b)


class Plans(dict):
    """Plans by what they follow from; when there are too many, all are forgotten. The batch is no part of a key."""

    def add(self, key: Hashable, plan):
        if len(self) >= _MOST_PLANS:
            self.clear()
        self[key] = plan
        return plan


class Launch:
    """A kernel with the arguments that follow from a plan's key. Its others come first: tensors, then integers that are not specialized."""

    __slots__ = ("_compiled", "_constants", "_kernel", "_options")

    def __init__(self, kernel: Any, *constants: object, **options: object) -> None:
        self._kernel, self._constants, self._options = kernel, constants, options
        self._compiled: dict[Hashable, tuple] = {}

    def __call__(self, grid: tuple[int, int], tensors: Sequence[Tensor | None], *varying: int) -> None:
        """On the current stream of the tensors' device, which is the current one. Plans fix the tensors' dtypes, and which are None."""
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        device = tensors[0].get_device()
        key = (device, *[p & 15 == 0 for p in pointers]) if functools.reduce(operator.or_, pointers) & 15 else device
        found = self._compiled.get(key)
        if found is None or max(varying) > _LARGEST or _is_watched(self._kernel):
            self._launch_and_keep(key, grid, tensors, varying)
            return
        run, function, metadata, constants = found
        stream = driver.active.get_current_stream(device)
        run(*grid, 1, stream, function, metadata, None, None, None, *pointers, *varying, *constants)

    def _launch_and_keep(self, key: Hashable, grid: tuple[int, int], tensors: Sequence[Tensor | None], varying: tuple[int, ...]) -> None:
        compiled = self._ordinarily(grid, tensors, varying)
        if not (_KNOWN and isinstance(compiled, CompiledKernel) and max(varying) <= _LARGEST) or _is_watched(self._kernel):
            return
        names = self._kernel.arg_names[len(tensors) + len(varying) + len(self._constants) :]
        constants = (*self._constants, *(self._options[name] for name in names))
        self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, constants

    def _ordinarily(self, grid: tuple[int, int], tensors: Sequence[Tensor | None], varying: tuple[int, ...]) -> CompiledKernel | None:
        return self._kernel[grid](*tensors, *varying, *self._constants, **self._options)


def _is_watched(kernel: JITFunction) -> bool:
    """Whether somebody looks on at launches, or has them compiled in another way."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    hooks = getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks
    return bool(hooks or runtime.debug or knobs.compilation.instrumentation_mode)
