"""The CUDA kernels on a CPU (csrc/tests/emulated): every op that csrc/cuda has is one of `ops`, for CPU tensors.

What runs is the code that a GPU is given, launches included, a thread at a time. Races, reads beyond shared memory, copies that are used
before they have landed and threads that wait for different things are errors.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import flowkernels  # noqa: F401  # the ops' schemas

LIBRARY = Path(__file__).parents[1] / "_C_emulated.so"  # FLOWKERNELS_TESTS=1 python setup.py build_ext --inplace
OPS = (
    "autoregressive",
    "autoregressive_stack",
    "autoregressive_inverse_backward",
    "_autoregressive_training",
    "_autoregressive_backward",
    "slogdet",
    "slogdet_inverse",
)
ops = torch.ops.flowkernels_emulated

if LIBRARY.exists():
    torch.ops.load_library(LIBRARY)
    _library = torch.library.Library("flowkernels_emulated", "FRAGMENT")
    for _name in OPS:
        _library.define(str(getattr(torch.ops.flowkernels, _name).default._schema).split("::")[1])

needs_emulator = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the emulator is not there: FLOWKERNELS_TESTS=1 python setup.py build_ext --inplace"
)


class Device(NamedTuple):
    multiprocessors: int
    shared_per_block: int  # bytes
    shared_per_multiprocessor: int


H200 = Device(132, 227 * 1024, 228 * 1024)
A100 = Device(108, 163 * 1024, 164 * 1024)
ONE = Device(1, 227 * 1024, 228 * 1024)  # all rows of a batch in few tiles
TIGHT = Device(1, 60 * 1024, 64 * 1024)  # states that do not fit shared memory


class Order(IntEnum):
    """In which the threads of a warp, the warps of a block and the blocks of a grid run."""

    FORWARDS = 0
    BACKWARDS = 1
    SHUFFLED = 2


def run_on(
    device: Device,
    order: Order = Order.FORWARDS,
    seed: int = 0,
    most_delta_bytes: int = 1 << 20,
    layout: Sequence[int] = (),
    last_blocks: int = 0,
) -> None:
    """Everything from here on.

    Args:
        most_delta_bytes: as long as their deltas have no more, maps share launches for their parameters' gradients.
        layout: of the loop, for single maps (csrc/tests/emulated/cuda/launch.h); empty for the rule's.
        last_blocks: of a launch with more than 65,536, so many of the last alone run; 0 for all.
    """
    ops.set(device, most_delta_bytes, layout, order, seed, last_blocks)


@contextmanager
def unfilled_memory() -> Iterator[None]:
    """What is asked for is not filled with NaN, so that it may be more than there is."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        pytest.skip("the system promises no memory that it does not have")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def last_of_many(rows: torch.Tensor, n: int) -> torch.Tensor:
    """n rows, of which those given are the last, and the others are whatever is there."""
    many = rows.new_empty((n, *rows.shape[1:]))
    many[n - len(rows) :] = rows
    return many
