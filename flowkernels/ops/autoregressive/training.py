"""Maps with a gradient, as two ops: one that keeps its layers' values, and one that turns them into gradients.

With g and c the loss's gradients by y and by logabsdet, and sums s_l = bias_l + h_{l-1} W_l, h_l = act_l(s_l):

    delta_L       = gradients by shift and raw scale, from the form
    delta_{l-1}   = (delta_l W_l^T) * act'(s_{l-1})
    dW_l = h_{l-1}^T delta_l,   dbias_l = sum_b delta_l,   dx = the form's own + delta_1 W_1^T

all of them under the staircase. Where few features feed many units, h_1 costs less to make again than to hold, and on a CPU it is not kept.
In a wired network what reaches h_l on each of its ways is added up before the derivative, and a gate
turns delta_l into that of the sum and that of the context term. On a CPU both ops are one kernel each, on a GPU a list of launches
(csrc/autoregressive_training_steps.h), for the inverse with one loop a map among them (csrc/autoregressive_mirror.h). Plain chains are
trained by Triton's products (products.py) where the CUDA library was not built, and large ones where tf32 is allowed. Where no kernel
serves, or torch.func looks on, or a gradient of the gradient is asked for, the map is composed of `masked_linear` instead: the same
mathematics in pieces that know their own derivatives.
An inverse that no kernel takes is differentiated implicitly (implicit.py).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _extension
from ..._backend import as_called, chosen, wants_reference
from ..._library import library, register_fake
from ..._torch import is_wanted
from .._differentiation import apply_function, each_cotangent, pulled_back, transformed
from ..activation import DERIVED_FROM_SUM, Activation
from ..masked_linear import masked_linear
from ..masked_linear.reference import masked_linear_dense, sees_all
from ..scale_map import PoweredMap, ScaleKind, ScaleMap
from .conditioner import Conditioner, MaskedLayer, Wiring
from .loop import Lists, Map, autoregressive_op, begins_with_inverse, in_turn, stack_op
from .mirror import is_plain, mirrored_layers
from .products import backward_by_products, training_by_products
from .reference import autoregressive_reference, is_coupling

_LISTS = "Tensor[] weights, Tensor[] biases, Tensor[] context_weights, Tensor[] context_biases, Tensor[] visible"
_STACK = f"{_LISTS}, Tensor[] orders, int[] activations, int[] wiring, int[] stages, float[] scales"
# those with _ have kernels of the CUDA library alone, the others products.py there
for _name, _more in (("", ""), ("_", ", bool need_dcontext")):
    library.define(f"{_name}autoregressive_training(Tensor x, Tensor? context, {_STACK}) -> (Tensor, Tensor, Tensor[])")
    library.define(
        f"{_name}autoregressive_backward(Tensor dy, Tensor dlogabsdet, Tensor[] kept, Tensor? context, {_STACK}, int[] learned, "
        f"bool need_dx{_more}, bool need_parameters) -> Tensor[]"
    )
library.define(
    f"autoregressive_inverse_backward(Tensor dx, Tensor dlogabsdet, Tensor x, Tensor? context, {_LISTS}, Tensor? order, int[] activations, "
    "int[] wiring, int scale_kind, float scale_p0, float scale_p1, int form) -> Tensor[]"
)
_training = torch.ops.flowkernels.autoregressive_training.default
_backward = torch.ops.flowkernels.autoregressive_backward.default
_training_on_gpu = torch.ops.flowkernels._autoregressive_training.default
_backward_on_gpu = torch.ops.flowkernels._autoregressive_backward.default
_inverse_backward = torch.ops.flowkernels.autoregressive_inverse_backward.default
# torch.compile cannot ask
_COMPILED = _extension.has_kernel("autoregressive_training", "CPU")
_COMPILED_FOR_CUDA = _extension.has_kernel("_autoregressive_training", "CUDA")
CUDA_LAYERS = 32  # kMaxLayers of the CUDA kernels, which take all layers as one argument
_LARGE_PRODUCT = 1 << 32  # multiply-adds, some 0.2 ms of an H200 in float32: what a launch from Python takes is no matter then
_SMALL_PRODUCT = 1 << 22  # multiply-adds: from there on two cores of a Zen 4 feel the half that is skipped
_MOST_WEIGHTS = 1 << 31  # of a network, as the GPU's loop packs them: it counts 34 GB, their staircases' paddings among them


@register_fake("_autoregressive_training")
def _(x, context, *lists) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _like_training(x, lists, remakes=False)


@register_fake("autoregressive_training")
def _(x, context, *lists) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _like_training(x, lists, remakes=x.device.type == "cpu")


def _like_training(x: Tensor, lists: Sequence, *, remakes: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    networks = [m.conditioner.layers for m in Lists.without_affines(*lists).maps()]
    columns = [sum(map(_columns, layers)) - (_remade_columns(layers) if remakes else 0) for layers in networks]
    return x.new_empty(x.shape), x.new_empty(x.shape[:1]), [x.new_empty(x.shape[0], x.shape[1] + n) for n in columns]


def _columns(layer: MaskedLayer) -> int:
    """How many columns of `values` the kernels have of a layer: TrainingColumns in csrc/training_columns.h."""
    of = lambda activation: 1 + (activation in DERIVED_FROM_SUM)
    term = of(layer.context_activation) if _keeps_term(layer) else 0
    return layer.visible.shape[0] * (of(layer.activation) + layer.gate + term)


def _keeps_term(layer: MaskedLayer) -> bool:
    """Whether the context term is more than a part of the sum."""
    return layer.context_weight is not None and (layer.gate or layer.context_activation != Activation.IDENTITY)


def _remade_columns(layers: list[MaskedLayer]) -> int:
    """How many of them the kernel for CPUs makes again in the backward pass: csrc/cpu/autoregressive_training_network.h."""
    if len(layers) < 2 or not all(_is_link(number, layer) for number, layer in enumerate(layers)):
        return 0
    first, second = layers[:2]
    inputs = first.weight.shape[0] + (0 if first.context_weight is None else 2 * first.context_weight.shape[0])
    return _columns(first) if 8 * inputs <= second.visible.shape[0] else 0


def _is_link(number: int, layer: MaskedLayer) -> bool:
    """Whether a layer reads the one before it and adds at most its context to the sums."""
    return not (layer.unitwise or _keeps_term(layer)) and layer.residual is None and layer.source in (None, number)


@register_fake("_autoregressive_backward")
def _(*arguments) -> list[Tensor]:
    *others, need_dcontext, need_parameters = arguments
    dx, dcontext, *gradients = _like_backward(*others, need_parameters)
    return [dx, dcontext if need_dcontext else dcontext.new_empty((0, *dcontext.shape[1:])), *gradients]


@register_fake("autoregressive_backward")
def _like_backward(
    dy, dlogabsdet, kept, context, weights, biases, context_weights, context_biases, visible, orders, *numbers
) -> list[Tensor]:
    *_, stages, _, learned, need_dx, need_parameters = numbers
    dx = dy.new_empty(dy.shape if need_dx or begins_with_inverse(stages) else (0, dy.shape[1]))
    dcontext, *parameters = _gradients_like(dy, context, weights, biases, context_weights, context_biases)
    parameters = parameters if need_parameters else [dy.new_empty(0) for _ in parameters]
    return [dx, dcontext, *parameters, *(dy.new_empty(1) for _ in range(sum(learned)))]


@register_fake("autoregressive_inverse_backward")
def _(dx, dlogabsdet, x, context, weights, biases, context_weights, context_biases, *_) -> list[Tensor]:
    return [x.new_empty(x.shape), *_gradients_like(x, context, weights, biases, context_weights, context_biases)]


def _gradients_like(like: Tensor, context: Tensor | None, *parameters: Sequence[Tensor]) -> list[Tensor]:
    dcontext = like.new_empty((0, 0) if context is None else context.shape)
    return [dcontext, *(like.new_empty(t.shape) for tensors in parameters for t in tensors)]


def _inverses_one_by_one(dy, dlogabsdet, kept, context, *lists_and_rest) -> list[Tensor]:
    """autoregressive_backward where a kernel takes the inverse of one map."""
    *lists, _, _, _ = lists_and_rest
    found, dcontext = [], None
    for x, (network, scale, form, *_) in zip(reversed(kept), reversed(Lists.without_affines(*lists).maps()), strict=True):
        own = context if network.context_weights else None
        tensors = network.weights, network.biases, network.context_weights, network.context_biases, network.visible
        numbers = network.order, network.activations, network.wiring, int(scale.kind), *scale.packed, int(form)
        dy, term, *parameters = _inverse_backward(dy, dlogabsdet, x, own, *tensors, *numbers)
        dcontext = dcontext if own is None else term if dcontext is None else dcontext + term
        found.append(_split(parameters, list(map(len, tensors[:3]))))
    of_lists = zip(*reversed(found), strict=True)
    return [dy, dy.new_empty((0, 0)) if dcontext is None else dcontext, *(t for lists in of_lists for own in lists for t in own)]


def _backward_on_cuda(dy, dlogabsdet, kept, context, *lists_and_rest) -> list[Tensor]:
    *_, stages, _, _, _, _ = lists_and_rest
    backward = _inverses_one_by_one if begins_with_inverse(stages) else backward_by_products
    return backward(dy, dlogabsdet, kept, context, *lists_and_rest)


library.impl("autoregressive_training", training_by_products, "CUDA")
library.impl("autoregressive_backward", _backward_on_cuda, "CUDA")


def loop_serves(conditioner: Conditioner, scale: ScaleMap | PoweredMap, cuda: bool) -> bool:
    """Whether the loop's kernel for CPUs, or that for CUDA, takes such networks: the latter has weights and outputs for every feature and
    takes no more weights than it can count, and a learned scale is a number that no compiled graph can read."""
    if isinstance(scale, PoweredMap) and torch.compiler.is_compiling():
        return False
    if not cuda:
        return True
    weights, features = conditioner.weights, conditioner.features
    if len(weights) > CUDA_LAYERS or sum([w.numel() for w in weights]) > _MOST_WEIGHTS:
        return False
    sources = [layer.source for layer in Wiring.each(conditioner.wiring)] or range(len(weights))
    reads_all = all([w.shape[0] == features for w, source in zip(weights, sources, strict=True) if source == 0 and w.dim() == 2])
    return reads_all and _is_whole(conditioner, scale)


def _is_whole(conditioner: Conditioner, scale: ScaleMap | PoweredMap) -> bool:
    """Whether the network gives shift and raw scale of every feature."""
    return scale.kind != ScaleKind.UNIT and conditioner.visible[-1].shape[0] == 2 * conditioner.features


def serves(maps: Sequence[Map], x: Tensor) -> bool:
    """Whether `with_gradient` can take these maps: without an affine map before them, on a device that has the kernels."""
    device, cuda = x.device, x.is_cuda  # the type of a device is text, made anew whenever it is asked for, in 0.7 us
    if transformed() or wants_reference("autoregressive", device):
        return False
    if not (cuda or (_COMPILED and x.is_cpu)):
        return False
    for network, scale, _, inverse, affine in maps:
        if affine is not None or not loop_serves(network, scale, cuda):
            return False
        if inverse and (isinstance(scale, PoweredMap) or not _is_whole(network, scale)):
            return False
        if cuda and not (_inverts(network, device) if inverse else _trains(network, scale, device)):
            return False
    return True


def in_parallel(m: Map) -> Map:
    """The map; of a coupling's inverse the forward map that it is: (z - shift) / sigma is the form "divide" of the same network."""
    undone_by = m.form.undone_by if m.inverse else None
    if undone_by is None or not is_coupling(m.conditioner, m.conditioner.passing(m.scale)):
        return m
    return m._replace(form=undone_by, inverse=False)


