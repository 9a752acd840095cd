"""NICE and RealNVP: a training step (forward, loss, backward, Adam), one through samples, and sampling, with the same conditioners in every
library.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .case import Call, Case, Competitor, Target
from .flow_models import COMPILED, EAGER, OURS, CompiledModel, Model, channel_couplings, image_realnvp, nice, realnvp

Models = dict[str, Callable[[], Model]]


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer, and fewer turns."""
    return list(_cases(0.2 if quick else 1.0, quick, device))


def _cases(seconds: float, quick: bool, device: torch.device) -> Iterator[Case]:
    def both(name: str, models: Models, shape: tuple[int, ...], *targets: Target) -> Iterator[Case]:
        if len(shape) == 2 and not quick:  # of vectors; an image model takes minutes to compile
            models = models | {COMPILED: lambda plain=models[EAGER]: CompiledModel(plain())}
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        yield Case(
            f"training step, {name}", [training(n, m, x) for n, m in models.items()], targets=targets, seconds=seconds, device=device
        )
        z = x.flatten(1) if "levels" in name else x
        yield Case(f"sampling, {name}", [sampling(n, m, z) for n, m in models.items()], seconds=seconds, device=device)
        if len(shape) == 2:
            through = [training(n, m, x, through_samples=True) for n, m in models.items()]
            yield Case(f"training step through samples, {name}", through, seconds=seconds, device=device)

    not_slower = Target("speedup", 1.0, 1.2, EAGER)
    digits = {"levels": 2, "blocks": 1, "hidden_channels": 16}
    yield from both("RealNVP on digits, 2 levels, ResNet 16x1, batch 100", image_realnvp((1, 8, 8), **digits), (100, 1, 8, 8), not_slower)
    yield from both("RealNVP, D=8, H=64x2, 8 couplings, batch 1,000", realnvp(8, 8, (64, 64)), (1000, 8), not_slower)
    yield from both("NICE, D=64, H=256x1, 4 couplings, batch 100", nice(64, 4, (256,)), (100, 64), not_slower)
    if quick:
        return
    yield from both("RealNVP, D=64, H=256x2, 6 couplings, batch 1,000", realnvp(64, 6, (256, 256)), (1000, 64), not_slower)
    images = channel_couplings(12, 4, 16, 1)
    yield from both("4 channel couplings, ResNet 16x1, [32, 12, 16, 16]", images, (32, 12, 16, 16), Target("speedup", 1.0, 1.2, "nflows"))
    yield from both("NICE, D=784, H=1000x5, 4 couplings, batch 200", nice(784, 4, (1000,) * 5), (200, 784), not_slower)


def training(name: str, build: Callable[[], Model], x: Tensor, *, through_samples: bool = False) -> Competitor:
    """One step; the learning rate is 0, so that every step has the same loss, which is checked.

    through_samples: x is noise, and the loss the energy of a normal density at what the flow makes of it.
    """

    def made() -> Call:
        model = build()
        model.module.train().to(x.device)
        exact = model.double()
        optimizer = torch.optim.Adam(model.module.parameters(), lr=0.0, fused=True)

        def loss_of(model: Model, x: Tensor) -> Tensor:
            return model.to_data(model.module, x).square().sum(1).mean() / 2 if through_samples else model.loss(x)

        def run() -> Tensor:
            loss = loss_of(model, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Call(run, lambda: loss_of(exact, x.double()).detach(), grad=True)

    return Competitor(name, made, ours=name == OURS, package=_package(name))


def sampling(name: str, build: Callable[[], Model], z: Tensor) -> Competitor:
    """Noise to data, in evaluation mode."""

    def made() -> Call:
        model = build()
        model.module.eval().to(z.device)
        exact = model.double()
        return Call(lambda: model.to_data(model.module, z), lambda: exact.to_data(exact.module, z.double()))

    return Competitor(name, made, ours=name == OURS, package=_package(name))


def _package(name: str) -> str:
    return "torch" if name in (EAGER, COMPILED) else name
