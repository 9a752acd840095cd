"""From grey levels to unbounded numbers: dequantisation and the logit, with their log-determinants."""

import math

import torch
from torch import Generator, Tensor, nn

from ._sizes import parse_count
from ._zero import zero_logabsdet


class Dequantize(nn.Module):
    """z = (x + U) / levels with uniform noise U in [0, 1): whole grey levels 0..levels - 1 become numbers in [0, 1).

        logabsdet = -D log(levels), that of the map from x + U

    The mean over U of log p(x + U) is a lower bound of log P(x) (Theis et al. 2016, section 3.1); with 256 levels in half precision it is
    none, as z has hardly a place for the noise: give float32. The inverse gives whole levels; what
    lies outside [0, 1) goes to the nearest. Values are not checked, because a check reads the data back to the host: that is for
    whoever loads them (`data.GreyLevels.check`).

    Integers become floating-point of torch's default dtype; a flow in another one is given x in that.

    Args:
        levels: number of grey levels, 256 for bytes.

    Shape:
        x, z: [batch, ...]; logabsdet: [batch], in nats.

    Raises:
        ValueError: levels is no whole number of at least 2.
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        self.levels = parse_count("levels", levels, 2)

    def forward(self, x: Tensor, context: Tensor | None = None, *, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        if not x.is_floating_point():
            x = x.to(torch.get_default_dtype())
        wide = torch.promote_types(x.dtype, torch.float32)
        z = (x.to(wide) + torch.rand(x.shape, dtype=wide, device=x.device, generator=generator)) / self.levels
        z = z.to(x.dtype)
        # rounding must not carry z over to another level, or to 1: a step of its last place brings it back
        level, eps = (z.to(wide) * self.levels).floor(), torch.finfo(z.dtype).eps
        z = torch.where(level > x, z * (1 - eps / 2), torch.where(level < x, z * (1 + eps), z))
        return z, zero_logabsdet(x) - x[:1].numel() * math.log(self.levels)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = (z.to(torch.promote_types(z.dtype, torch.float32)) * self.levels).floor().clamp(0, self.levels - 1).to(z.dtype)
        return x, zero_logabsdet(z) + z[:1].numel() * math.log(self.levels)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class Logit(nn.Module):
    """z = logit(p), p = alpha + (1 - 2 alpha) x (RealNVP, Dinh et al. 2016, section 4.1; MAF, Papamakarios et al. 2017, section 4.3).

        logabsdet = sum_i log(1 - 2 alpha) - log p_i - log(1 - p_i)

    Args:
        alpha: keeps p from 0 and 1; the papers take 0.05 for colour images and 1e-6 for MNIST.

    Shape:
        x, z: [batch, ...], x in [0, 1]; logabsdet: [batch], in nats. Where p is outside of [0, 1] z is NaN, which x is then by
        alpha / (1 - 2 alpha) and more; with alpha 0 z is infinite at 0 and 1.

    Raises:
        ValueError: alpha is less than 0, or 0.5 and more.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"alpha must be at least 0 and less than 0.5; got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # 1 - p would cancel where x is near 1
        log_p, log_q = (torch.log(self.alpha + (1 - 2 * self.alpha) * part) for part in (wide, 1 - wide))
        return (log_p - log_q).to(x.dtype), self._total(-log_p - log_q)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        x = (torch.sigmoid(wide) - self.alpha) / (1 - 2 * self.alpha)
        log_p, log_q = torch.nn.functional.logsigmoid(wide), torch.nn.functional.logsigmoid(-wide)
        return x.to(z.dtype), -self._total(-log_p - log_q)

    def _total(self, log_derivative: Tensor) -> Tensor:
        constant = log_derivative[:1].numel() * math.log1p(-2 * self.alpha)
        return log_derivative.flatten(1).sum(1) + constant

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