def _inverts(network: Conditioner, device: torch.device) -> bool:
    layers = mirrored_layers(network)
    return layers is not None and layers <= CUDA_LAYERS and _has_library(device)


def _trains(network: Conditioner, scale: ScaleMap | PoweredMap, device: torch.device) -> bool:
    return not isinstance(scale, PoweredMap) and (_has_library(device) or _takes_products(network))


def _takes_products(network: Conditioner) -> bool:
    """Whether products.py takes such networks. A compiler is given the pieces, to fuse them with what is around."""
    contexts = len(network.context_weights)
    fits = is_plain(network) and not network.context_biases and contexts in (0, len(network.weights))
    return fits and not torch.compiler.is_compiling()


def _has_library(device: torch.device) -> bool:
    return _COMPILED_FOR_CUDA and device.index not in _extension.unserved_gpus


def _by_library(maps: Sequence[Map], x: Tensor) -> bool:
    """Whether the CUDA library trains these maps. It multiplies in full precision: where tf32 is allowed, large products are Triton's."""
    if not _has_library(x.device):
        return False
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return True
    largest = max(w.numel() for m in maps for w in m.conditioner.weights)
    return x.shape[0] * largest < _LARGE_PRODUCT or not all(_takes_products(m.conditioner) for m in maps)


