"""Layers one after another, as one layer."""

from collections.abc import Iterable

from torch import Tensor, nn


class Chain(nn.Module):
    """z = layer_n(... layer_1(x)); logabsdet is the sum of theirs. The inverse goes back through them.

    Args:
        layers: modules with `forward(x, context)` and `inverse(z, context)`, each returning (output, logabsdet [batch]).
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not self.layers:
            raise ValueError("layers must hold at least one layer; got none")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = None
        for layer in self.layers:
            x, logabsdet = layer(x, context)
            total = logabsdet if total is None else total + logabsdet
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = None
        for layer in reversed(self.layers):
            z, logabsdet = layer.inverse(z, context)
            total = logabsdet if total is None else total + logabsdet
        return z, total
