"""Training steps of masked autoregressive flows: forward, loss, backward and Adam; and the memory that they take."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from flowkernels.flows import MAF

from .autoregressive_problem import DENSE as DENSE_FORWARD
from .autoregressive_problem import OURS, Problem
from .case import Call, Case, Competitor, Target, compiled
from .peers import build_peer, build_residual, build_stack, forward_of, taken_over

DENSE = DENSE_FORWARD.replace("forward", "network")
Loss = Callable[[nn.Module, Tensor], Tensor]


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer turns, and compiles nothing."""
    seconds = 0.5 if quick else 4.0
    return [*_layer(quick, seconds, device), *_flow(quick, seconds, device), *_residual(seconds, device), *_memory(device)]


def _layer(quick: bool, seconds: float, device: torch.device) -> Iterator[Case]:
    problem = Problem(63, (512, 512), 1024, device)
    competitors = [_ours(problem), _dense(problem), *(_peer(library, problem) for library in ("nflows", "zuko", "pyro"))]
    competitors += [] if quick else [_peer("nflows", problem, compile=True)]
    targets = [Target("share", 0.75, 0.65, DENSE), Target("share", 0.7, 0.6, "nflows")]
    yield Case(f"training step, {problem.name}", competitors, _macs(problem), targets=targets, seconds=seconds, device=device)


def _flow(quick: bool, seconds: float, device: torch.device) -> Iterator[Case]:
    """MAF(5) at the sizes of its paper."""
    features, hidden, batch, transforms = 63, (100, 100), 100, 5
    problem = Problem(features, hidden, batch, device)

    def flow() -> nn.Module:
        torch.manual_seed(0)
        return MAF(features, transforms=transforms, hidden_features=hidden).to(device)

    competitors = [_competitor(OURS, flow, _nll, problem.input, package="flowkernels")]
    for library in ("nflows", "zuko", "pyro"):
        build = partial(build_stack, library, features, hidden, transforms)
        for compile in (False, True) if library == "nflows" and not quick else (False,):
            competitors.append(_competitor(library, build, partial(_nll_of, library), problem.input, package=library, compile=compile))
    targets = [Target("share", 0.5, 0.35, "nflows"), Target("share", 0.4, 0.3, "zuko")]
    name = f"training step, MAF({transforms}), {problem.name}"
    yield Case(name, competitors, transforms * _macs(problem), targets=targets, seconds=seconds, device=device)


def _residual(seconds: float, device: torch.device) -> Iterator[Case]:
    """nflows' default conditioners, which are residual networks: its own step, and that of the same layers taken over."""
    transforms = 5
    problem = Problem(63, (100, 100, 100, 100, 100), 100, device)  # a first layer, and two in each block
    build = lambda: build_residual(problem.features, 100, 2, transforms)
    competitors = [
        _competitor(OURS, lambda: taken_over(build()).to(device), _nll, problem.input, package="flowkernels"),
        _competitor("nflows", build, partial(_nll_of, "nflows"), problem.input, package="nflows"),
    ]
    name = f"training step, {transforms} layers with two residual blocks, D=63, H=100, batch {problem.batch:,}"
    yield Case(name, competitors, targets=[Target("share", 0.5, 0.4, "nflows")], seconds=seconds, device=device)


def _memory(device: torch.device) -> Iterator[Case]:
    for batch in (1024, 8192):
        problem = Problem(63, (512, 512), batch, device)
        competitors = [_ours(problem, memory=True), _dense(problem, memory=True), _peer("nflows", problem, memory=True)]
        targets = [Target("memory share", 0.6, 0.5, "nflows")]
        yield Case(f"memory of a training step, {problem.name}", competitors, targets=targets, timed=False, device=device)


def _macs(problem: Problem) -> float:
    """Forward, dx and dweight; nobody asks for the gradient of the data."""
    return 3 * problem.macs - float(problem.batch * int(problem.layer.layers[0].visible.sum()))


def _ours(problem: Problem, **options) -> Competitor:
    return _competitor(OURS, lambda: deepcopy(problem.layer), _nll, problem.input, package="flowkernels", **options)


def _dense(problem: Problem, **options) -> Competitor:
    """A plain network of the same sizes and the cheapest of losses. Its gradients are not masked: a floor rather than a MADE."""
    network = lambda: problem.dense().requires_grad_()
    return _competitor(DENSE, network, lambda module, x: module(x).square().mean(), problem.input, package="torch", **options)


def _peer(library: str, problem: Problem, **options) -> Competitor:
    build = partial(build_peer, library, problem.features, problem.hidden_features)
    return _competitor(library, build, partial(_nll_of, library), problem.input, package=library, **options)


def _nll(module: nn.Module, x: Tensor) -> Tensor:
    z, logabsdet = module(x)
    return (z.square().sum(1) / 2 - logabsdet).mean()


def _nll_of(library: str, module: nn.Module, x: Tensor) -> Tensor:
    z, logabsdet = forward_of(library, module)(x)
    return (z.square().sum(1) / 2 - logabsdet).mean()


def _competitor(
    name: str, build: Callable[[], nn.Module], loss: Loss, x: Tensor, *, package: str, memory: bool = False, compile: bool = False
) -> Competitor:
    """A training step; the first one's loss and gradients are compared with float64. compile: forward and loss by torch.compile."""

    def make() -> Call:
        module = build().to(x.device)
        exact_module = deepcopy(module).double()
        parameters = list(module.parameters())
        adam = torch.optim.Adam(parameters, lr=0.0, fused=True)
        forward = compiled(partial(loss, module)) if compile else partial(loss, module)

        def step() -> tuple[Tensor, ...]:
            adam.zero_grad()
            value = forward(x)
            value.backward()
            adam.step()
            # a case of memory asks for the loss alone: what is returned is not counted
            return (value.detach(),) if memory else (value.detach(), *(p.grad for p in parameters))

        def exact() -> tuple[Tensor, ...]:
            value = loss(exact_module, x.double())
            gradients = () if memory else torch.autograd.grad(value, list(exact_module.parameters()))
            return (value.detach(), *gradients)

        return Call(step, exact, grad=True)

    label = f"{name}, compiled" if compile else name
    return Competitor(label, make, ours=name == OURS, package=package, memory=memory)
