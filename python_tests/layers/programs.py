"""Flows and layers whose calls are kept, and what one does with them: for the tests of their programs."""

import copy

import torch
from torch import nn

from flowkernels.flows import IAF, MAF, NICE, Flow, RealNVP
from flowkernels.layers import AffineCoupling, DiagonalScale, MaskedAutoregressive

MAKE = {
    "layer": lambda: MaskedAutoregressive(4, (9, 7)),
    "MAF": lambda: MAF(4, transforms=3, hidden_features=(9, 7)),
    "IAF": lambda: IAF(4, transforms=2, hidden_features=(9, 7), gate=True),
    "conditional": lambda: MAF(4, context_features=3, transforms=2, hidden_features=(9,), residual=True),
    "NICE": lambda: NICE(4, hidden_features=(8,)),
    "RealNVP": lambda: RealNVP(4, hidden_features=(8,), transforms=3, batch_norm=False),
    "MAF with batch norm": lambda: MAF(4, transforms=3, hidden_features=(9, 7), batch_norm=True).eval(),
    "RealNVP with batch norm": lambda: RealNVP(4, hidden_features=(8,), transforms=3).eval(),
    "parts": lambda: Flow([DiagonalScale(4), *MAF(4, transforms=2, hidden_features=(9,)).layers, nn_coupling()], 4),
}


def nn_coupling() -> AffineCoupling:
    return AffineCoupling(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4)))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = MAKE[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def arguments(name: str, rows: int = 5) -> tuple[torch.Tensor, ...]:
    return (torch.randn(rows, 4), torch.randn(rows, 3)) if name == "conditional" else (torch.randn(rows, 4),)


def both(module: nn.Module, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return *module(*args), *module.inverse(*args)


def programs(module: nn.Module) -> dict:
    return {} if module._programs is None else module._programs._of


def learn(module: nn.Module, *args: torch.Tensor) -> None:
    for _ in range(4):
        both(module, *args)
    assert set(programs(module)) == {False, True}


def fresh(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    assert not programs(copied)
    return copied


def equal(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def first(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    return next(m for m in module.modules() if isinstance(m, kind))


def owner_of_a_weight(module: nn.Module) -> nn.Module:
    return next(m for m in module.modules() if isinstance(m._parameters.get("weight"), nn.Parameter))


def replace_parameter(module):
    owner = owner_of_a_weight(module)
    owner.weight = nn.Parameter(owner.weight.detach() + 0.5)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrize(module):
    nn.utils.parametrize.register_parametrization(owner_of_a_weight(module), "weight", Doubled())
