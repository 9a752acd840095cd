"""Per-channel affine map: actnorm (Glow, Kingma & Dhariwal 2018, section 3.1) and flow batch norm.

    y[b, c, ...] = (x[b, c, ...] + shift[c]) * exp(log_scale[c]) + bias[c]
    logabsdet[b] = sites * sum_c log_scale[c]

Actnorm is (x + b) * exp(3 logs): its shift and log scale. Batch norm is (x - mean) * exp(log_gain - 1/2 log(var + eps)) + bias: a shift
before and one after, since folding them into one would round badly where the scale is small.
"""

import functools

import torch
from torch import Tensor

from ..._backend import as_called, chosen, register_triton, wants_reference
from ..._dtypes import FLOATING
from ..._library import library, register_fake
from .._differentiation import apply_function, needs_autograd, transformed, vmap_one_by_one
from .._layout import empty_in_layout_of, in_layout_of
from .reference import channel_affine_backward_reference, channel_affine_reference

__all__ = ["channel_affine"]

library.define("channel_affine(Tensor x, Tensor? shift, Tensor log_scale, Tensor? bias, bool inverse) -> (Tensor, Tensor)")
library.define(
    "channel_affine_backward(Tensor dy, Tensor dlogabsdet, Tensor kept, Tensor? shift, Tensor log_scale, Tensor? bias, "
    "bool inverse, bool from_output) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _composite(x: Tensor, shift: Tensor | None, log_scale: Tensor, bias: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    y, logabsdet = channel_affine_reference(x, shift, log_scale, bias, inverse)
    return in_layout_of(x, y), logabsdet.clone()


def _composite_backward(dy: Tensor, *others) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, *parameters = channel_affine_backward_reference(dy, *others)
    return in_layout_of(dy, dx), *parameters


library.impl("channel_affine", _composite, "CompositeExplicitAutograd")
library.impl("channel_affine_backward", _composite_backward, "CompositeExplicitAutograd")
register_triton("channel_affine", f"{__name__}.kernels", _composite)
register_triton("channel_affine_backward", f"{__name__}.kernels", _composite_backward)
_channel_affine = torch.ops.flowkernels.channel_affine.default
_channel_affine_backward = torch.ops.flowkernels.channel_affine_backward.default


@register_fake("channel_affine")
def _(x: Tensor, shift: Tensor | None, log_scale: Tensor, *_) -> tuple[Tensor, Tensor]:
    return empty_in_layout_of(x), log_scale.new_empty(x.shape[:1])


@register_fake("channel_affine_backward")
def _(dy: Tensor, dlogabsdet: Tensor, kept: Tensor, shift: Tensor | None, log_scale: Tensor, *_) -> tuple[Tensor, ...]:
    return empty_in_layout_of(dy), *(log_scale.new_empty(log_scale.shape) for _ in range(3))


_one_by_one = functools.partial(vmap_one_by_one, _channel_affine_backward)
torch.library.register_vmap("flowkernels::channel_affine_backward", _one_by_one, lib=library)


def _forward(x: Tensor, shift: Tensor | None, log_scale: Tensor, bias: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    if wants_reference("channel_affine", x.device):
        return _composite(x, shift, log_scale, bias, inverse)
    return _channel_affine(x, shift, log_scale, bias, inverse)


def channel_affine_backward(dy: Tensor, *others) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, shift, log_scale and bias; see `channel_affine_backward_reference`."""
    # double backward differentiates the reference once more
    if torch.is_grad_enabled() or wants_reference("channel_affine_backward", dy.device):
        return channel_affine_backward_reference(dy, *others)
    return _channel_affine_backward(dy, *others)


class _ChannelAffine(torch.autograd.Function):
    @staticmethod
    def forward(x, shift, log_scale, bias, inverse: bool, keeps_output: bool) -> tuple[Tensor, Tensor]:
        return _forward(x, shift, log_scale, bias, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, shift, log_scale, bias, ctx.inverse, ctx.keeps_output = inputs
        ctx.backend = chosen()
        ctx.save_for_backward(output[0] if ctx.keeps_output else x, shift, log_scale, bias)

    @staticmethod
    @as_called
    def backward(ctx, dy: Tensor, dlogabsdet: Tensor):
        kept, shift, log_scale, bias = ctx.saved_tensors
        arguments = (dy, dlogabsdet, kept, shift, log_scale, bias, ctx.inverse, ctx.keeps_output)
        dx, dshift, dlog_scale, dbias = channel_affine_backward(*arguments)
        return dx, None if shift is None else dshift, dlog_scale, None if bias is None else dbias, None, None


def channel_affine(
    x: Tensor,
    shift: Tensor | None,
    log_scale: Tensor,
    *,
    bias: Tensor | None = None,
    inverse: bool = False,
    keep: str = "input",
) -> tuple[Tensor, Tensor]:
    """Shift and scale each channel: y = (x + shift) * exp(log_scale) + bias; `inverse` undoes it.

    Actnorm (Kingma & Dhariwal 2018, section 3.1) has a shift, flow batch norm (MAF, Papamakarios et al. 2017, section 3.5; RealNVP,
    Dinh et al. 2016, section 3.7) shift = -mean and a bias, NICE's diagonal scale neither.

    Args:
        x: input of the map that is applied, [batch, channels, *sites], in any memory layout.
        shift: added before the scale, [channels]; None for 0.
        log_scale: natural log of each channel's scale, [channels].
        bias: added after the scale, [channels]; None for 0.
        inverse: undo the map.
        keep: "input" or "output": which of x and y is kept for backward.

    Returns:
        y, with the shape and dtype of x (channels-last where x is), and log|det| of the map just applied (nats), [batch], in float32,
        or float64 for float64 inputs.

    Raises:
        ValueError: a shape, dtype or device does not fit, or keep is unknown.
    """
    shape, dtype, device = x.shape, x.dtype, x.device
    if dtype not in FLOATING:
        raise ValueError(f"x must be float64, float32, float16 or bfloat16; got {dtype}")
    if len(shape) < 2 or 0 in shape[1:]:
        raise ValueError(f"x must have shape [batch, channels, *sites] with at least one channel and site; got {list(shape)}")
    if keep not in ("input", "output"):
        raise ValueError(f"keep must be 'input' or 'output'; got {keep!r}")
    expected, compute = shape[1:2], torch.float64 if dtype == torch.float64 else torch.float32
    if log_scale.shape != expected or log_scale.dtype != compute or log_scale.device != device:
        log_scale = _fitted("log_scale", log_scale, x, compute)
    if shift is not None and (shift.shape != expected or shift.dtype != compute or shift.device != device):
        shift = _fitted("shift", shift, x, compute)
    if bias is not None and (bias.shape != expected or bias.dtype != compute or bias.device != device):
        bias = _fitted("bias", bias, x, compute)
    if transformed():  # there a function of our own takes milliseconds a call
        return _composite(x, shift, log_scale, bias, inverse)
    if needs_autograd((x, shift, log_scale, bias)):
        return apply_function(_ChannelAffine, x, shift, log_scale, bias, inverse, keep == "output")
    return _forward(x, shift, log_scale, bias, inverse)


def _fitted(name: str, value: Tensor, x: Tensor, compute: torch.dtype) -> Tensor:
    """`value` in the dtype that is computed in, where it has that of x; an error where anything else does not fit."""
    if value.shape != x.shape[1:2]:
        raise ValueError(f"{name} must have shape {list(x.shape[1:2])}, one value per channel; got {list(value.shape)}")
    if value.device != x.device or value.dtype not in (x.dtype, compute):
        raise ValueError(f"{name} must be {compute} on {x.device}; got {value.dtype} on {value.device}")
    return value.to(compute)