def with_gradient(x: Tensor, context: Tensor | None, maps: Sequence[Map], lists: Lists) -> tuple[Tensor, Tensor]:
    """Maps one after another, for autograd, those of one direction as one node of its graph; the sum of their log|det|s. `serves` must
    hold. A map that takes no context is not given it. lists: those of all maps."""
    directions = {m.inverse for m in maps}
    if len(directions) > 1:
        total = None
        for _, group in itertools.groupby(maps, key=lambda m: m.inverse):
            group = list(group)
            x, logabsdet = with_gradient(x, context, group, Lists.of(group))
            total = logabsdet if total is None else total + logabsdet
        return x, total
    learned = (m.scale.a for m in maps if isinstance(m.scale, PoweredMap))
    own = context if lists.context_weights else None
    return apply_function(_Maps, x, own, maps, lists, *_parameters(lists), *learned)


def _parameters(lists: Lists) -> tuple[Tensor, ...]:
    return (*lists.weights, *lists.biases, *lists.context_weights, *lists.context_biases)


class _Numbers(NamedTuple):
    """What is no tensor of a stack."""

    activations: list[int]
    wiring: list[int]
    stages: list[int]
    scales: list[float]
    maps: list[ScaleMap]  # a learned one without its number
    learned: list[int]  # whether each is learned


