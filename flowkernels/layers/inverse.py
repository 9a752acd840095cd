"""A layer with its two directions swapped."""

from torch import Tensor, nn


class Inverse(nn.Module):
    """Swap the directions of a layer: forward of Inverse(layer) is layer.inverse, and the other way round.

    This is how noise-to-data models (IAF, other libraries' conventions) are made of data-to-noise layers.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer(z, context)
