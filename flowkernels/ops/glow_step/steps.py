"""All steps of a level of Glow, conditioners included, in one call, which costs Python 30 us a step less than its parts and threads two
meetings. Images go through all steps a few at a time (csrc/cpu/glow_steps.cpp). The gradient goes back by the kernels of the parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _extension
from ..._backend import wants_reference
from ..._library import library, register_fake
from ..._torch import any_autocast, is_wanted
from .._differentiation import apply_function, needs_autograd, pulled_back, transformed
from ..conv_net import MOST_HIDDEN, conv_net, conv_net_backward
from ..conv_net.reference import PARAMETERS, per_network
from . import glow_step, glow_step_backward
from .reference import glow_steps_reference, glow_steps_training_reference, networks_of, steps_in_turn

__all__ = ["glow_steps"]

_STEPS = "Tensor x, Tensor? context, Tensor[] networks, Tensor[] weights, Tensor[] biases, bool inverse"
library.define(f"glow_steps({_STEPS}) -> (Tensor, Tensor)")
library.define(f"glow_steps_training({_STEPS}) -> ({', '.join(7 * ['Tensor'])})")


def _composite(*arguments) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in glow_steps_reference(*arguments))


def _composite_training(*arguments) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in glow_steps_training_reference(*arguments))


library.impl("glow_steps", _composite, "CompositeExplicitAutograd")
library.impl("glow_steps_training", _composite_training, "CompositeExplicitAutograd")
_glow_steps = torch.ops.flowkernels.glow_steps.default
_training = torch.ops.flowkernels.glow_steps_training.default
_COMPILED = _extension.has_kernel("glow_steps", "CPU")  # torch.compile cannot ask


@register_fake("glow_steps")
def _(x: Tensor, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


@register_fake("glow_steps_training")
def _(
    x: Tensor, context: Tensor | None, networks: list[Tensor], weights: list[Tensor], biases: list[Tensor], inverse: bool
) -> tuple[Tensor, ...]:
    steps, channels = len(weights), x.shape[-1]
    widths = channels, channels, networks[0].shape[1], networks[0].shape[0], networks[2].shape[0]
    counts = steps - inverse, steps, steps, steps, steps
    kept = (x.new_empty((n, *x.shape[:-1], width)) for n, width in zip(counts, widths, strict=True))
    return x.new_empty(x.shape), x.new_empty(x.shape[:1]), *kept


class _GlowSteps(torch.autograd.Function):
    """context may be None. tensors: those of the networks, the weights and the biases."""

    @staticmethod
    def forward(ctx, inverse: bool, count: int, x: Tensor, context: Tensor | None, *tensors) -> tuple[Tensor, Tensor]:
        y, logabsdet, *kept = _training(x, context, *_lists(tensors, count), inverse)
        ctx.inverse, ctx.count = inverse, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, context, *tensors, *kept)
        return y, logabsdet

    @staticmethod
    def backward(ctx, dy: Tensor | None, dlogabsdet: Tensor | None):
        x, context, *tensors = ctx.saved_tensors
        tensors, kept = tensors[:-5], tensors[-5:]
        dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
        dlogabsdet = x.new_zeros(x.shape[:1]) if dlogabsdet is None else dlogabsdet.contiguous()
        needed, of_networks = ctx.needs_input_grad[2:], PARAMETERS * ctx.count
        parameters = any(needed[2 : 2 + of_networks]) and is_wanted(ctx, slice(-len(tensors), of_networks - len(tensors)))
        if not parameters:
            needed = *needed[:2], *(False for _ in range(of_networks)), *needed[2 + of_networks :]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the gradient of the gradient is asked for
            inputs = [t if t is None else t.view_as(t) for t in (x, context, *tensors)]
            outputs = glow_steps_reference(*inputs[:2], *_lists(inputs[2:], ctx.count), ctx.inverse)
            wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
            found = iter(pulled_back(outputs, (dy, dlogabsdet), wanted, create_graph=True))
            return None, None, *(next(found) if need else None for need in needed)
        gradients = _backward(dy, dlogabsdet, x, context, *_lists(tensors, ctx.count), *kept, inverse=ctx.inverse, parameters=parameters)
        return None, None, *(t if need else None for t, need in zip(gradients, needed, strict=True))


def _lists(tensors: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    matrices = PARAMETERS * count
    return list(tensors[:matrices]), list(tensors[matrices : matrices + count]), list(tensors[matrices + count :])


def _backward(
    dy: Tensor,
    dlogabsdet: Tensor,
    x: Tensor,
    context: Tensor | None,
    networks: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor,
    raw: Tensor,
    inputs: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    inverse: bool,
    parameters: bool,
) -> list[Tensor | None]:
    """Gradients to x, the context, if `parameters` the networks' tensors, the weights and the biases."""
    count, half = len(weights), x.shape[-1] // 2
    dnetworks: list[Sequence[Tensor | None]] = [()] * count
    dweights: list[Tensor | None] = [None] * count
    dbiases: list[Tensor | None] = [None] * count
    dcontext = dpassing = None
    own = per_network(networks)
    for i in range(count) if inverse else reversed(range(count)):
        matrix = i if inverse else i + 1
        weight, bias = (weights[matrix], biases[matrix]) if matrix < count else (None, None)
        given = x if inverse and i + 1 == count else rows[i]
        dy, draw, dweight, dbias = glow_step_backward(dy, dlogabsdet, dpassing, given, raw[i], weight, bias, inverse)
        if matrix < count:
            dweights[matrix], dbiases[matrix] = dweight, dbias
        weight_in, _, weight_mid, _, weight_out, bias_out, log_gain = own[i]
        dinput, *dnetwork = conv_net_backward(
            draw, inputs[i], first[i], second[i], weight_in, weight_mid, weight_out, bias_out, log_gain, parameters
        )
        dnetworks[i] = dnetwork if parameters else [None] * PARAMETERS
        dpassing = dinput if context is None else dinput[..., :half].contiguous()
        if context is not None:
            d = dinput[..., half:].sum((1, 2))
            dcontext = d if dcontext is None else dcontext + d
    if inverse:  # the first network was given a part of x
        dy = dy + torch.nn.functional.pad(dpassing, (0, half))
    else:
        dy, _, dweights[0], dbiases[0] = glow_step_backward(dy, dlogabsdet, dpassing, x, None, weights[0], biases[0], inverse)
    return [dy, dcontext, *(d for own in dnetworks for d in own), *dweights, *dbiases]


