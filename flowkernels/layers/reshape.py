"""Another shape for the same numbers."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ._sizes import check_rows, parse_sizes
from ._zero import zero_logabsdet


class Reshape(nn.Module):
    """z = x with another shape, its elements in the same order; volume-preserving.

    Args:
        before: shape of one row of x, such as (3, 32, 32).
        after: shape of one row of z, such as (3072,).

    Raises:
        ValueError: they are no shapes, or have another number of elements; or x has another shape.
    """

    def __init__(self, before: Sequence[int], after: Sequence[int]) -> None:
        super().__init__()
        self.before, self.after = parse_sizes("before", before), parse_sizes("after", after)
        if math.prod(self.before) != math.prod(self.after):
            raise ValueError(f"after must have as many elements as before, {self.before}; got {self.after}")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _reshaped("x", x, self.before, self.after), zero_logabsdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _reshaped("z", z, self.after, self.before), zero_logabsdet(z)

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}"


def _reshaped(name: str, value: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    check_rows(name, value, before)
    return value.reshape(value.shape[0], *after)
