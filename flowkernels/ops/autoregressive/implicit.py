"""The gradient of an inverse where no kernel makes it: implicit differentiation, in the memory of one pass.

With x = G(z, x; theta), the inverse form of z at the shift and scale that the network gives for x, and cotangents g of x and c of log|det|,

    w = g + (dG/dx)^T w + c dlog|det|/dx,     dz = (dG/dz)^T w,     dtheta = (dG/dtheta)^T w + c dlog|det|/dtheta

dG/dx is strictly triangular in the order of generation, so that as many rounds as there are features, from w = g on, give w exactly.
Each is a vector-Jacobian product of one graph, made at x; differentiating the D passes themselves would keep D graphs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._backend import as_called, chosen
from .._differentiation import apply_function, each_cotangent, pulled_back
from ..masked_linear import masked_linear
from ..scale_map import Form, PoweredMap, ScaleMap
from .conditioner import Conditioner
from .loop import autoregressive_op
from .reference import autoregressive_reference
from .training import loop_serves


def inverse_with_gradient(
    z: Tensor, conditioner: Conditioner, context: Tensor | None, scale: ScaleMap | PoweredMap, form: Form
) -> tuple[Tensor, Tensor]:
    """The inverse map, for autograd."""
    learned = [scale.a] if isinstance(scale, PoweredMap) else []
    weights, biases, _, _, context_weights, _, _, context_biases = conditioner
    return apply_function(_Inverse, conditioner, scale, form, z, context, *weights, *biases, *context_weights, *context_biases, *learned)


def _by_passes(z, context, conditioner, *map_and_direction) -> tuple[Tensor, Tensor]:
    return autoregressive_reference(z, conditioner, context, *map_and_direction)


class _Shape(NamedTuple):
    """What is no tensor of a map."""

    sizes: list[int]  # of the lists of parameters
    activations: list[int]
    wiring: list[int]
    scale: ScaleMap
    form: Form

    def inverse(self, visible: list[Tensor], order: Tensor | None, inputs: Sequence[Tensor | None], at: Tensor | None):
        """x and log|det|, and how many rounds make w. inputs: z, context, and the parameters."""
        z, context, *parameters = inputs
        taken = iter(parameters)
        weights, biases, context_weights, context_biases = ([next(taken) for _ in range(n)] for n in self.sizes)
        a = next(taken, None)
        scale = self.scale if a is None else PoweredMap(self.scale, a)
        network = Conditioner(weights, biases, visible, self.activations, context_weights, order, self.wiring, context_biases)
        outputs = autoregressive_reference(z, network, context, scale, self.form, True, linear=masked_linear, at=at)
        return outputs, z.shape[1] - network.passing(scale)


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, conditioner, scale, form, z, context, *parameters) -> tuple[Tensor, Tensor]:
        invert = autoregressive_op if loop_serves(conditioner, scale, z.is_cuda) else _by_passes
        x, logabsdet = invert(z, context, conditioner, scale, form, True)
        weights, biases, visible, activations, context_weights, order, wiring, context_biases = conditioner
        ctx.save_for_backward(x, order, *visible, z, context, *parameters)
        sizes = [len(tensors) for tensors in (weights, biases, context_weights, context_biases)]
        ctx.backend = chosen()
        ctx.shape = _Shape(sizes, activations, wiring, scale.scale if isinstance(scale, PoweredMap) else scale, form)
        return x, logabsdet

    @staticmethod
    @as_called
    def backward(ctx, g: Tensor, c: Tensor):
        shape, x, order, *tensors = ctx.shape, *ctx.saved_tensors
        layers, needed = shape.sizes[0], ctx.needs_input_grad[3:]
        visible, inputs = tensors[:layers], tensors[layers:]
        with torch.autocast(x.device.type, enabled=False):
            gradient = _differentiable if torch.is_grad_enabled() else _implicit
            found = iter(gradient(shape, x, visible, order, inputs, needed, g, c))
        return None, None, None, *(next(found) if n else None for n in needed)


def _implicit(shape: _Shape, x, visible, order, inputs, needed: Sequence[bool], g: Tensor, c: Tensor) -> list[Tensor]:
    inputs = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
    x = x.detach().requires_grad_()
    wanted = [t for t, n in zip(inputs, needed, strict=True) if n]

    def gradients(g: Tensor, c: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            outputs, rounds = shape.inverse(visible, order, inputs, x)
        w = g
        for _ in range(rounds):
            w = g + pulled_back(outputs, (w, c), [x], retain_graph=True)[0]
        return pulled_back(outputs, (w, c), wanted)

    return each_cotangent(gradients, g, c)


def _differentiable(shape: _Shape, x, visible, order, inputs, needed: Sequence[bool], g: Tensor, c: Tensor) -> list[Tensor]:
    """The same gradient as a graph of its own, for create_graph=True: of the D passes."""
    # views, or what one input owes to another, or to itself in another place, would be counted twice
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    wanted = [t for t, n in zip(inputs, needed, strict=True) if n]
    outputs, _ = shape.inverse(visible, order, inputs, None)
    return pulled_back(outputs, (g, c), wanted, create_graph=True)
