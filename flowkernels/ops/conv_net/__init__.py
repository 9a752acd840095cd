"""Glow's conditioner as one op (Kingma & Dhariwal 2018, section 3.3): three convolutions, which torch runs one by one with the hidden
channels written to memory between.

The kernel, for calls without a gradient on a CPU, takes an image, or a band of one, through all three: hidden channels stay in the caches,
a row of three taps is one run of memory, and the weights are packed once a call. The multiply-adds are its floor; it stands at 0.5 to 0.9
of the rate of multiply-adds in registers. What is lost are lanes where outputs fill no vector (12 of 16 at the first level of a Glow for
colour images), one position a row for the padding, and packing at small sizes.

Measured against torch's convolutions with channels last and a matrix product for the middle one, in turns on two cores with AVX-512, at
[16, 6, 16, 16], [16, 12, 8, 8] and [16, 24, 4, 4] with 64 hidden channels: 1.4, 1.7 and 1.9 times as fast, a single image 2.1 times; with
128 hidden channels 1.3. Tried wider, 256 and 512 took as long as torch's: networks of more than 128 hidden channels are left to torch. With
AVX2 alone, torch's held to it too, it is 1.0 to 1.2 times.
"""

import torch
from torch import Tensor

from ..._backend import wants_reference
from ..._library import library
from .._autocast import any_autocast
from .._differentiation import needs_autograd
from .reference import conv_net_reference

library.define(
    "conv_net(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_mid, Tensor bias_mid, Tensor weight_out, Tensor bias_out, "
    "Tensor log_gain) -> Tensor"
)
_conv_net = torch.ops.flowkernels.conv_net.default
_MOST_HIDDEN = 128


def _composite(x: Tensor, *parameters: Tensor) -> Tensor:
    return conv_net_reference(x.permute(0, 3, 1, 2), *parameters).permute(0, 2, 3, 1).contiguous()


library.impl("conv_net", _composite, "CompositeExplicitAutograd")


@torch.library.register_fake("flowkernels::conv_net", lib=library)
def _(x: Tensor, *parameters: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], parameters[-1].shape[0]))


def conv_net(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_mid: Tensor,
    bias_mid: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    log_gain: Tensor,
) -> Tensor:
    """exp(3 log_gain) * conv3x3(relu(conv1x1(relu(conv3x3(x))))), sides padded with zeros.

    Source: Kingma & Dhariwal 2018, section 3.3, and their code for the gain. A call with a gradient, in half precision or under autocast is
    made of torch's convolutions.

    Args:
        x: [batch, channels, H, W].
        weight_in: [hidden, channels, 3, 3], and bias_in, [hidden].
        weight_mid: [hidden, hidden, 1, 1], and bias_mid, [hidden].
        weight_out: [outputs, hidden, 3, 3], and bias_out, [outputs].
        log_gain: [outputs].

    Returns:
        [batch, outputs, H, W], with the dtype of x; on a CPU channels lie last in memory.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    parameters = weight_in, bias_in, weight_mid, bias_mid, weight_out, bias_out, log_gain
    _check(x, *parameters)
    if not _serves(x, weight_mid) or needs_autograd((x, *parameters)):
        return conv_net_reference(x, *parameters)
    last = torch.channels_last
    weight_in, weight_out = weight_in.contiguous(memory_format=last), weight_out.contiguous(memory_format=last)
    parameters = weight_in, bias_in.contiguous(), weight_mid.contiguous(), bias_mid.contiguous(), weight_out, bias_out.contiguous()
    return _conv_net(x.permute(0, 2, 3, 1).contiguous(), *parameters, log_gain.contiguous()).permute(0, 3, 1, 2)


def _serves(x: Tensor, weight_mid: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or any_autocast() or wants_reference("conv_net", x.device):
        return False
    return 0 < weight_mid.shape[0] <= _MOST_HIDDEN


_NAMES = ("weight_in", "bias_in", "weight_mid", "bias_mid", "weight_out", "bias_out", "log_gain")


def _check(x: Tensor, *parameters: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point, [batch, channels, H, W]; got {x.dtype}, {list(x.shape)}")
    hidden, outputs = parameters[0].shape[0], parameters[4].shape[0]
    shapes = (hidden, x.shape[1], 3, 3), (hidden,), (hidden, hidden, 1, 1), (hidden,), (outputs, hidden, 3, 3), (outputs,), (outputs,)
    cast = any_autocast()  # by which dtypes may differ
    for name, t, shape in zip(_NAMES, parameters, shapes, strict=True):
        if t.shape != shape or t.device != x.device or (t.dtype != x.dtype and not cast):
            raise ValueError(
                f"{name} must be {list(shape)}, {x.dtype} on {x.device}, to fit x; got {list(t.shape)}, {t.dtype} on {t.device}"
            )
