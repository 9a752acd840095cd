"""Conditioners of the coupling flows: what they are called with, and the context where there is one, to shifts and raw scales."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """ReLU network with a linear output; the context joins its input.

    Args:
        features: width of x.
        hidden_features: widths of the hidden layers.
        outputs: width of what is returned.
        context_features: width of the context; 0 for none.

    Shape:
        x: [batch, features]; context: [batch, context_features]; output: [batch, outputs].
    """

    def __init__(self, features: int, hidden_features: Sequence[int], outputs: int, *, context_features: int = 0) -> None:
        super().__init__()
        if not hidden_features or min(hidden_features) < 1:
            raise ValueError(f"hidden_features must be widths of at least 1; got {tuple(hidden_features)}")
        widths = [features + context_features, *hidden_features]
        parts: list[nn.Module] = []
        for inputs, width in pairwise(widths):
            parts += [nn.Linear(inputs, width), nn.ReLU(inplace=True)]
        self.net = nn.Sequential(*parts, nn.Linear(widths[-1], outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x if context is None else torch.cat([x, context], 1))


class WeightNormConv2d(nn.Conv2d):
    """Convolution with normalised weights, gain * v / |v| for each output channel (Salimans and Kingma 2016).

    `torch.nn.utils.parametrizations.weight_norm` computes the same, but a module that has it cannot be pickled.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__(inputs, outputs, kernel_size, padding=kernel_size // 2)
        self.gain = nn.Parameter(torch.linalg.vector_norm(self.weight.detach(), dim=(1, 2, 3), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, torch._weight_norm(self.weight, self.gain, 0), self.bias)


class _Block(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))): a residual block of He et al. (2016), activations first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_in, self.conv_in = nn.BatchNorm2d(channels), WeightNormConv2d(channels, channels, 3)
        self.norm_out, self.conv_out = nn.BatchNorm2d(channels), WeightNormConv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.relu(self.norm_in(x)))
        return x + self.conv_out(F.relu(self.norm_out(h)))


class ResNet(nn.Module):
    """Residual network with weight norm and batch norm (RealNVP, Dinh et al. 2016, section 4.1).

    The context joins the input as channels of constant value.

    Args:
        channels: channels of x.
        hidden_channels: channels inside.
        outputs: channels of what is returned.
        blocks: number of residual blocks.
        context_features: width of the context; 0 for none.

    Shape:
        x: [batch, channels, H, W]; context: [batch, context_features]; output: [batch, outputs, H, W].
    """

    def __init__(self, channels: int, hidden_channels: int, outputs: int, blocks: int, *, context_features: int = 0) -> None:
        super().__init__()
        self.conv_in = WeightNormConv2d(channels + context_features, hidden_channels, 3)
        self.blocks = nn.Sequential(*(_Block(hidden_channels) for _ in range(blocks)))
        self.norm_out, self.conv_out = nn.BatchNorm2d(hidden_channels), WeightNormConv2d(hidden_channels, outputs, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = torch.cat([x, context[:, :, None, None].expand(*context.shape, *x.shape[2:])], 1)
        return self.conv_out(F.relu(self.norm_out(self.blocks(self.conv_in(x)))))