def glow_steps(
    x: Tensor,
    networks: Sequence[Sequence[Tensor]],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    context: Tensor | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """All steps of a level of Glow (Kingma & Dhariwal 2018, section 3), their conditioners included.

        y = coupling_n(W_n (... coupling_1(W_1 (x + bias_1)) ... + bias_n))
        y = W_1 coupling_1^-1(... W_n coupling_n^-1(x) - bias_n ...) - bias_1      inverse, where W are the inverse matrices

    On a CPU it is one kernel, in which a few images at a time go through all steps; else it is `conv_net` and `glow_step` in turn.

    Args:
        x: [batch, H, W, channels], an even number of channels, float32 or float64; a view of channels-first images is read in place.
        networks: for each step the tensors of its conditioner, as `conv_net` takes them.
        weights: for each step [channels, channels], actnorm's scale being part of it. biases: for each step [channels].
        context: [batch, features], which joins what the conditioners are given as channels of constant value; or None.
        inverse: the steps undone, last first.

    Returns:
        y, like x; and log|det| of the couplings alone (nats), [batch], with the dtype of x.

    Raises:
        ValueError: there is no step, there are not as many networks, weights and biases, or a shape, dtype or device does not fit.
    """
    if not weights or len(networks) != len(weights) or len(biases) != len(weights):
        got = ", ".join(str(len(each)) for each in (networks, weights, biases))
        raise ValueError(f"networks, weights and biases must have one entry for each step, and at least one; got {got}")
    if counts := [len(network) for network in networks if len(network) != PARAMETERS]:
        raise ValueError(f"each of networks must be the seven tensors of a conditioner; got {counts[0]}")
    parameters = [t for network in networks for t in network]
    tensors = x, context, *parameters, *weights, *biases
    with_gradient = needs_autograd(tensors)
    if not transformed() and _serves(x, networks, with_gradient):
        if not x.is_contiguous() and not x.movedim(-1, 1).is_contiguous():
            x = x.contiguous()
        try:
            if not with_gradient:
                return _glow_steps(x, context, parameters, weights, biases, inverse)
            others = (t if t is None else t.contiguous() for t in tensors[1:])
            return apply_function(_GlowSteps, inverse, len(weights), x, *others)
        except RuntimeError:
            if not torch.compiler.is_compiling():
                with torch.no_grad():  # the parts say what does not fit
                    _in_turn(x, networks, weights, biases, context, inverse, rows=0)
            raise
    return _in_turn(x, networks, weights, biases, context, inverse)


def _in_turn(
    x: Tensor,
    networks: Sequence[Sequence[Tensor]],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    inverse: bool,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The steps by `conv_net` and `glow_step`, of the first rows or of all."""
    if context is not None and (context.dim() != 2 or len(context) != len(x) or context.dtype != x.dtype):
        raise ValueError(f"context must be [{len(x)}, features], {x.dtype}, to fit x; got {list(context.shape)}, {context.dtype}")
    nets = networks_of(networks, None if context is None else context[:rows], conv_net)
    return steps_in_turn(glow_step, x[:rows], nets, weights, biases, inverse=inverse)


def _serves(x: Tensor, networks: Sequence[Sequence[Tensor]], with_gradient: bool) -> bool:
    if not (_COMPILED and x.is_cpu) or x.dim() != 4 or x.dtype not in (torch.float32, torch.float64) or any_autocast():
        return False
    first, second = ([network[i].shape[0] if network[i].dim() else 0 for network in networks] for i in (0, 2))
    if with_gradient and not (all(n == first[0] for n in first) and all(n == second[0] for n in second)):  # layers are kept together
        return False
    return max(second) <= MOST_HIDDEN and not wants_reference("glow_steps", x.device)
