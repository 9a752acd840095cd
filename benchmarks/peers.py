"""One masked affine autoregressive layer with ReLU as other libraries build it, at the same depth and width, in evaluation mode.

Each function returns the module; `forward_of` and `inverse_of` call it in its library's way. Their masks follow their own rules.
"""

import copy
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.integrations import from_nflows
from flowkernels.layers import Chain

from .case import Unavailable

LIBRARIES = ("nflows", "zuko", "normflows", "pyro")


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
    """So many of nflows', zuko's or Pyro's layers as one transform; orders alternate, Pyro draws them."""
    torch.manual_seed(0)
    if library == "pyro":
        return PyroTransforms([_pyro_layer(features, hidden_features) for _ in range(transforms)])
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


class PyroTransforms(nn.Module):
    """Pyro's transforms from data to noise, without what they remember of the last call: a call with the same x would find it made."""

    def __init__(self, transforms: Sequence[Any]) -> None:
        super().__init__()
        self.transforms = transforms
        self.owners = [part if isinstance(part, nn.Module) else part.inv for part in transforms]  # of parameters and memories
        self.parts = nn.ModuleList(part for part in self.owners if isinstance(part, nn.Module))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._through(x, self.transforms)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(z.dtype)  # with zeros of which Pyro's inverse begins
        try:
            return self._through(z, [part.inv for part in reversed(self.transforms)])
        finally:
            torch.set_default_dtype(before)

    def _through(self, x: Tensor, transforms: Sequence[Any]) -> tuple[Tensor, Tensor]:
        self._forget()
        total = x.new_zeros(len(x))
        for transform in transforms:
            z = transform(x)
            x, total = z, total + transform.log_abs_det_jacobian(x, z)
        self._forget()
        return x, total

    def _forget(self) -> None:
        for part in self.owners:
            part._cached_x_y, part._cached_log_scale = (None, None), None


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


def _pyro(features: int, hidden_features: tuple[int, ...]) -> nn.Module:
    return PyroTransforms([_pyro_layer(features, hidden_features)])


def _pyro_layer(features: int, hidden_features: tuple[int, ...]) -> nn.Module:
    if min(hidden_features) < features:
        raise Unavailable("its hidden layers are at least as wide as the features are many")
    return _import("pyro.distributions.transforms").affine_autoregressive(features, list(hidden_features))


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


_BUILDERS = {"nflows": _nflows, "zuko": _zuko, "normflows": _normflows, "pyro": _pyro}
