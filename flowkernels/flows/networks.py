"""Conditioners of the coupling flows: what they are called with, and the context where there is one, to shifts and raw scales."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import has_global_hooks
from ..layers._dtype import check_dtype
from ..layers._plain import is_plain
from ..layers._sizes import parse_context_features, parse_count
from ..ops import conv_net
from ..ops.glow_step.reference import with_context


class WeightNormConv2d(nn.Conv2d):
    """Convolution with normalised weights, gain * v / |v| for each output channel (Salimans and Kingma 2016).

    `torch.nn.utils.parametrizations.weight_norm` computes the same, but a module that has it cannot be pickled.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__(inputs, outputs, kernel_size, padding=kernel_size // 2)
        self.gain = nn.Parameter(torch.linalg.vector_norm(self.weight.detach(), dim=(1, 2, 3), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        # torch's weight norm in one op has wrong second derivatives
        length = torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, self.weight * (self.gain / length), self.bias)


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

    Raises:
        ValueError: a size is no whole number, or too small.
    """

    def __init__(self, channels: int, hidden_channels: int, outputs: int, blocks: int, *, context_features: int = 0) -> None:
        super().__init__()
        channels, hidden_channels = parse_count("channels", channels), parse_count("hidden_channels", hidden_channels)
        outputs, blocks = parse_count("outputs", outputs), parse_count("blocks", blocks, 0)
        self.conv_in = WeightNormConv2d(channels + parse_context_features(context_features), hidden_channels, 3)
        self.blocks = nn.Sequential(*(_Block(hidden_channels) for _ in range(blocks)))
        self.norm_out, self.conv_out = nn.BatchNorm2d(hidden_channels), WeightNormConv2d(hidden_channels, outputs, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.conv_out(F.relu(self.norm_out(self.blocks(self.conv_in(_joined(x, context, self.conv_in.gain))))))


class ZeroConv2d(nn.Conv2d):
    """3 x 3 convolution that starts at zero, its output times exp(3 * log_gain) for each channel (Kingma and Dhariwal 2018, section 3.3).

    The context joins the input as channels of constant value.

    Args:
        inputs: channels of x.
        outputs: channels of what is returned.
        context_features: width of the context; 0 for none.

    Raises:
        ValueError: a size is no whole number, or too small.
    """

    def __init__(self, inputs: int, outputs: int, *, context_features: int = 0) -> None:
        inputs, outputs = parse_count("inputs", inputs), parse_count("outputs", outputs)
        super().__init__(inputs + parse_context_features(context_features), outputs, 3, padding=1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.log_gain = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        gain = (3 * self.log_gain).exp()  # on the weight, which is smaller than the output
        return self._conv_forward(_joined(x, context, self.log_gain), self.weight * gain[:, None, None, None], self.bias * gain)


class ConvNet(nn.Module):
    """3 x 3 convolution, ReLU, 1 x 1 convolution, ReLU, and a 3 x 3 one that starts at zero (Kingma and Dhariwal 2018, section 3.3).

    The authors' code also has an actnorm after each of the first two; most ports, and this one, have none. Convolutions that are no longer
    plain (with hooks, parametrized, or others in their place) are called one by one.

    Args:
        channels: channels of x.
        hidden_channels: channels inside.
        outputs: channels of what is returned.
        context_features: width of the context; 0 for none. It joins the input as channels of constant value.

    Shape:
        x: [batch, channels, H, W]; context: [batch, context_features]; output: [batch, outputs, H, W].

    Raises:
        ValueError: a size is no whole number, or too small.
    """

    def __init__(self, channels: int, hidden_channels: int, outputs: int, *, context_features: int = 0) -> None:
        super().__init__()
        channels, hidden_channels = parse_count("channels", channels), parse_count("hidden_channels", hidden_channels)
        outputs = parse_count("outputs", outputs)
        self.conv_in = nn.Conv2d(channels + parse_context_features(context_features), hidden_channels, 3, padding=1)
        self.conv_mid = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.conv_out = ZeroConv2d(hidden_channels, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = _joined(x, context, self.conv_out.log_gain)
        parameters = _parameters(self)
        if parameters is None or has_global_hooks():
            return self.conv_out(F.relu(self.conv_mid(F.relu(self.conv_in(x)))))
        return conv_net(x, *parameters)


def plain_parameters(conditioner: nn.Module) -> tuple[Tensor, ...] | None:
    """The tensors of a `ConvNet` as `conv_net` takes them, or None where it has to be called. The caller asks for global hooks."""
    return _parameters(conditioner) if is_plain(conditioner, ConvNet) else None


def _parameters(net: ConvNet) -> tuple[Tensor, ...] | None:
    parts = net._modules  # without a detour: a small flow feels each
    first, middle, last = parts["conv_in"], parts["conv_mid"], parts["conv_out"]
    if not (_is_plain(first, nn.Conv2d, 3) and _is_plain(middle, nn.Conv2d, 1) and _is_plain(last, ZeroConv2d, 3)):
        return None
    a, b, c = first._parameters, middle._parameters, last._parameters
    return a["weight"], a["bias"], b["weight"], b["bias"], c["weight"], c["bias"], c["log_gain"]


def _is_plain(layer: nn.Module, kind: type[nn.Conv2d], size: int) -> bool:
    """Whether it is a convolution that `conv_net` computes."""
    if not is_plain(layer, kind) or layer._parameters.get("bias") is None or "weight" not in layer._parameters:
        return False
    settings = layer.kernel_size, layer.padding, layer.stride, layer.dilation, layer.groups, layer.padding_mode
    return settings == ((size, size), (size // 2, size // 2), (1, 1), (1, 1), 1, "zeros")


def _joined(x: Tensor, context: Tensor | None, parameter: Tensor) -> Tensor:
    """x, [batch, channels, H, W], and the context as channels of constant value; both of the parameter's dtype."""
    check_dtype(parameter, x=x, context=context)
    return with_context(x, context)
