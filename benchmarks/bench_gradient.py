"""Gradients through the sequential direction: of the inverse itself, and the training steps that it makes possible."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import flowkernels
from flowkernels.flows import IAF, MAF, Flow
from flowkernels.training.vae import VAE, VAESettings

from .autoregressive_problem import OURS, REFERENCE, Problem, implementation
from .bench_flows import training
from .case import Call, Case, Competitor, Target
from .flow_models import ours
from .peers import build_peer, build_residual, inverse_of, taken_over

DENSE = "dense forward + backward"


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer turns."""
    return [*_inverse(quick, device), *_residual_inverse(quick, device), *_training_steps(quick, device)]


def _inverse(quick: bool, device: torch.device) -> Iterator[Case]:
    """Forward and backward: gradients by the input, every weight and every bias."""
    seconds = 0.3 if quick else 2.0
    problem = Problem(63, (512, 512), 1024, device, check_rows=64)
    yield Case(
        f"gradient of the inverse, {problem.name}",
        [_inverse_of_ours(problem), _dense(problem)],
        3 * problem.macs,
        targets=[Target("share", 0.9, 0.75, DENSE)],
        seconds=seconds,
        device=device,
    )
    problem = Problem(63, (512, 512), 128, device)
    yield Case(
        f"gradient of the inverse, {problem.name}",
        [
            _inverse_of_ours(problem, memory=True),
            _dense(problem),
            _inverse_of_nflows(problem, memory=True),
            *([] if quick else [_inverse_of_ours(problem, reference=True)]),
        ],
        3 * problem.macs,
        targets=[Target("speedup", 100, None, "nflows"), Target("memory share", 1 / 30, None, "nflows")],
        seconds=seconds,
        device=device,
    )


def _residual_inverse(quick: bool, device: torch.device) -> Iterator[Case]:
    """Of nflows' default layer, whose conditioner is a residual network, and of the same layer taken over."""
    problem = Problem(63, (512,), 128, device)
    build = lambda: build_residual(problem.features, 512, 2, 1).to(device)

    def competitor(name: str, make: Callable[[], nn.Module]) -> Competitor:
        def call() -> Call:
            module = make()
            run = lambda module, dtype: _gradients(module.inverse, list(module.parameters()), problem, dtype)
            return Call(partial(run, module, torch.float32), lambda: run(copy.deepcopy(module).double(), torch.float64), grad=True)

        return Competitor(name, call, ours=name == OURS, package=name)

    yield Case(
        f"gradient of the inverse, two residual blocks, D=63, H=512, batch {problem.batch}",
        [competitor(OURS, lambda: taken_over(build())), competitor("nflows", build)],
        targets=[Target("speedup", 100, None, "nflows")],
        seconds=0.3 if quick else 2.0,
        device=device,
    )


def _training_steps(quick: bool, device: torch.device) -> Iterator[Case]:
    """Maximum likelihood: an IAF's goes through the sequential loop and its gradient, a MAF's does not."""
    transforms, batch = (2, 256) if quick else (5, 1024)
    x = torch.randn(batch, 63, generator=torch.Generator().manual_seed(1)).to(device)

    def flow(kind: Callable[..., Flow]) -> Flow:
        torch.manual_seed(0)
        return kind(63, transforms=transforms, hidden_features=(512, 512))

    yield Case(
        f"maximum-likelihood step of IAF({transforms}), D=63, H=512x2, batch {batch:,}",
        [training(OURS, lambda: ours(flow(IAF)), x), replace(training("MAF", lambda: ours(flow(MAF)), x), package=OURS)],
        targets=[Target("share", 2.2, 1.5, "MAF")],
        seconds=0.3 if quick else 3.0,
        device=device,
    )
    images = torch.randint(0, 17, (100, 64), generator=torch.Generator().manual_seed(1)).to(device)
    competitors = [_vae_step(OURS, "iaf", images), _vae_step("diagonal", "diagonal", images)]
    targets = [Target("share", 1.5, 1.25, "diagonal")]
    name = "training step of a VAE with four IAF steps, 64 pixels, 8 latents, H=128x2, batch 100"
    yield Case(name, competitors, targets=targets, seconds=0.3 if quick else 2.0, device=device)


