"""The forward map with a gradient, as two ops: one that keeps every layer's values, and one that turns them into gradients.

With g and c the loss's gradients by y and by logabsdet, and sums s_l = bias_l + h_{l-1} W_l, h_l = act_l(s_l):

    delta_L       = gradients by shift and raw scale, from the form
    delta_{l-1}   = (delta_l W_l^T) * act'(s_{l-1})
    dW_l = h_{l-1}^T delta_l,   dbias_l = sum_b delta_l,   dx = the form's own + delta_1 W_1^T

all of them under the staircase. Where no kernel serves, or torch.func looks on, or a gradient of the gradient is asked for, the map is
composed of `masked_linear` instead: the same mathematics in pieces that know their own derivatives.
"""

import torch
from torch import Tensor

from ... import _extension
from ..._backend import wants_reference
from ..._library import library
from .._differentiation import apply_function, transformed
from ..activation import Activation
from ..masked_linear import masked_linear
from ..scale_map import Form, ScaleMap
from .conditioner import Conditioner
from .reference import autoregressive_reference
from .solve import backward_by_solve

_NETWORK = "Tensor[] weights, {}Tensor[] context_weights, Tensor[] visible, Tensor? order, int[] activations"
_SCALE = "int scale_kind, float scale_p0, float scale_p1, int form"
library.define(
    f"autoregressive_training(Tensor x, Tensor? context, {_NETWORK.format('Tensor[] biases, ')}, {_SCALE}) -> (Tensor, Tensor, Tensor)"
)
library.define(
    f"autoregressive_backward(Tensor dy, Tensor dlogabsdet, Tensor values, Tensor? context, {_NETWORK.format('')}, {_SCALE}, "
    "bool need_dx) -> Tensor[]"
)
library.define(
    f"autoregressive_inverse_backward(Tensor dx, Tensor dlogabsdet, Tensor x, Tensor? context, {_NETWORK.format('Tensor[] biases, ')}, "
    f"{_SCALE}) -> Tensor[]"
)
_training = torch.ops.flowkernels.autoregressive_training.default
_backward = torch.ops.flowkernels.autoregressive_backward.default
_inverse_backward = torch.ops.flowkernels.autoregressive_inverse_backward.default
# torch.compile cannot ask
_COMPILED = _extension.has_kernel("autoregressive_training", "CPU")
_SOLVES_ON_CUDA = _extension.has_kernel("_autoregressive_solve", "CUDA")
if _SOLVES_ON_CUDA:
    library.impl("autoregressive_inverse_backward", backward_by_solve, "CUDA")
CUDA_LAYERS = 32  # kMaxLayers of the CUDA kernels, which take all layers as one argument


@torch.library.register_fake("flowkernels::autoregressive_training", lib=library)
def _(x, context, weights, biases, context_weights, visible, order, activations, *_) -> tuple[Tensor, Tensor, Tensor]:
    kept = (w.shape[1] * (1 + (a in (Activation.GELU, Activation.SILU))) for w, a in zip(weights, activations, strict=True))
    return x.new_empty(x.shape), x.new_empty(x.shape[:1]), x.new_empty(x.shape[0], x.shape[1] + sum(kept))


@torch.library.register_fake("flowkernels::autoregressive_backward", lib=library)
def _(dy, dlogabsdet, values, context, weights, context_weights, *scale_and_network) -> list[Tensor]:
    dx = values.new_empty(dy.shape if scale_and_network[-1] else (0, dy.shape[1]))
    dcontext = values.new_empty((0, 0) if context is None else context.shape)
    dweights = [values.new_empty(w.shape) for w in weights]
    dbiases = [values.new_empty(w.shape[1]) for w in weights]
    return [dx, dcontext, *dweights, *dbiases, *(values.new_empty(w.shape) for w in context_weights)]


@torch.library.register_fake("flowkernels::autoregressive_inverse_backward", lib=library)
def _(dx, dlogabsdet, x, context, weights, biases, context_weights, *_) -> list[Tensor]:
    dcontext = x.new_empty((0, 0) if context is None else context.shape)
    return [x.new_empty(x.shape), dcontext, *(x.new_empty(t.shape) for t in (*weights, *biases, *context_weights))]


def serves(conditioner: Conditioner, x: Tensor, inverse: bool) -> bool:
    """Whether the ops can take this call: a plain chain of layers, on a device that has the kernels."""
    if conditioner.wiring or conditioner.context_biases or transformed() or wants_reference("autoregressive", x.device):
        return False
    if x.device.type == "cuda":
        return inverse and _SOLVES_ON_CUDA and len(conditioner.weights) <= CUDA_LAYERS and x.device.index not in _extension.unserved_gpus
    return _COMPILED and x.device.type == "cpu"


