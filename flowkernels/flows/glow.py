"""Glow: actnorm, invertible 1x1 convolutions and couplings at several scales."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ActNormConv1x1, AdditiveCoupling, AffineCoupling, FactorOut, Reshape, Squeeze
from ..layers._dtype import check_dtype
from ..layers._sizes import parse_count, parse_image_shape
from ..ops import ScaleMap
from .flow import Flow
from .glow_steps import SCALE, GlowSteps
from .networks import ConvNet, ZeroConv2d


class Glow(Flow):
    """Glow (Kingma and Dhariwal 2018, arXiv 1807.03039): a flow of images; both directions are parallel.

        at each level: squeeze, `steps` times (actnorm, 1x1 convolution, coupling), and, but at the last, half of the channels leaves

    The first half of the channels conditions the second: y = (x + shift) * sigmoid(s + 2), or y = x + shift in additive couplings.
    As in the authors' code, channel 2i of the conditioner is the shift and 2i + 1 the raw scale s. What leaves has a learned Gaussian
    prior given what is kept, and the last level has one of its own: they are affine maps to standard noise, (x - mean) / exp(log_scale).
    z is flat: the parts in the order in which they left, then the last level.

    The first batch in training initialises the actnorms; before it, the flow can neither score in evaluation mode nor sample.

    Under autocast the 1x1 convolutions take its dtype too, and with them what passes from step to step: bfloat16 leaves a round trip an
    error of 0.01 and more, and densities one of 0.003 bits per dimension. Score without it.

    Args:
        image_shape: (C, H, W).
        levels: number of scales; each halves H and W.
        steps: actnorms, convolutions and couplings at each level.
        hidden_channels: channels inside the conditioners.
        coupling: "affine" or "additive".
        context_features: width of the context; 0 for none. It joins the input of every conditioner and split prior, as constant
            channels, and the last level's prior is affine in it.
        parametrization: of the 1x1 convolutions, "lu" or "plain"; see `layers.InvertibleConv1x1`.

    Raises:
        ValueError: height or width cannot be halved once for each level, or an argument is out of range.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        levels: int,
        steps: int,
        hidden_channels: int = 512,
        coupling: str = "affine",
        context_features: int = 0,
        parametrization: str = "lu",
    ) -> None:
        levels, steps = parse_count("levels", levels), parse_count("steps", steps)
        hidden_channels = parse_count("hidden_channels", hidden_channels)
        if coupling not in ("affine", "additive"):
            raise ValueError(f"coupling must be 'affine' or 'additive'; got {coupling!r}")
        image_shape = parse_image_shape("image_shape", image_shape, levels, f"at each of {levels} levels")

        def make_coupling(channels: int) -> nn.Module:
            outputs = channels if coupling == "affine" else channels // 2
            conditioner = ConvNet(channels // 2, hidden_channels, outputs, context_features=context_features)
            if coupling == "additive":
                return AdditiveCoupling(conditioner)
            return AffineCoupling(conditioner, scale=SCALE, form="shift_scale", interleaved=True)

        def make_level(level: int, c: int, h: int, w: int) -> list[nn.Module]:
            c, h, w = 4 * c, h // 2, w // 2
            layers = [Squeeze(), GlowSteps([ActNormConv1x1(c, parametrization=parametrization), make_coupling(c)] for _ in range(steps))]
            if level == levels:
                return [*layers, _Prior(c, context_features), Reshape((c, h, w), (c * h * w,))]
            conditioner = ZeroConv2d(c // 2, c, context_features=context_features)
            prior = AffineCoupling(conditioner, scale=ScaleMap.exp(), form="divide", interleaved=True)
            return [*layers, prior, FactorOut((c, h, w), make_level(level + 1, c // 2, h, w))]

        super().__init__(make_level(1, *image_shape), image_shape, context_features=context_features)


class _Prior(nn.Module):
    """z = (x - mean) / exp(log_scale), for each channel; mean and log_scale are affine in the context and start at zero."""

    def __init__(self, channels: int, context_features: int = 0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2 * channels))
        self.weight = nn.Parameter(torch.zeros(2 * channels, context_features)) if context_features else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_scale, logabsdet = self._moments(x, context)
        return (x - mean) * (-log_scale).exp(), logabsdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_scale, logabsdet = self._moments(z, context)
        return z * log_scale.exp() + mean, -logabsdet

    def _moments(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        check_dtype(self.bias, x=x, context=context)
        both = self.bias[None] if self.weight is None else F.linear(context, self.weight, self.bias)
        mean, log_scale = both[:, :, None, None].chunk(2, 1)
        logabsdet = -x.shape[2:].numel() * log_scale.to(torch.promote_types(x.dtype, torch.float32)).sum((1, 2, 3))
        return mean, log_scale, logabsdet.expand(x.shape[0])
