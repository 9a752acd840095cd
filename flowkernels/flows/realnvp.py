"""Real-valued non-volume-preserving flow."""

from collections.abc import Sequence

from torch import nn

from ..layers import MLP, AffineCoupling, FactorOut, FlowBatchNorm, Permute, Reshape, Squeeze
from ..layers._sizes import parse_count, parse_image_shape, parse_shape, parse_widths
from .base import Base
from .flow import Flow
from .networks import ResNet


class RealNVP(Flow):
    """RealNVP (Dinh et al. 2016, arXiv 1605.08803): affine couplings with batch norm between them; both directions are parallel.

    The scale is exp(a * tanh(s)) with a learned a for each coupling. For a number of features, the couplings alternate between odd
    and even features and have MLPs as conditioners. For images it is the paper's multi-scale model, with residual networks:

        at each level but the last: 3 checkerboard couplings, squeeze, 3 channel couplings, half of the channels leaves
        at the last level:          4 checkerboard couplings

    What leaves is, as in the authors' code, one diagonal of each 2 x 2 square. Hidden channels double at each squeeze.

    Args:
        shape: number of features, or (C, H, W).
        context_features: width of the context; 0 for none. It joins the input of every conditioner, as constant channels for images.
        batch_norm: flow batch norm after each coupling; in training mode a density then depends on the batch it is in.
        transforms: number of couplings, for a number of features.
        hidden_features: widths of each MLP's hidden layers, for a number of features.
        levels: number of scales, for images.
        blocks: residual blocks of each conditioner, for images.
        hidden_channels: channels inside the conditioners of the first level, for images.
        base: base distribution of the noise; standard normal by default.

    Raises:
        ValueError: there are fewer than two features to split, or height or width cannot be halved once for each level but the last.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        context_features: int = 0,
        batch_norm: bool = True,
        transforms: int = 6,
        hidden_features: Sequence[int] = (256, 256),
        levels: int = 2,
        blocks: int = 8,
        hidden_channels: int = 64,
        base: Base | None = None,
    ) -> None:
        shape = parse_shape(shape)
        transforms, levels = parse_count("transforms", transforms), parse_count("levels", levels)
        blocks, hidden_channels = parse_count("blocks", blocks), parse_count("hidden_channels", hidden_channels)
        if len(shape) == 1:
            layers = _vector_layers(shape[0], context_features, batch_norm, transforms, parse_widths(hidden_features))
        else:
            _check_sizes(shape, levels)
            layers = _Scales(context_features, batch_norm, blocks).layers(shape, levels, hidden_channels)
        super().__init__(layers, shape, context_features=context_features, base=base)


def _vector_layers(
    features: int, context_features: int, batch_norm: bool, transforms: int, hidden_features: Sequence[int]
) -> list[nn.Module]:
    if features < 2:
        raise ValueError(f"shape must have at least 2 features to split; got {features}")
    layers: list[nn.Module] = []
    for i in range(transforms):
        part, transformed = ("even", (features + 1) // 2) if i % 2 else ("odd", features // 2)
        conditioner = MLP(features - transformed, hidden_features, 2 * transformed, context_features=context_features)
        layers.append(AffineCoupling(conditioner, part=part, scale_parameter=1.0, interleaved=True))
        if batch_norm:
            layers.append(FlowBatchNorm(features))
    return layers


class _Scales:
    """Makes the layers of the multi-scale model."""

    def __init__(self, context_features: int, batch_norm: bool, blocks: int) -> None:
        self.context_features, self.batch_norm, self.blocks = context_features, batch_norm, blocks

    def layers(self, shape: Sequence[int], levels: int, hidden_channels: int) -> list[nn.Module]:
        """What maps an image of this shape to its noise."""
        c, h, w = shape
        if levels == 1:
            return [*self._couplings("checkerboard_even", "checkerboard_odd", 4, c, hidden_channels), Reshape(shape, (c * h * w,))]
        squeezed = (4 * c, h // 2, w // 2)
        return [
            *self._couplings("checkerboard_even", "checkerboard_odd", 3, c, hidden_channels),
            Squeeze(),
            *self._couplings("second_half", "first_half", 3, 4 * c, 2 * hidden_channels),
            Permute(_diagonals_first(c)),
            FactorOut(squeezed, self.layers((2 * c, h // 2, w // 2), levels - 1, 2 * hidden_channels)),
        ]

    def _couplings(self, even: str, odd: str, count: int, channels: int, hidden_channels: int) -> list[nn.Module]:
        checkerboard = even.startswith("checkerboard")
        inputs, outputs = (channels, 2 * channels) if checkerboard else (channels // 2, channels)
        layers: list[nn.Module] = []
        for i in range(count):
            conditioner = ResNet(inputs, hidden_channels, outputs, self.blocks, context_features=self.context_features)
            # a begins as in the authors' code
            layers.append(AffineCoupling(conditioner, part=odd if i % 2 else even, scale_parameter=0.0 if checkerboard else 1.0))
            if self.batch_norm:
                layers.append(FlowBatchNorm(channels, eps=1e-4, affine=False))
        return layers


def _diagonals_first(channels: int) -> list[int]:
    """Order of squeezed channels: top left and bottom right of every 2 x 2 square, then the other two."""
    return [4 * c + site for pair in ((0, 3), (1, 2)) for c in range(channels) for site in pair]


def _check_sizes(shape: Sequence[int], levels: int) -> None:
    _, height, width = parse_image_shape("shape", shape, levels - 1, f"at each of {levels} levels but the last")
    if height * width < 2 * 4 ** (levels - 1):
        raise ValueError(f"shape must have at least 2 sites at the last of {levels} levels; got {height} x {width}")