class _Maps(torch.autograd.Function):
    """Maps in one direction, one after another. The gradient of an inverse needs what it returned, that of a forward map
    the values of its layers."""

    @staticmethod
    def forward(ctx, x, context, maps, lists, *parameters) -> tuple[Tensor, Tensor]:
        *tensors, orders, _, activations, wiring, stages, packed = lists
        if maps[0].inverse and len(maps) == 1:
            y, total = autoregressive_op(x, context, *maps[0][:-1])
            kept = [y]
        elif maps[0].inverse:
            y, total, between = stack_op(x, context, *lists, True)
            kept = [*between.unbind(), y]
        else:
            training = _training_on_gpu if x.is_cuda and _by_library(maps, x) else _training
            y, total, kept = training(x, context, *tensors, orders, activations, wiring, stages, packed)
        ctx.save_for_backward(x, context, *kept, *parameters)
        ctx.orders, ctx.visible = orders, lists.visible  # integers, which autograd is not asked to watch: a small flow feels that
        ctx.backend, ctx.written = chosen(), _times_written(orders, lists.visible)
        learned = [int(isinstance(m.scale, PoweredMap)) for m in maps]
        bases = [m.scale.scale if powered else m.scale for m, powered in zip(maps, learned, strict=True)]
        ctx.numbers = _Numbers(activations, wiring, stages, packed, bases, learned)
        ctx.contexts, ctx.kept = (len(lists.context_weights), len(lists.context_biases)), len(kept)
        ctx.by_library = not maps[0].inverse and training is _training_on_gpu
        return y, total

    @staticmethod
    @as_called
    def backward(ctx, dy: Tensor, dlogabsdet: Tensor):
        (activations, wiring, stages, packed, bases, learned), x, context, *tensors = ctx.numbers, *ctx.saved_tensors
        orders, visible, layers = ctx.orders, ctx.visible, len(activations)
        if ctx.written != _times_written(orders, visible):
            raise RuntimeError("order or visible, which the gradient needs, has been modified by an inplace operation")
        kept, *parameters, numbers = _split(tensors, (ctx.kept, layers, layers, *ctx.contexts))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # views, or what one input owes to another, or to itself in another place, would be counted twice
            x, context = x.view_as(x), None if context is None else context.view_as(context)
            *parameters, numbers = ([t.view_as(t) for t in part] for part in (*parameters, numbers))
            lists = Lists.without_affines(*parameters, visible, orders, activations, wiring, stages, packed)
            a = iter(numbers)
            scales = [PoweredMap(base, next(a)) if powered else base for base, powered in zip(bases, learned, strict=True)]
            maps = [m._replace(scale=scale) for m, scale in zip(lists.maps(), scales, strict=True)]
            return _differentiable_gradient(ctx, x, context, maps, (*_parameters(lists), *numbers), dy, dlogabsdet)
        need_dx, need_dcontext, _, _, *of_parameters = ctx.needs_input_grad
        need_parameters = any(of_parameters) and is_wanted(ctx, slice(-len(of_parameters), None))
        networks = *parameters, visible, orders, activations, wiring, stages, packed
        backward, more = (_backward_on_gpu, (need_dcontext,)) if ctx.by_library else (_backward, ())
        learned = learned if need_parameters else [0] * len(learned)
        dx, dcontext, *parameters = each_cotangent(
            backward, dy, dlogabsdet, kept, context, *networks, learned, need_dx, *more, need_parameters
        )
        if not need_parameters:
            parameters = [None] * len(of_parameters)
        elif numbers:  # of which the op's are the gradients by bound * a
            bounds = [base.packed[0] for base, powered in zip(bases, learned, strict=True) if powered]
            for i, (bound, a) in enumerate(zip(bounds, numbers, strict=True), start=len(parameters) - len(numbers)):
                parameters[i] = (parameters[i] * bound).view_as(a)
        dcontext = dcontext if context is not None and need_dcontext else None
        return dx if need_dx else None, dcontext, None, None, *parameters