def with_gradient(
    x: Tensor, conditioner: Conditioner, context: Tensor | None, scale: ScaleMap, form: Form, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The map or its inverse, for autograd. The conditioner must be one that `serves`."""
    weights, biases, visible, activations, context_weights, order, *_ = conditioner
    function, scale_and_form = _Inverse if inverse else _Training, (int(scale.kind), *scale.packed, int(form))
    return apply_function(function, x, context, visible, order, activations, scale_and_form, *weights, *biases, *context_weights)


def training_forward(
    x: Tensor, context: Tensor | None, conditioner: Conditioner, scale: ScaleMap, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward map: y, logabsdet, and the values that `training_backward` needs."""
    weights, biases, visible, activations, context_weights, order, *_ = conditioner
    kind = int(scale.kind)
    return _training(x, context, weights, biases, context_weights, visible, order, activations, kind, *scale.packed, int(form))


def training_backward(
    dy: Tensor,
    dlogabsdet: Tensor,
    values: Tensor,
    context: Tensor | None,
    conditioner: Conditioner,
    scale: ScaleMap,
    form: Form,
    need_dx: bool,
) -> list[Tensor]:
    """The gradient of the forward map: by x (empty unless asked for), by the context (empty without one), then by weights, biases,
    context weights."""
    weights, _, visible, activations, context_weights, order, *_ = conditioner
    kind = int(scale.kind)
    return _backward(
        dy, dlogabsdet, values, context, weights, context_weights, visible, order, activations, kind, *scale.packed, int(form), need_dx
    )


def inverse_backward(
    dx: Tensor, dlogabsdet: Tensor, x: Tensor, context: Tensor | None, conditioner: Conditioner, scale: ScaleMap, form: Form
) -> list[Tensor]:
    """The gradient of (x, logabsdet) = f^-1(z): by z, by the context (empty without one), then by weights, biases, context weights."""
    weights, biases, visible, activations, context_weights, order, *_ = conditioner
    kind = int(scale.kind)
    return _inverse_backward(
        dx, dlogabsdet, x, context, weights, biases, context_weights, visible, order, activations, kind, *scale.packed, int(form)
    )


class _Training(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, context, visible, order, activations, scale_and_form, *parameters) -> tuple[Tensor, Tensor]:
        n = len(visible)
        weights, biases, context_weights = list(parameters[:n]), list(parameters[n : 2 * n]), list(parameters[2 * n :])
        y, logabsdet, values = _training(x, context, weights, biases, context_weights, visible, order, activations, *scale_and_form)
        ctx.save_for_backward(x, context, values, order, *visible, *parameters)
        ctx.activations, ctx.scale_and_form = activations, scale_and_form
        return y, logabsdet

    @staticmethod
    def backward(ctx, dy: Tensor, dlogabsdet: Tensor):
        x, context, values, order, visible, weights, biases, context_weights = _saved(ctx)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            conditioner = Conditioner(weights, biases, visible, ctx.activations, context_weights, order)
            return _differentiable_gradient(ctx, x, context, conditioner, dy, dlogabsdet, inverse=False)
        need_dx = ctx.needs_input_grad[0]
        dx, dcontext, *dparameters = _backward(
            dy, dlogabsdet, values, context, weights, context_weights, visible, order, ctx.activations, *ctx.scale_and_form, need_dx
        )
        return dx if need_dx else None, None if context is None else dcontext, None, None, None, None, *dparameters


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, context, visible, order, activations, scale_and_form, *parameters) -> tuple[Tensor, Tensor]:
        n = len(visible)
        weights, biases, context_weights = list(parameters[:n]), list(parameters[n : 2 * n]), list(parameters[2 * n :])
        x, logabsdet = torch.ops.flowkernels.autoregressive(
            z, context, weights, biases, context_weights, [], visible, order, activations, [], *scale_and_form, True
        )
        ctx.save_for_backward(z, context, x, order, *visible, *parameters)
        ctx.activations, ctx.scale_and_form = activations, scale_and_form
        return x, logabsdet

    @staticmethod
    def backward(ctx, dx: Tensor, dlogabsdet: Tensor):
        z, context, x, order, visible, weights, biases, context_weights = _saved(ctx)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            conditioner = Conditioner(weights, biases, visible, ctx.activations, context_weights, order)
            return _differentiable_gradient(ctx, z, context, conditioner, dx, dlogabsdet, inverse=True)
        dz, dcontext, *dparameters = _inverse_backward(
            dx, dlogabsdet, x, context, weights, biases, context_weights, visible, order, ctx.activations, *ctx.scale_and_form
        )
        return dz, None if context is None else dcontext, None, None, None, None, *dparameters


def _saved(ctx) -> tuple:
    """input, context, what the forward pass kept, order, and the lists visible, weights, biases, context weights."""
    x, context, kept, order, *tensors = ctx.saved_tensors
    n = len(ctx.activations)
    return x, context, kept, order, tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n], tensors[3 * n :]


def _differentiable_gradient(
    ctx, x: Tensor, context: Tensor | None, conditioner: Conditioner, dy: Tensor, dlogabsdet: Tensor, inverse: bool
) -> tuple:
    """The same gradient as a graph of its own, for create_graph=True."""
    *packed, form = ctx.scale_and_form
    scale = ScaleMap.from_packed(*packed)
    y, logabsdet = autoregressive_reference(x, conditioner, context, scale, Form(form), inverse, linear=masked_linear)
    parameters = (*conditioner.weights, *conditioner.biases, *conditioner.context_weights)
    inputs = (x, context, None, None, None, None, *parameters)
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
    gradients = iter(torch.autograd.grad((y, logabsdet), wanted, (dy, dlogabsdet), create_graph=True, allow_unused=True))
    return tuple(next(gradients) if needed else None for needed in ctx.needs_input_grad)
