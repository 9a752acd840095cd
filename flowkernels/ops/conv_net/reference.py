"""Glow's conditioner in plain PyTorch, and its vector-Jacobian product."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PARAMETERS = 7  # of a network: weights and biases of three convolutions, and log_gain


def conv_net_reference(x: Tensor, *parameters: Tensor) -> Tensor:
    """exp(3 log_gain) * conv(relu(conv1x1(relu(conv(x))))); x is [batch, channels, H, W]."""
    return conv_net_training_reference(x, *parameters)[0]


def conv_net_training_reference(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_mid: Tensor,
    bias_mid: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    log_gain: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `conv_net_reference` gives, and the two hidden layers."""
    gain = (3 * log_gain).exp()  # on the weight, which is smaller than the output
    weight_out, bias_out = weight_out * gain[:, None, None, None], bias_out * gain
    if x.device.type == "cpu":  # torch's convolutions are quickest there with channels last, and a 1 x 1 one is a matrix product
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        first = F.relu(F.conv2d(x, weight_in, bias_in, padding=1), inplace=True)
        rows = first.permute(0, 2, 3, 1)
        rows = F.relu(F.linear(rows.flatten(0, 2), weight_mid.flatten(1), bias_mid), inplace=True).view(*rows.shape[:3], len(bias_mid))
        second = rows.permute(0, 3, 1, 2)
    else:
        first = F.relu(F.conv2d(x, weight_in, bias_in, padding=1), inplace=True)
        second = F.relu(F.conv2d(first, weight_mid, bias_mid), inplace=True)
    return F.conv2d(second, weight_out, bias_out, padding=1), first, second


def per_network(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The parameters of each of several networks, which stand one network after the other."""
    return [tensors[i : i + PARAMETERS] for i in range(0, len(tensors), PARAMETERS)]


def conv_net_backward_reference(
    dy: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    weight_in: Tensor,
    weight_mid: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    log_gain: Tensor,
    parameters: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients by x and, if `parameters`, by all of them, from the hidden layers."""
    gain = (3 * log_gain).exp()
    d = dy * gain[:, None, None]
    dsecond, dweight_out, dbias_out = _through(d, second, weight_out, 1, parameters)
    dlog_gain = 3 * ((dweight_out * weight_out).sum((1, 2, 3)) + dbias_out * bias_out) if parameters else None
    dfirst, dweight_mid, dbias_mid = _through(dsecond * (second > 0), first, weight_mid, 0, parameters)
    dx, dweight_in, dbias_in = _through(dfirst * (first > 0), x, weight_in, 1, parameters)
    return dx, dweight_in, dbias_in, dweight_mid, dbias_mid, dweight_out, dbias_out, dlog_gain


def _through(dy: Tensor, x: Tensor, weight: Tensor, padding: int, parameters: bool) -> tuple[Tensor | None, ...]:
    """Gradients of a convolution by its input and, if `parameters`, its weight and bias."""
    options = [len(weight)], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1
    return torch.ops.aten.convolution_backward(dy, x, weight, *options, [True, parameters, parameters])
