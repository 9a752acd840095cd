"""Couplings of vectors as maps of `ops.autoregressive_stack`, which runs their network and their map in one kernel."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from .. import _extension
from .._backend import prefers_compiled
from .._dtypes import HALF
from .._torch import any_autocast, has_global_hooks, has_half_products, kept
from ..ops import Activation, Conditioner, Form, Map, Part, ScaleMap
from ..ops._differentiation import transformed
from ..ops.scale_map import PoweredMap
from ._plain import is_plain
from .mlp import MLP, Dense

UNIT = ScaleMap.unit()  # an additive coupling's
# Weights beyond a second-level cache are read again for each tile of rows, where BLAS blocks them. Measured with AVX-512 on two cores: one
# kernel takes 0.6 to 0.95 of the parts' time up to H=512x2, 1.0 to 1.9 from H=1024x2 on; with few rows 0.65 to 0.9 everywhere.
_LARGE, _FEW_ROWS = 1 << 19, 8
_COMPILED = _extension.has_kernel("autoregressive_training", "CPU")


def coupling_map(
    x: Tensor, part: Part, conditioner: nn.Module, scale: ScaleMap, scale_parameter: Tensor | None, form: Form, inverse: bool
) -> Map | None:
    """The coupling of x as a map, or None where it has to be made of its parts.

    It is a map for vectors on a CPU that has the kernels, with an `MLP` whose outputs are interleaved; those of half precision, which
    kernels compute in float32, where torch has no quick products of such. What a hook, a subclass, a parametrization, torch.func, a
    compiler or autocast has to see is made of parts, and so are an inverse with a gradient that is no other form's forward map, and a
    network that BLAS runs faster.
    """
    if not (
        is_plain(conditioner, MLP)
        and _COMPILED
        and type(x) in (Tensor, nn.Parameter)  # a fake one's shapes must not stay in the caches below
        and not has_global_hooks()
        and x.dim() == 2
        and x.is_cpu
        and (x.dtype in (torch.float32, torch.float64) or (x.dtype in HALF and not has_half_products(x.dtype)))
        and not torch.compiler.is_compiling()
        and prefers_compiled()
        and not transformed()
        and not any_autocast()
    ):
        return None
    weights, biases, context_weights = [], [], []
    for layer in conditioner.layers._modules.values():
        parameters = layer._parameters
        if not is_plain(layer, Dense) or len(parameters) < 3:  # a parametrization computes what is not there
            return None
        weights.append(parameters["weight"])
        biases.append(parameters["bias"])
        if parameters["context_weight"] is not None:
            context_weights.append(parameters["context_weight"])
    features = x.shape[1]
    count = part.count(features)
    if weights[0].shape[0] != features - count or weights[-1].shape[1] != count * (1 if scale is UNIT else 2) or not 0 < count < features:
        return None
    learned = [] if scale_parameter is None else [scale_parameter]
    tensors = (*weights, *biases, *context_weights, *learned)
    for t in tensors:
        if t.dtype != x.dtype or t.device != x.device:
            return None
    if learned and scale_parameter.numel() != 1:
        return None
    gradient = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))
    most = None if x.dtype in HALF else most_rows(weights)
    by_parts = most is not None or (inverse and form.undone_by is None)
    if (gradient and by_parts) or (most is not None and len(x) > most):
        return None
    visible = [_whole(*w.shape) for w in weights]
    network = Conditioner(weights, biases, visible, _activations(len(weights)), context_weights, _order(part, features))
    return Map(network, PoweredMap(scale, scale_parameter) if learned else scale, form, inverse)


def most_rows(weights: Sequence[Tensor]) -> int | None:
    """The batch up to which a network of these weights runs inside the kernel; None for any."""
    return _FEW_ROWS if sum([w.numel() for w in weights]) > _LARGE else None


@kept
def _whole(inputs: int, outputs: int) -> Tensor:
    """The staircase of a layer without a mask."""
    with torch.inference_mode(False):
        return torch.full((outputs,), inputs, dtype=torch.int32, device="cpu")


@kept
def _order(part: Part, features: int) -> Tensor:
    """The features that pass, then those that are transformed."""
    with torch.inference_mode(False):
        index = torch.arange(features, device="cpu")[None]
        return torch.cat([part.untouched(index), part.transformed(index)], 1)[0]


@lru_cache
def _activations(layers: int) -> list[int]:
    return [int(Activation.RELU)] * (layers - 1) + [int(Activation.IDENTITY)]
