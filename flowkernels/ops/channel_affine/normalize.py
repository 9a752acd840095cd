"""Batch normalisation of channels by their own statistics: `channel_affine` with the gradient that also goes through them."""

import functools

import torch
from torch import Tensor

from ..._backend import as_called, chosen, wants_reference
from ..._library import library, register_fake
from .._differentiation import apply_function, needs_autograd, transformed, vmap_one_by_one
from .._layout import empty_in_layout_of
from . import channel_affine, channel_affine_backward

__all__ = ["log_scale_of", "normalize_channels", "statistics"]

library.define("channel_normalize(Tensor x, Tensor? log_gain, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(
    "channel_normalize_backward(Tensor dz, Tensor dlogabsdet, Tensor x, Tensor? log_gain, Tensor variance, Tensor mean, float eps) "
    "-> (Tensor, Tensor, Tensor)"
)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance, without Bessel's correction, and mean of each channel, over rows and sites, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rows_and_sites = [0, *range(2, x.dim())]
    mean = x.mean(rows_and_sites, keepdim=True)
    return (x - mean).square().mean(rows_and_sites), mean.flatten()  # in half to a sixth of the time of torch.var_mean on a CPU


def log_scale_of(variance: Tensor, log_gain: Tensor | None, eps: float) -> Tensor:
    """log_gain - 1/2 log(v + eps)."""
    log_scale = -0.5 * torch.log(variance + eps)
    return log_scale if log_gain is None else log_gain + log_scale


def _composite(x: Tensor, log_gain: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    variance, mean = statistics(x)
    z, logabsdet = channel_affine(x, -mean, log_scale_of(variance, log_gain, eps), bias=bias)
    return z, logabsdet, variance, mean


def _composite_backward(
    dz: Tensor, dlogabsdet: Tensor, x: Tensor, log_gain: Tensor | None, variance: Tensor, mean: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With n numbers in a channel: dm = -sum dz exp(log_scale), dv = -dlog_scale / (2 (v + eps)), and to x, besides the gradient at
    fixed m and v, dm / n + dv 2 (x - m) / n."""
    log_scale = log_scale_of(variance, log_gain, eps)
    dx, dshift, dlog_scale, dbias = channel_affine_backward(dz, dlogabsdet, x, -mean, log_scale, None, False, False)
    each = (-1, *[1] * (x.dim() - 2))
    n = x.numel() // len(mean)
    slope = dlog_scale / (variance + eps) / -n
    dx = torch.addcmul(dx + (dshift / -n).view(each), x - mean.view(each), slope.view(each)).to(x.dtype)
    return dx, dlog_scale, dbias


library.impl("channel_normalize", _composite, "CompositeExplicitAutograd")
library.impl("channel_normalize_backward", _composite_backward, "CompositeExplicitAutograd")
_normalize = torch.ops.flowkernels.channel_normalize.default
_normalize_backward = torch.ops.flowkernels.channel_normalize_backward.default


@register_fake("channel_normalize")
def _(x: Tensor, *_) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    logabsdet, variance, mean = (x.new_empty(n, dtype=compute) for n in (x.shape[0], x.shape[1], x.shape[1]))
    return empty_in_layout_of(x), logabsdet, variance, mean


@register_fake("channel_normalize_backward")
def _(dz: Tensor, dlogabsdet: Tensor, x: Tensor, log_gain: Tensor | None, variance: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return empty_in_layout_of(x), *(variance.new_empty(variance.shape) for _ in range(2))


# each batch has its own statistics
_one_by_one = functools.partial(vmap_one_by_one, _normalize_backward)
torch.library.register_vmap("flowkernels::channel_normalize_backward", _one_by_one, lib=library)


def normalize_channels(x: Tensor, log_gain: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = (x - m) / sqrt(v + eps) * exp(log_gain) + bias, m and v being the mean and variance of x (MAF, Papamakarios et al. 2017,
    section 3.5; RealNVP, Dinh et al. 2016, section 3.7).

    Args:
        x: [batch, channels, *sites].
        log_gain, bias: [channels], or None for zeros.
        eps: added to the variance.

    Returns:
        z; logabsdet, [batch], of z with m and v held fixed; and v and m, [channels], without a gradient. Gradients of z and logabsdet go
        through m and v.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    log_gain, bias = (t if t is None or t.dtype == compute else t.to(compute) for t in (log_gain, bias))
    if transformed():  # there a function of our own takes milliseconds a call
        z, logabsdet, variance, mean = _composite(x, log_gain, bias, eps)
        return z, logabsdet, variance.detach(), mean.detach()
    if needs_autograd((x, log_gain, bias)):
        return apply_function(_NormalizeChannels, x, log_gain, bias, eps)
    return _forward(x, log_gain, bias, eps)


def _forward(x: Tensor, *others) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if wants_reference("channel_normalize", x.device):
        return _composite(x, *others)
    return _normalize(x, *others)


class _NormalizeChannels(torch.autograd.Function):
    @staticmethod
    def forward(x, log_gain, bias, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(x, log_gain, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, log_gain, bias, ctx.eps = inputs
        ctx.backend = chosen()
        _, _, variance, mean = output
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(variance, mean)
        ctx.save_for_backward(x, log_gain, variance, mean)

    @staticmethod
    @as_called
    def backward(ctx, dz: Tensor, dlogabsdet: Tensor, *_):
        x, log_gain, variance, mean = ctx.saved_tensors
        if torch.is_grad_enabled():  # double backward: m and v vary with x
            dx, dlog_gain, dbias = _composite_backward(dz, dlogabsdet, x, log_gain, *statistics(x), ctx.eps)
        else:
            backward = _composite_backward if wants_reference("channel_normalize_backward", dz.device) else _normalize_backward
            dx, dlog_gain, dbias = backward(dz, dlogabsdet, x, log_gain, variance, mean, ctx.eps)
        return dx, None if log_gain is None else dlog_gain, dbias if ctx.has_bias else None, None
