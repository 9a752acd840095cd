"""Masked linear map whose mask is a staircase, as in MADE (Germain et al. 2015), and its gradients.

    y[b, j]       = bias[j] + sum_{k < visible[j]} x[b, k] * weight[k, j]
    dx[b, k]      = sum_{j: visible[j] > k} dy[b, j] * weight[k, j]
    dweight[k, j] = sum_b x[b, k] * dy[b, j]   where k < visible[j], else 0

Each of the three is linear in both of its tensors, and the gradients of each are the other two: double backward needs nothing else.
"""

import torch
from torch import Tensor

from ..._backend import as_called, chosen, register_triton, wants_reference
from ..._dtypes import FLOATING
from ..._library import library, register_fake
from ..._torch import any_autocast, is_wanted
from .._autocast import cast
from .._differentiation import apply_function, needs_autograd, transformed
from ..degrees import check_staircase
from .reference import masked_linear_dweight_reference, masked_linear_dx_reference, masked_linear_reference

library.define("masked_linear(Tensor x, Tensor weight, Tensor? bias, Tensor visible) -> Tensor")
library.define("masked_linear_dx(Tensor dy, Tensor weight, Tensor visible) -> Tensor")
library.define("masked_linear_dweight(Tensor x, Tensor dy, Tensor visible) -> Tensor")
library.impl("masked_linear", masked_linear_reference, "CompositeExplicitAutograd")
library.impl("masked_linear_dx", masked_linear_dx_reference, "CompositeExplicitAutograd")
library.impl("masked_linear_dweight", masked_linear_dweight_reference, "CompositeExplicitAutograd")
register_triton("masked_linear", f"{__name__}.kernels", masked_linear_reference)
register_triton("masked_linear_dx", f"{__name__}.kernels", masked_linear_dx_reference)
register_triton("masked_linear_dweight", f"{__name__}.kernels", masked_linear_dweight_reference)


@register_fake("masked_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@register_fake("masked_linear_dx")
def _(dy: Tensor, weight: Tensor, visible: Tensor) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], weight.shape[0]))


@register_fake("masked_linear_dweight")
def _(x: Tensor, dy: Tensor, visible: Tensor) -> Tensor:
    return x.new_empty((x.shape[-1], dy.shape[-1]))


def _bare(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor) -> Tensor:
    if wants_reference("masked_linear", x.device):
        return masked_linear_reference(x, weight, bias, visible)
    return torch.ops.flowkernels.masked_linear.default(x, weight, bias, visible)


def _bare_dx(dy: Tensor, weight: Tensor, visible: Tensor) -> Tensor:
    if wants_reference("masked_linear_dx", dy.device):
        return masked_linear_dx_reference(dy, weight, visible)
    return torch.ops.flowkernels.masked_linear_dx.default(dy, weight, visible)


def _bare_dweight(x: Tensor, dy: Tensor, visible: Tensor) -> Tensor:
    if wants_reference("masked_linear_dweight", x.device):
        return masked_linear_dweight_reference(x, dy, visible)
    return torch.ops.flowkernels.masked_linear_dweight.default(x, dy, visible)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor) -> Tensor:
        return _bare(x, weight, bias, visible)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, visible = inputs
        ctx.has_bias, ctx.backend = bias is not None, chosen()
        ctx.save_for_backward(x, weight, visible)

    @staticmethod
    @as_called
    def backward(ctx, dy: Tensor):
        x, weight, visible = ctx.saved_tensors
        dx = _dx(dy, weight, visible) if ctx.needs_input_grad[0] else None
        dweight = _dweight(x, dy, visible) if ctx.needs_input_grad[1] and is_wanted(ctx, slice(1, 2)) else None
        dbias = dy.sum([*range(dy.dim() - 1)]) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None


