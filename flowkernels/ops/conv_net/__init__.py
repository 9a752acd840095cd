"""Glow's conditioner as one op (Kingma & Dhariwal 2018, section 3.3): three convolutions, which torch runs one by one with the hidden
channels written to memory between, and their gradient.

The kernel, on a CPU, takes an image, or a band of one, through all three: hidden channels stay in the caches (and are written once where a
gradient will ask for them), and the weights are packed once a call. Two neighbouring sums of three taps cost four products rather than six
(csrc/cpu/conv_net_kernel.h has the formulas), forward, for the gradient by x and for those of the weights; the error in float32 is that of
the plain sums. Backward is three such convolutions with masks for the relus, and sums over positions for the weights. The multiply-adds are
its floor, and in the loops they run at the rate of a matmul; a fifth of the time goes into making the factors of the products, biases and
masks. What else is lost are lanes where outputs fill no vector (12 of 16 at the first level of a Glow for colour images, 6 of 8 or 16 for
the gradient by x), and packing at small sizes.

Measured against torch's convolutions with channels last and a matrix product for the middle one, in turns on two cores of a Zen 4 by
AVX2, at [16, 6, 16, 16], [16, 12, 8, 8] and [16, 24, 4, 4] with 64 hidden channels: 1.7, 2.0 and 2.4 times as fast, a single image 2.7
times; with gradients 1.8, 2.0 and 2.3, a single image 2.4. With 128 hidden channels at the first of these sizes 1.4, with gradients 1.6;
with 256, at all of them, 1.4 to 1.9 and 1.35 to 1.4, with 512 1.25 to 1.35 and 1.0 to 1.1. With 1,024 gradients took longer than torch's:
networks of more than 512 hidden channels are left to torch. Backward finds the gradients of all parameters or of none.
"""

import torch
from torch import Tensor

from ... import _extension
from ..._backend import wants_reference
from ..._library import library, register_fake
from ..._torch import any_autocast, is_wanted
from .._autocast import autocast_off
from .._differentiation import apply_function, needs_autograd, pulled_back, transformed
from .reference import conv_net_backward_reference, conv_net_reference, conv_net_training_reference

_PARAMETERS = "Tensor weight_in, Tensor bias_in, Tensor weight_mid, Tensor bias_mid, Tensor weight_out, Tensor bias_out, Tensor log_gain"
library.define(f"conv_net(Tensor x, {_PARAMETERS}) -> Tensor")
library.define(f"conv_net_training(Tensor x, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)")
library.define(
    "conv_net_backward(Tensor dy, Tensor x, Tensor first, Tensor second, Tensor weight_in, Tensor weight_mid, Tensor weight_out, "
    f"Tensor bias_out, Tensor log_gain, bool parameters) -> ({', '.join(8 * ['Tensor'])})"
)
_conv_net = torch.ops.flowkernels.conv_net.default
_training = torch.ops.flowkernels.conv_net_training.default
conv_net_backward = torch.ops.flowkernels.conv_net_backward.default
_COMPILED = _extension.has_kernel("conv_net", "CPU")  # torch.compile cannot ask
MOST_HIDDEN = 512


# the bare ops take and return images that lie channels last, [batch, H, W, channels]
@autocast_off
def _composite(x: Tensor, *parameters: Tensor) -> Tensor:
    return _channels_last(conv_net_reference(_channels_first(x), *parameters))


@autocast_off
def _composite_training(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(_channels_last, conv_net_training_reference(_channels_first(x), *parameters)))


@autocast_off
def _composite_backward(dy: Tensor, x: Tensor, first: Tensor, second: Tensor, *others) -> tuple[Tensor, ...]:
    images = map(_channels_first, (dy, x, first, second))
    dx, *gradients = conv_net_backward_reference(*images, *others)
    return _channels_last(dx), *(x.new_empty(0) if t is None else t.contiguous() for t in gradients)


def _channels_first(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2)


def _channels_last(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).contiguous()


for _name, _function in (("", _composite), ("_training", _composite_training), ("_backward", _composite_backward)):
    library.impl(f"conv_net{_name}", _function, "CompositeExplicitAutograd")


