"""Where the Triton tests put their tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def randn(*shapes: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """The same numbers on every device and in every dtype, rounded."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def assert_rounded(got: Tensor, want: Tensor) -> None:
    """`got` is `want`, a result in float32, in half precision: rounded by a GPU, truncated to bfloat16 by the interpreter."""
    if GPU or got.dtype == torch.float16:
        assert torch.equal(got, want.to(got.dtype))
    else:
        assert ((got - want).abs() <= torch.finfo(got.dtype).eps * want.abs()).all()
