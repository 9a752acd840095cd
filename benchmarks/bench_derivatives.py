"""Derivatives that nobody trains a flow with, but that scores, samplers and diagnostics need: of log p by the data, of the score itself, by
torch.func. All but the first are made by torch's own products on every side."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from flowkernels.flows import MAF

from .autoregressive_problem import OURS
from .case import Call, Case, Competitor
from .peers import build_stack, forward_of

Derivative = Callable[["_Density", Tensor], tuple[Tensor, ...]]


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer turns, and the small flow alone."""
    return list(_cases(quick, 0.3 if quick else 2.0, device))


def _cases(quick: bool, seconds: float, device: torch.device) -> Iterator[Case]:
    sizes = [(5, 6, (50, 50), 512), (1, 63, (512, 512), 128)]
    for transforms, features, hidden, batch in sizes[: 1 if quick else None]:
        x = torch.randn(batch, features, generator=torch.Generator().manual_seed(1)).to(device)
        builders = {OURS: partial(_flow, features, hidden, transforms)}
        builders |= {library: partial(build_stack, library, features, hidden, transforms) for library in ("nflows", "zuko")}
        widths = "x".join(map(str, (hidden[0], len(hidden))))
        for work, derivative in _DERIVATIVES.items():
            competitors = [_competitor(name, build, derivative, x) for name, build in builders.items()]
            name = f"{work}, MAF({transforms}), D={features}, H={widths}, batch {batch:,}"
            yield Case(name, competitors, seconds=seconds, device=device)


def _flow(features: int, hidden: tuple[int, ...], transforms: int) -> nn.Module:
    torch.manual_seed(0)
    return MAF(features, transforms=transforms, hidden_features=hidden)


class _Density(nn.Module):
    """log p of each row under standard normal noise, but for its constant."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, x: Tensor) -> Tensor:
        z, logabsdet = self.module(x) if self.name == OURS else forward_of(self.name, self.module)(x)
        return logabsdet - z.square().sum(-1) / 2


def _score(density: _Density, x: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(density(x).sum(), x)


def _score_matching(density: _Density, x: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(density(x).sum(), x, create_graph=True)
    parameters = [p for p in density.parameters() if p.requires_grad]
    return torch.autograd.grad(score.square().sum(1).mean(), parameters, allow_unused=True, materialize_grads=True)


def _hessian_product(density: _Density, x: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(density(x).sum(), x, create_graph=True)
    return torch.autograd.grad((score * x.detach()).sum(), x)


def _score_of_each(density: _Density, x: Tensor) -> tuple[Tensor, ...]:
    return (vmap(grad(lambda row: density(row[None])[0]))(x),)


def _gradients_of_each(density: _Density, x: Tensor) -> tuple[Tensor, ...]:
    parameters = {name: p.detach() for name, p in density.named_parameters() if p.requires_grad}
    loss = lambda parameters, row: functional_call(density, parameters, (row[None],))[0]
    return tuple(vmap(grad(loss), (None, 0))(parameters, x).values())


def _directional(density: _Density, x: Tensor) -> tuple[Tensor, ...]:
    return jvp(density, (x,), (x,))


_DERIVATIVES: dict[str, Derivative] = {
    "score": _score,
    "gradient of a score matching loss": _score_matching,
    "Hessian-vector product": _hessian_product,
    "scores by vmap of grad": _score_of_each,
    "gradients of each sample": _gradients_of_each,
    "directional derivative by jvp": _directional,
}


def _competitor(name: str, build: Callable[[], nn.Module], derivative: Derivative, x: Tensor) -> Competitor:
    def made() -> Call:
        density = _Density(name, build().to(x.device))
        exact = deepcopy(density).double()
        return Call(partial(derivative, density, x), lambda: derivative(exact, x.double()), grad=True)

    return Competitor(name, made, ours=name == OURS, package="flowkernels" if name == OURS else name)
