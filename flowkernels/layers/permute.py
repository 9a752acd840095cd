"""Fixed permutations of the features or channels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._building import built_on_cpu
from ._sizes import check_channels, parse_count
from ._structure import Structured
from ._zero import zero_logabsdet
from .masked_autoregressive import parse_order


class Permute(Structured):
    """z[:, k] = x[:, permutation[k]]; volume-preserving. Of an image it permutes the channels.

    Args:
        permutation: [features]; or "descending", to reverse, or "ascending", with `features`.
        features: number of features, needed where permutation is a word.

    Raises:
        ValueError: the permutation is none, or x has another number of features.
    """

    @built_on_cpu
    def __init__(self, permutation: str | Sequence[int] | Tensor, features: int | None = None) -> None:
        super().__init__()
        if isinstance(permutation, str) and features is None:
            raise ValueError(f"features must be given with permutation={permutation!r}; got None")
        if not isinstance(permutation, str) and torch.as_tensor(permutation).dim() == 0:
            raise ValueError(f"permutation must be a sequence of indices; got {permutation!r}: Permute.random(features) draws one")
        self.features = parse_count("features", len(permutation) if features is None else features)
        self.register_integers("permutation", parse_order(permutation, self.features, "permutation"))

    @classmethod
    def random(cls, features: int, generator: torch.Generator | None = None) -> "Permute":
        """A permutation drawn uniformly."""
        device = "cpu" if generator is None else generator.device
        return cls(torch.randperm(features, generator=generator, device=device))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("x", x, self.features)
        return x[:, self.permutation], zero_logabsdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("z", z, self.features)
        return z[:, torch.argsort(self.permutation)], zero_logabsdet(z)