def _vae_step(name: str, posterior: str, x: Tensor) -> Competitor:
    """ELBO, backward and Adam; its noise is fresh each time, so nothing is compared."""

    def build() -> Call:
        torch.manual_seed(0)
        vae = VAE(x.shape[1], 17, VAESettings(posterior=posterior)).to(x.device)
        optimizer = torch.optim.Adam(vae.parameters(), lr=0.0, fused=True)

        def run() -> Tensor:
            reconstruction, kl = vae.elbo(x)
            loss = (kl - reconstruction).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Call(run, grad=True)

    return Competitor(name, build, ours=name == OURS, package=OURS)


def _inverse_of_ours(problem: Problem, *, reference: bool = False, memory: bool = False) -> Competitor:
    """Our layer's, or that of the D-pass loop in plain PyTorch. All rows are compared in float64 where the reference affords it."""

    def build() -> Call:
        layer, name = problem.layer, "reference" if reference else "auto"
        whole = problem.batch <= 128

        every = slice(None)

        def gradient(layer: nn.Module, dtype: torch.dtype, rows: Tensor | slice, name: str) -> tuple[Tensor, ...]:
            with flowkernels.backend(name):
                found = _gradients(layer.inverse, list(layer.parameters()), problem, dtype, rows)
            return found if whole else found[:1]  # a row's gradient is its own, a weight's is everybody's

        rows = every if whole else problem.rows
        exact = lambda: gradient(copy.deepcopy(layer).double(), torch.float64, rows, "reference")
        note = "" if reference else implementation(problem.device)
        run = partial(gradient, layer, torch.float32, every, name)
        return Call(run, exact, None if whole else rows, grad=True, note=note)

    return Competitor(REFERENCE if reference else OURS, build, ours=not reference, package="torch" if reference else OURS, memory=memory)


def _inverse_of_nflows(problem: Problem, *, memory: bool = False) -> Competitor:
    def build() -> Call:
        module = build_peer("nflows", problem.features, problem.hidden_features).to(problem.device)
        run = lambda module, dtype: _gradients(inverse_of("nflows", module), list(module.parameters()), problem, dtype)
        return Call(partial(run, module, torch.float32), lambda: run(copy.deepcopy(module).double(), torch.float64), grad=True)

    return Competitor("nflows", build, package="nflows", memory=memory)


def _dense(problem: Problem) -> Competitor:
    """A dense network of the same sizes, its weights already masked: one pass and its gradient, with no affine map after it."""

    def build() -> Call:
        network = problem.dense().requires_grad_()
        parameters = list(network.parameters())
        cotangent = torch.randn(problem.batch, 2 * problem.features, generator=torch.Generator().manual_seed(2)).to(problem.device)

        def run() -> tuple[Tensor, ...]:
            z = problem.input.detach().requires_grad_()
            return torch.autograd.grad(network(z), [z, *parameters], cotangent)

        return Call(run, grad=True)

    return Competitor(DENSE, build, package="torch")


def _gradients(
    inverse: Callable[[Tensor], tuple[Tensor, Tensor]],
    parameters: Sequence[Tensor],
    problem: Problem,
    dtype: torch.dtype,
    rows: Tensor | slice = slice(None),
) -> tuple[Tensor, ...]:
    """Of fixed cotangents of x and the log-determinant, by z and the parameters."""
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(shape, generator=generator).to(problem.device) for shape in (problem.input.shape, problem.batch)]
    z, *cotangents = (t[rows].to(dtype) for t in (problem.input.detach(), *cotangents))
    z.requires_grad_()
    return torch.autograd.grad(inverse(z), [z, *parameters], cotangents)
