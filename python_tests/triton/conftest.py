"""The Triton kernels: on a GPU where there is one, elsewhere in Triton's interpreter, which python_tests/conftest.py turns on."""

from pathlib import Path

import pytest
import torch

import flowkernels
from flowkernels import _triton

GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        if GPU:
            item.add_marker(pytest.mark.gpu)
        if not _triton.installed():
            item.add_marker(pytest.mark.skip(reason="Triton is not installed: make triton"))


@pytest.fixture(autouse=True)
def _triton_is_chosen():
    with flowkernels.backend("triton"):
        yield
