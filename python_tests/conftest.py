"""What holds for every test: freshly allocated memory is NaN, so that an unwritten element cannot pass."""

import os
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()

# Both are read once, by the first import of Triton and by the first cuBLAS handle.
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from flowkernels.layers import masked_autoregressive  # noqa: E402

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

masked_autoregressive.INITIAL_OUTPUTS = 1.0  # near the identity nobody would see what a network gets wrong

TESTS_LIBRARY = Path(__file__).with_name("_C_tests.so")  # FLOWKERNELS_TESTS=1 python setup.py build_ext --inplace
if TESTS_LIBRARY.exists():
    torch.ops.load_library(TESTS_LIBRARY)

pytest.register_assert_rewrite("python_tests.battery")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