def _times_written(*lists: Sequence[Tensor]) -> int:
    """How often somebody has written into tensors; nobody counts that of inference tensors, nor do compilers."""
    if torch.compiler.is_compiling():
        return 0
    return sum([t._version for tensors in lists for t in tensors if not t.is_inference()])


def _split(items: Sequence, sizes: Sequence[int]) -> list[list]:
    """Lists of these sizes, and what remains."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [list(items[a:b]) for a, b in itertools.pairwise(ends)] + [list(items[ends[-1] :])]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor) -> Tensor:
    """The masked linear map, for graphs that are differentiated once more: where it is small, a dense product takes less time than to skip
    half of it.
    """
    dense = x.shape[0] * weight.numel() < _SMALL_PRODUCT or sees_all(visible, weight.shape[0])
    return (masked_linear_dense if dense else masked_linear)(x, weight, bias, visible)


def _differentiable_gradient(
    ctx, x: Tensor, context: Tensor | None, maps: Sequence[Map], parameters: Sequence[Tensor], dy: Tensor, dlogabsdet: Tensor
) -> tuple:
    """The same gradient as a graph of its own, for create_graph=True."""
    by_parts = lambda x, own, m: autoregressive_reference(x, m.conditioner, own, m.scale, m.form, m.inverse, linear=_linear)
    y, total = in_turn(x, context, maps, by_parts)
    inputs, needs = (x, context, None, None, *parameters), ctx.needs_input_grad
    if not is_wanted(ctx, slice(-len(parameters), None)):
        needs = *needs[:4], *(False for _ in parameters)
    wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed]
    gradients = iter(pulled_back((y, total), (dy, dlogabsdet), wanted, create_graph=True))
    return tuple(next(gradients) if needed else None for needed in needs)
