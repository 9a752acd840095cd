"""A layer with its two directions swapped."""

from torch import Tensor, nn


class Inverse(nn.Module):
    """Swap the directions of a layer: forward of Inverse(layer) is layer.inverse, and the other way round.

    This is how noise-to-data models (IAF, other libraries' conventions) are made of data-to-noise layers.

    Args:
        layer: a module with `forward(x, context)` and `inverse(z, context)`.

    Raises:
        TypeError: the layer has no inverse.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not callable(getattr(layer, "inverse", None)):
            raise TypeError(f"layer must have forward(x, context) and inverse(z, context), as layers have; got {type(layer).__name__}")
        self.layer = layer

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer(z, context)
