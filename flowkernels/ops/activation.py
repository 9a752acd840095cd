"""Elementwise activations of a conditioner: the codes that kernels know, and the mathematics in plain PyTorch.

csrc/cpu/activation.h is the same for the compiled kernels; the integer codes are shared with it by value.
"""

import enum
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DERIVED_FROM_SUM", "Activation", "apply_activation", "parse_activation"]


class Activation(enum.IntEnum):
    """The activations that kernels know, as torch computes them by default: the codes of `Conditioner.activations`."""

    IDENTITY = 0
    RELU = 1
    TANH = 2
    ELU = 3
    GELU = 4
    SILU = 5
    LEAKY_RELU = 6
    SOFTPLUS = 7
    SIGMOID = 8


DERIVED_FROM_SUM = (Activation.GELU, Activation.SILU)  # the others' derivatives can be taken from their values

_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.IDENTITY: lambda x: x,
    Activation.RELU: torch.relu,
    Activation.TANH: torch.tanh,
    Activation.ELU: F.elu,
    Activation.GELU: F.gelu,
    Activation.SILU: F.silu,
    Activation.LEAKY_RELU: F.leaky_relu,
    Activation.SOFTPLUS: F.softplus,
    Activation.SIGMOID: torch.sigmoid,
}

_FOREIGN_FUNCTIONS: dict[Callable, Activation] = {
    F.relu: Activation.RELU,
    torch.relu: Activation.RELU,
    F.tanh: Activation.TANH,
    torch.tanh: Activation.TANH,
    F.elu: Activation.ELU,
    F.gelu: Activation.GELU,
    F.silu: Activation.SILU,
    F.leaky_relu: Activation.LEAKY_RELU,
    F.softplus: Activation.SOFTPLUS,
    F.sigmoid: Activation.SIGMOID,
    torch.sigmoid: Activation.SIGMOID,
    Tensor.relu: Activation.RELU,
    Tensor.tanh: Activation.TANH,
    Tensor.sigmoid: Activation.SIGMOID,
}

# the module's class, and the settings it must have: kernels know one of each
_MODULES: dict[type[nn.Module], tuple[Activation, dict[str, object]]] = {
    nn.Identity: (Activation.IDENTITY, {}),
    nn.ReLU: (Activation.RELU, {}),
    nn.Tanh: (Activation.TANH, {}),
    nn.ELU: (Activation.ELU, {"alpha": 1.0}),
    nn.GELU: (Activation.GELU, {"approximate": "none"}),
    nn.SiLU: (Activation.SILU, {}),
    nn.LeakyReLU: (Activation.LEAKY_RELU, {"negative_slope": 0.01}),
    nn.Softplus: (Activation.SOFTPLUS, {"beta": 1.0, "threshold": 20.0}),
    nn.Sigmoid: (Activation.SIGMOID, {}),
}


def parse_activation(activation: "str | Activation | Callable | nn.Module | type[nn.Module]") -> Activation:
    """The code of an activation given by name, as torch's function, or as torch's module (or its class) with its default settings.

    Raises:
        ValueError: it is none that the kernels know.
    """
    if isinstance(activation, Activation):
        return activation
    names = [code.name.lower() for code in Activation]
    if isinstance(activation, str) and activation in names:
        return Activation(names.index(activation))
    # exact classes only: a subclass may compute something else
    module_type = activation if isinstance(activation, type) else type(activation)
    if module_type in _MODULES:
        code, settings = _MODULES[module_type]
        for name, wanted in settings.items():
            got = getattr(activation, name, wanted)
            if got != wanted:
                raise ValueError(f"activation {module_type.__name__} must have {name}={wanted!r}; got {name}={got!r}")
        return code
    if callable(activation) and activation in _FOREIGN_FUNCTIONS:
        return _FOREIGN_FUNCTIONS[activation]
    raise ValueError(f"activation must be one of {', '.join(map(repr, names))}, or torch's function or module for one; got {activation!r}")


def apply_activation(code: Activation, x: Tensor) -> Tensor:
    """Apply the activation of that code, elementwise."""
    return _FUNCTIONS[code](x)
