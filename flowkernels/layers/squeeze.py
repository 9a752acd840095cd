"""Sites into channels."""

from torch import Tensor, nn

from ._sizes import parse_count
from ._zero import zero_logabsdet


class Squeeze(nn.Module):
    """Each 2 x 2 square of sites becomes 4 channels (RealNVP, Dinh et al. 2016, section 3.6); volume-preserving.

        z[b, 4c + 2i + j, h, w] = x[b, c, 2h + i, 2w + j]: [batch, C, H, W] -> [batch, 4C, H/2, W/2]

    Channels are in channel-major order: the four that come of one channel lie side by side.

    Args:
        factor: side of the squares; factor^2 channels come of one.

    Raises:
        ValueError: height or width cannot be divided by the factor.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = parse_count("factor", factor)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.dim() != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x must be [batch, C, H, W] with H and W divisible by {self.factor}; got {list(x.shape)}")
        # not pixel_unshuffle, which returns an empty batch with its old shape
        f, (b, c, h, w) = self.factor, x.shape
        squares = x.reshape(b, c, h // f, f, w // f, f).permute(0, 1, 3, 5, 2, 4)
        return squares.reshape(b, c * f * f, h // f, w // f), zero_logabsdet(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if z.dim() != 4 or z.shape[1] % self.factor**2:
            raise ValueError(f"z must be [batch, C, H, W] with C divisible by {self.factor**2}; got {list(z.shape)}")
        f, (b, c, h, w) = self.factor, z.shape
        squares = z.reshape(b, c // (f * f), f, f, h, w).permute(0, 1, 4, 2, 5, 3)
        return squares.reshape(b, c // (f * f), h * f, w * f), zero_logabsdet(z)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"
