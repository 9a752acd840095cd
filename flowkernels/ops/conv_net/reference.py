"""Glow's conditioner in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def conv_net_reference(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_mid: Tensor,
    bias_mid: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    log_gain: Tensor,
) -> Tensor:
    """exp(3 log_gain) * conv(relu(conv1x1(relu(conv(x))))); x is [batch, channels, H, W]."""
    gain = (3 * log_gain).exp()  # on the weight, which is smaller than the output
    weight_out, bias_out = weight_out * gain[:, None, None, None], bias_out * gain
    if x.device.type == "cpu":  # torch's convolutions are quickest there with channels last, and a 1 x 1 one is a matrix product
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        h = F.relu(F.conv2d(x, weight_in, bias_in, padding=1), inplace=True).permute(0, 2, 3, 1)
        rows = F.linear(h.flatten(0, 2), weight_mid.flatten(1), bias_mid)
        h = F.relu(rows, inplace=True).view(h.shape).permute(0, 3, 1, 2)
    else:
        h = F.relu(F.conv2d(x, weight_in, bias_in, padding=1), inplace=True)
        h = F.relu(F.conv2d(h, weight_mid, bias_mid), inplace=True)
    return F.conv2d(h, weight_out, bias_out, padding=1)
