"""The multi-scale architecture: half of the channels leaves, the rest goes on."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ._sizes import check_rows, parse_sizes
from .chain import Chain


class FactorOut(nn.Module):
    """Half of the channels leaves as noise, and the rest goes through more layers (RealNVP, Dinh et al. 2016, section 3.6).

        kept, left = the first C // 2 channels of x, the others
        z = [left, rest(kept)], each flattened row by row;   logabsdet = that of rest

    A learned prior of what leaves given what is kept (Glow, Kingma and Dhariwal 2018) needs nothing here. It is a conditional affine
    layer just before: `AffineCoupling(conditioner, part="second_half", scale=ScaleMap.exp(), form="divide")`.

    Args:
        shape: shape of one row of x, (C, H, W) or (D,).
        rest: layers for what is kept; the last of them returns [batch, features].

    Raises:
        ValueError: shape is none, or there are fewer than two channels; or x or z has another shape, or what rest returns.
    """

    def __init__(self, shape: Sequence[int], rest: Iterable[nn.Module]) -> None:
        super().__init__()
        self.shape = parse_sizes("shape", shape)
        if self.shape[0] < 2:
            raise ValueError(f"shape must have at least 2 channels, of which half leaves; got {self.shape}")
        self.rest = Chain(rest)
        self._kept = self.shape[0] // 2
        self._left = (self.shape[0] - self._kept, *self.shape[1:])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_rows("x", x, self.shape)
        z, logabsdet = self.rest(x[:, : self._kept], context)
        rest = math.prod(self.shape) - math.prod(self._left)
        if z.dim() != 2 or z.shape[1] != rest:
            raise ValueError(f"the last layer of rest must return flat noise, [batch, {rest}]; got {list(z.shape)}: add a layers.Reshape")
        return torch.cat([x[:, self._kept :].flatten(1), z], 1), logabsdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_rows("z", z, (math.prod(self.shape),))
        size = math.prod(self._left)
        kept, logabsdet = self.rest.inverse(z[:, size:], context)
        return torch.cat([kept, z[:, :size].reshape(z.shape[0], *self._left)], 1), logabsdet

    def extra_repr(self) -> str:
        return f"shape={self.shape}"
