"""A learned scale for each feature."""

import torch
from torch import Tensor, nn

from ..ops import channel_affine
from ._sizes import check_channels, parse_count


class DiagonalScale(nn.Module):
    """z = x * exp(log_scale), one factor for each feature: the only layer of NICE that changes volumes (Dinh et al. 2014, section 3.3).

        logabsdet = sum_i log_scale_i

    Args:
        features: number of features D.

    Shape:
        x, z: [batch, features]; logabsdet: [batch], in nats.

    Raises:
        ValueError: features is no whole number of at least 1, or x has another number of them.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(parse_count("features", features)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("x", x, len(self.log_scale))
        return channel_affine(x, None, self.log_scale)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("z", z, len(self.log_scale))
        return channel_affine(z, None, self.log_scale, inverse=True)

    def extra_repr(self) -> str:
        return f"features={len(self.log_scale)}"