class _Dx(torch.autograd.Function):
    @staticmethod
    def forward(dy: Tensor, weight: Tensor, visible: Tensor) -> Tensor:
        return _bare_dx(dy, weight, visible)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.backend = chosen()
        ctx.save_for_backward(*inputs)

    @staticmethod
    @as_called
    def backward(ctx, g: Tensor):
        dy, weight, visible = ctx.saved_tensors
        ddy = _product(g, weight, None, visible) if ctx.needs_input_grad[0] else None
        dweight = _dweight(g, dy, visible) if ctx.needs_input_grad[1] and is_wanted(ctx, slice(1, 2)) else None
        return ddy, dweight, None


class _Dweight(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dy: Tensor, visible: Tensor) -> Tensor:
        return _bare_dweight(x, dy, visible)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.backend = chosen()
        ctx.save_for_backward(*inputs)

    @staticmethod
    @as_called
    def backward(ctx, g: Tensor):
        x, dy, visible = ctx.saved_tensors
        dx = _dx(dy, g, visible) if ctx.needs_input_grad[0] else None
        ddy = _product(x, g, None, visible) if ctx.needs_input_grad[1] else None
        return dx, ddy, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor) -> Tensor:
    if transformed():  # there a function of our own takes milliseconds a call
        return masked_linear_reference(x, weight, bias, visible)
    if not needs_autograd((x, weight, bias)):
        return _bare(x, weight, bias, visible)
    return apply_function(_MaskedLinear, x, weight, bias, visible)


def _dx(dy: Tensor, weight: Tensor, visible: Tensor) -> Tensor:
    if transformed():
        return masked_linear_dx_reference(dy, weight, visible)
    return apply_function(_Dx, dy, weight, visible) if needs_autograd((dy, weight)) else _bare_dx(dy, weight, visible)


def _dweight(x: Tensor, dy: Tensor, visible: Tensor) -> Tensor:
    if transformed():
        return masked_linear_dweight_reference(x, dy, visible)
    return apply_function(_Dweight, x, dy, visible) if needs_autograd((x, dy)) else _bare_dweight(x, dy, visible)


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor) -> Tensor:
    """Linear map under a staircase mask: y[b, j] = bias[j] + sum_{k < visible[j]} x[b, k] weight[k, j] (MADE, Germain et al. 2015).

    Neither the weight nor its gradient is read or written outside the staircase in effect: entries there have no influence, their
    gradient is zero, and an infinity in an input that an output does not see does not reach it. Half precision is computed in
    float32 and rounded once. Under autocast x, weight and bias are cast to its dtype.

    Args:
        x: input, [*, inputs].
        weight: input-major, [inputs, outputs].
        bias: [outputs], or None.
        visible: number of inputs that each output sees, ascending, int32 [outputs]; see `ops.degrees.staircase`.

    Returns:
        y, [*, outputs], with the dtype of x.

    Raises:
        ValueError: a shape, dtype or device does not fit; or, where a CPU's kernel serves, which reads it, visible does not ascend or
            exceeds the inputs.
    """
    if any_autocast() and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return masked_linear(cast(x, dtype), cast(weight, dtype), cast(bias, dtype), visible)
    if x.dim() == 1:
        return masked_linear(x[None], weight, bias, visible)[0]
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x must have shape [*, {weight.shape[0]}] for a weight {list(weight.shape)}; got {list(x.shape)}")
    outputs = weight.shape[1]
    if visible.shape != (outputs,) or visible.dtype != torch.int32:
        raise ValueError(f"visible must be int32 [{outputs}], one count per output; got {visible.dtype} {list(visible.shape)}")
    dtype, device = x.dtype, x.device
    if dtype not in FLOATING:
        raise ValueError(f"x must be float64, float32, float16 or bfloat16; got {dtype}")
    if visible.device != device:
        raise ValueError(f"visible must be on {device}, like x; got {visible.device}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must have shape [{outputs}], one value per output; got {list(bias.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (value.dtype != dtype or value.device != device):
            raise ValueError(f"{name} must be {dtype} on {device}, like x; got {value.dtype} on {value.device}")
    if torch.compiler.is_compiling() or transformed():
        return _product(x, weight, bias, visible)
    try:
        return _product(x, weight, bias, visible)
    except RuntimeError:  # the kernel reads the staircase anyway
        check_staircase(visible, weight.shape[0])
        raise
