"""One masked affine autoregressive layer with ReLU as other libraries build it, at the same depth and width, in evaluation mode.

Each function returns the module; `forward_of` and `inverse_of` call it in its library's way. Their masks follow their own rules.
"""

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.integrations import from_nflows
from flowkernels.layers import Chain

from .case import Unavailable

LIBRARIES = ("nflows", "zuko", "normflows")


def build_peer(library: str, features: int, hidden_features: tuple[int, ...]) -> nn.Module:
    """The library's layer, seeded.

    Raises:
        Unavailable: the library is not installed.
    """
    torch.manual_seed(0)
    module = _BUILDERS[library](features, hidden_features).eval()
    depth = sum(isinstance(part, nn.Linear) for part in module.modules())
    if depth != len(hidden_features) + 1:
        raise AssertionError(f"{library} built {depth} linear layers where {len(hidden_features) + 1} were asked for")
    return module


def build_stack(library: str, features: int, hidden_features: tuple[int, ...], transforms: int) -> nn.Module:
    """So many of nflows' or zuko's layers, whose orders alternate, as one transform."""
    torch.manual_seed(0)
    if library == "zuko":
        return _import("zuko.flows").MAF(features, transforms=transforms, hidden_features=hidden_features).transform
    nflows = _import("nflows.transforms")
    layers = [part for _ in range(transforms) for part in (_nflows(features, hidden_features), nflows.ReversePermutation(features))]
    return nflows.CompositeTransform(layers[:-1]).eval()


def build_residual(features: int, width: int, blocks: int, transforms: int) -> nn.Module:
    """So many of nflows' layers as it makes them by default, their conditioners residual networks, as one transform."""
    torch.manual_seed(0)
    nflows = _import("nflows.transforms")
    layers = (nflows.MaskedAffineAutoregressiveTransform(features, width, num_blocks=blocks, random_mask=False) for _ in range(transforms))
    return nflows.CompositeTransform(list(layers)).eval()


def taken_over(transform: nn.Module) -> Chain:
    """The same transforms as our layers."""
    return Chain(map(from_nflows, transform._transforms))


def inverse_of(library: str, module: nn.Module) -> Callable[[Tensor], Any]:
    """Noise to data. zuko's does not return a log-determinant."""
    return (lambda z: module().inv(z)) if library == "zuko" else module.inverse


def forward_of(library: str, module: nn.Module) -> Callable[[Tensor], Any]:
    """Data to noise and its log-determinant."""
    return (lambda x: module().call_and_ladj(x)) if library == "zuko" else module.forward


def exact_copy(module: nn.Module) -> nn.Module:
    """The same function in float64; masks are multiplied into the weights once, so that D passes take bearable time."""
    module = copy.deepcopy(module).double()
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Linear) and hasattr(part, "mask"):
                setattr(parent, name, masked_into_dense(part.weight.detach() * part.mask, part.bias.detach()))
    return module


def masked_into_dense(weight: Tensor, bias: Tensor) -> nn.Linear:
    """nn.Linear with these values; weight is [outputs, inputs]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(t.contiguous(), requires_grad=False) for t in (weight, bias))
    return linear


def _nflows(features: int, hidden_features: tuple[int, ...]) -> nn.Module:
    layer = _import("nflows.transforms").MaskedAffineAutoregressiveTransform
    return _made(layer, features, hidden_features)


def _normflows(features: int, hidden_features: tuple[int, ...]) -> nn.Module:
    return _made(_import("normflows.flows").MaskedAffineAutoregressive, features, hidden_features)


def _made(layer: type[nn.Module], features: int, hidden_features: tuple[int, ...]) -> nn.Module:
    # a first hidden layer, and then one in each block
    if len(set(hidden_features)) != 1:
        raise Unavailable("its hidden layers are all of one width")
    return layer(features, hidden_features[0], num_blocks=len(hidden_features) - 1, use_residual_blocks=False, random_mask=False)


def _zuko(features: int, hidden_features: tuple[int, ...]) -> nn.Module:
    return _import("zuko.flows.autoregressive").MaskedAutoregressiveTransform(features, hidden_features=hidden_features)


def _import(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.split('.')[0]} cannot be imported ({error})") from error


_BUILDERS = {"nflows": _nflows, "zuko": _zuko, "normflows": _normflows}