@register_fake("conv_net")
def _(x: Tensor, *parameters: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], parameters[-1].shape[0]))


@register_fake("conv_net_training")
def _(x: Tensor, weight_in: Tensor, _, weight_mid: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty((*x.shape[:3], t.shape[0])) for t in (parameters[-1], weight_in, weight_mid))


@register_fake("conv_net_backward")
def _(dy: Tensor, x: Tensor, first: Tensor, second: Tensor, weight_in, weight_mid, weight_out, bias_out, log_gain, parameters: bool):
    shapes = [shape for weight in (weight_in, weight_mid, weight_out) for shape in (weight.shape, weight.shape[:1])]
    return x.new_empty(x.shape), *(x.new_empty(shape if parameters else 0) for shape in (*shapes, log_gain.shape))


_again = autocast_off(conv_net_reference)


class _ConvNet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters) -> Tensor:
        y, first, second = _training(x, *parameters)
        ctx.save_for_backward(x, *parameters, first, second)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, *parameters, first, second = ctx.saved_tensors
        wanted = any(ctx.needs_input_grad[1:]) and is_wanted(ctx, slice(1, None))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the gradient of the gradient is asked for
            inputs = [t.view_as(t) for t in (x, *parameters)]
            y = _again(_channels_first(inputs[0]), *inputs[1:]).permute(0, 2, 3, 1)
            needs = ctx.needs_input_grad if wanted else (*ctx.needs_input_grad[:1], *(False for _ in parameters))
            leaves = [t for t, needed in zip(inputs, needs, strict=True) if needed]
            gradients = iter(pulled_back((y,), (dy,), leaves, create_graph=True))
            return tuple(next(gradients) if needed else None for needed in needs)
        weight_in, _, weight_mid, _, weight_out, bias_out, log_gain = parameters
        dx, *gradients = conv_net_backward(dy.contiguous(), x, first, second, weight_in, weight_mid, weight_out, bias_out, log_gain, wanted)
        return dx, *(gradients if wanted else (None,) * len(gradients))


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

    Source: Kingma & Dhariwal 2018, section 3.3, and their code for the gain. Half precision, calls under autocast and gradients of
    gradients are made of torch's convolutions.

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
    if transformed() or not _serves(x, weight_mid):
        return conv_net_reference(x, *parameters)
    tensors = x.permute(0, 2, 3, 1).contiguous(), *(t.contiguous() for t in parameters)
    return _channels_first(apply_function(_ConvNet, *tensors) if needs_autograd(tensors) else _conv_net(*tensors))


def _serves(x: Tensor, weight_mid: Tensor) -> bool:
    if not (_COMPILED and x.is_cpu) or x.dtype not in (torch.float32, torch.float64):
        return False
    return weight_mid.shape[0] <= MOST_HIDDEN and not any_autocast() and not wants_reference("conv_net", x.device)


_NAMES = ("weight_in", "bias_in", "weight_mid", "bias_mid", "weight_out", "bias_out", "log_gain")


def _check(x: Tensor, *parameters: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point, [batch, channels, H, W]; got {x.dtype}, {list(x.shape)}")
    hidden, outputs = (t.shape[0] if t.dim() else 0 for t in (parameters[0], parameters[4]))
    if 0 in (x.shape[1], hidden, outputs):
        got = ", ".join(str(list(t.shape)) for t in (x, parameters[0], parameters[4]))
        raise ValueError(f"x, weight_in and weight_out must have channels; got {got}")
    shapes = (hidden, x.shape[1], 3, 3), (hidden,), (hidden, hidden, 1, 1), (hidden,), (outputs, hidden, 3, 3), (outputs,), (outputs,)
    cast = any_autocast()  # by which dtypes may differ
    for name, t, shape in zip(_NAMES, parameters, shapes, strict=True):
        if t.shape != shape or t.device != x.device or (t.dtype != x.dtype and not cast):
            raise ValueError(
                f"{name} must be {list(shape)}, {x.dtype} on {x.device}, to fit x; got {list(t.shape)}, {t.dtype} on {t.device}"
            )
