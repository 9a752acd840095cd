"""Activations: names, torch's own functions and modules, and the compiled ones against torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flowkernels.ops.activation import Activation, apply_activation, parse_activation
from python_tests.battery import TESTS_LIBRARY, WITHOUT_TESTS_LIBRARY

NAMED = [
    ("identity", nn.Identity(), None),
    ("relu", nn.ReLU(), F.relu),
    ("tanh", nn.Tanh(), torch.tanh),
    ("elu", nn.ELU(), F.elu),
    ("gelu", nn.GELU(), F.gelu),
    ("silu", nn.SiLU(), F.silu),
    ("leaky_relu", nn.LeakyReLU(), F.leaky_relu),
    ("softplus", nn.Softplus(), F.softplus),
    ("sigmoid", nn.Sigmoid(), torch.sigmoid),
]


@pytest.mark.parametrize(("name", "module", "function"), NAMED)
def test_parse_and_apply(name: str, module: nn.Module, function) -> None:
    code = Activation[name.upper()]
    assert parse_activation(name) is code
    assert parse_activation(code) is code
    assert parse_activation(module) is code
    assert parse_activation(type(module)) is code
    if function is not None:
        assert parse_activation(function) is code
    x = torch.linspace(-30.0, 30.0, 601)
    assert torch.equal(apply_activation(code, x), module(x))
    assert torch.equal(apply_activation(int(code), x), module(x))


def test_every_code_is_named() -> None:
    assert [code.name.lower() for code in Activation] == [name for name, _, _ in NAMED]
    assert [int(code) for code in Activation] == list(range(len(NAMED)))  # csrc/cpu/activation.h counts on it


@pytest.mark.parametrize("function", [torch.relu, F.relu, torch.tanh, F.tanh, torch.sigmoid, F.sigmoid])
def test_torch_has_two_names_for_some(function) -> None:
    assert parse_activation(function).name.lower() == function.__name__


class ShiftedReLU(nn.ReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - 1.0)


@pytest.mark.parametrize("unknown", ["swish", "ReLU", nn.PReLU(), torch.cos, ShiftedReLU(), 3, None, [], lambda x: x])
def test_unknown_ones_are_refused(unknown) -> None:
    with pytest.raises(ValueError, match=r"activation must be one of 'identity', 'relu', .*got"):
        parse_activation(unknown)


@pytest.mark.parametrize("module", [nn.ELU(0.5), nn.GELU(approximate="tanh"), nn.LeakyReLU(0.2), nn.Softplus(beta=2.0)])
def test_other_settings_are_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"activation {type(module).__name__} must have .*; got"):
        parse_activation(module)


TARGETS = torch.ops.flowkernels._math_targets().split() if TESTS_LIBRARY else []
compiled = pytest.mark.skipif(not TARGETS, reason=f"{WITHOUT_TESTS_LIBRARY}; or this CPU has no instruction set of ours")


@compiled
@pytest.mark.parametrize("target", TARGETS or [None])
@pytest.mark.parametrize("code", list(Activation))
def test_compiled_values_and_derivatives(code: Activation, target: str) -> None:
    x = torch.cat([torch.linspace(-30.0, 30.0, 6001), torch.tensor([0.0, -0.0, 1e-40, 1e-20, -1e-20])]).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    exact = F.softplus(x64, threshold=100.0) if code == Activation.SOFTPLUS else apply_activation(code, x64)
    (slope,) = torch.autograd.grad(exact.sum(), x64)
    for dtype, tolerance in ((torch.float32, 6e-7), (torch.float64, 1e-15)):
        inputs = x.detach().to(dtype)
        y = torch.ops.flowkernels._elementwise(inputs, "activation", target, [float(code)])
        # GELU subtracts nearly equal numbers far below zero, in torch too
        small = 2e-7 * (tolerance / 6e-7) * x64.abs() if code == Activation.GELU else 0.0
        assert ((y.double() - exact).abs() <= tolerance * exact.abs() + small + 1e-44).all()
        dy = torch.ops.flowkernels._elementwise(inputs, "activation_derivative", target, [float(code)])
        torch_own = 2e-16 * x64.abs()  # torch's derivative of SiLU takes 1 - sigmoid
        assert ((dy.double() - slope).abs() <= tolerance * (1.0 + slope.abs()) + torch_own).all()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", TARGETS or [None])
@pytest.mark.parametrize("code", list(Activation))
def test_compiled_infinities_and_nan(code: Activation, target: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)
    y = torch.ops.flowkernels._elementwise(x, "activation", target, [float(code)])
    exact = apply_activation(code, x.double())  # torch's SiLU in float32 has been seen to give NaN for infinity, with AVX-512
    torch.testing.assert_close(y, exact.to(dtype), equal_nan=True)
