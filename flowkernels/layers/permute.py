"""Fixed permutations of the features or channels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._zero import zero_logabsdet
from .masked_autoregressive import parse_order


class Permute(nn.Module):
    """z[:, k] = x[:, permutation[k]]; volume-preserving. Of an image it permutes the channels.

    Args:
        permutation: [features], or "descending" with `features` to reverse.
        features: number of features, needed where permutation is a word.
    """

    def __init__(self, permutation: str | Sequence[int] | Tensor, features: int | None = None) -> None:
        super().__init__()
        if isinstance(permutation, str) and features is None:
            raise ValueError(f"features must be given with permutation={permutation!r}; got None")
        permutation = parse_order(permutation, len(permutation) if features is None else features)
        self.register_buffer("permutation", permutation)

    @classmethod
    def random(cls, features: int, generator: torch.Generator | None = None) -> "Permute":
        """A permutation drawn uniformly."""
        return cls(torch.randperm(features, generator=generator))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, self.permutation], zero_logabsdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z[:, torch.argsort(self.permutation)], zero_logabsdet(z)
