"""Sampling as a user asks for it: a million samples of a MAF(5), of one density or of a hundred posteriors, one posterior, and small
batches; and what it gains to send each tile of rows through all five layers in one call.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch

from flowkernels.flows import MAF

from .autoregressive_problem import OURS
from .case import Call, Case, Competitor, Target, Unavailable
from .timing import waiter

FEATURES, HIDDEN, TRANSFORMS, CONTEXT_FEATURES = 6, (50, 50), 5, 8
LAYERS = "layer by layer"
Sampler = Callable[[int, torch.Tensor | None], object]  # samples a context, contexts


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer samples and turns."""
    return list(_cases(quick, device))


def _cases(quick: bool, device: torch.device) -> Iterator[Case]:
    what = f"MAF({TRANSFORMS}), D={FEATURES}, H={HIDDEN[0]}x{len(HIDDEN)}"
    targets = (Target("speedup", 20, 40, "zuko"), Target("speedup", 25, 40, "nflows"))
    million, scaled = (10_000, 10) if quick else (1_000_000, 20)
    for n, contexts, divisor in ((1, 0, 1), (10_000, 0, 1), (10_000, 1, 1), (million, 0, scaled), (million // 100, 100, scaled)):
        each = f"{n:,} sample{'s' * (n > 1)}"
        if contexts:
            each = f"{contexts} context{'s' * (contexts > 1)} of {CONTEXT_FEATURES} x {each}"
        builders = {OURS: _ours, "zuko": _zuko, "nflows": _nflows, "pyro": _pyro}
        competitors = [_competitor(name, make, n, contexts, 1 if name == OURS else divisor, device) for name, make in builders.items()]
        held_to = targets if n in (1, 10_000) and not contexts else ()
        yield Case(f"{each}, {what}", competitors, targets=held_to, seconds=0.2 if quick else 1.5, most_rounds=25, device=device)

    for features, hidden, batch in ((FEATURES, HIDDEN, 100), (63, (512, 512), 1024)):
        competitors = [_stack(features, hidden, batch, device, whole) for whole in (True, False)]
        name = f"one call for the stack, MAF({TRANSFORMS}), D={features}, H={hidden[0]}x{len(hidden)}, batch {batch:,}"
        held_to = (Target("speedup", 1.0, 1.15, LAYERS),) if features == 63 else ()
        yield Case(name, competitors, targets=held_to, seconds=0.3 if quick else 4.0, most_rounds=200, device=device)


def _stack(features: int, hidden: tuple[int, ...], batch: int, device: torch.device, whole: bool) -> Competitor:
    def build() -> Call:
        torch.manual_seed(0)
        flow = MAF(features, transforms=TRANSFORMS, hidden_features=hidden).eval().to(device)
        z = torch.randn(batch, features).to(device)

        def layer_by_layer() -> tuple[torch.Tensor, torch.Tensor]:
            x, total = z, 0
            for layer in reversed(flow.layers):
                x, logabsdet = layer.inverse(x)
                total = total + logabsdet
            return x, total

        return Call((lambda: flow.inverse(z)) if whole else layer_by_layer)

    return Competitor(OURS if whole else LAYERS, build, ours=whole)


def _competitor(name: str, make: Callable[[int], tuple], n: int, contexts: int, divisor: int, device: torch.device) -> Competitor:
    """divisor: it draws so many times fewer samples, and its time is multiplied by as much."""

    def build() -> Call:
        torch.manual_seed(0)
        module, sample = make(CONTEXT_FEATURES if contexts else 0)
        module.eval().to(device)
        context = torch.randn(contexts, CONTEXT_FEATURES).to(device) if contexts else None
        if divisor == 1:
            return Call(lambda: sample(n, context))

        wait = waiter(device)

        def run() -> float:
            wait()
            started = time.perf_counter()
            sample(n // divisor, context)
            wait()
            return divisor * (time.perf_counter() - started)

        return Call(run, self_timed=True, note=f"timed on a {divisor}th of the samples, and scaled")

    return Competitor(name, build, ours=name == OURS, package=name)


def _ours(context_features: int) -> tuple[torch.nn.Module, Sampler]:
    flow = MAF(FEATURES, context_features=context_features, transforms=TRANSFORMS, hidden_features=HIDDEN)
    return flow, lambda n, context: flow.sample(n, context)


def _zuko(context_features: int) -> tuple[torch.nn.Module, Sampler]:
    flow = _import("zuko.flows").MAF(FEATURES, context_features, transforms=TRANSFORMS, hidden_features=HIDDEN)
    return flow, lambda n, context: flow(context).sample((n,))


def _nflows(context_features: int) -> tuple[torch.nn.Module, Sampler]:
    transforms = _import("nflows.transforms")
    layers = []
    for _ in range(TRANSFORMS):
        layers += [
            transforms.MaskedAffineAutoregressiveTransform(
                FEATURES,
                HIDDEN[0],
                context_features=context_features or None,
                num_blocks=len(HIDDEN) - 1,
                use_residual_blocks=False,
            ),
            transforms.ReversePermutation(FEATURES),
        ]
    flow = _import("nflows.flows").Flow(transforms.CompositeTransform(layers), _import("nflows.distributions").StandardNormal([FEATURES]))
    return flow, lambda n, context: flow.sample(n, context=context)


def _pyro(context_features: int) -> tuple[torch.nn.Module, Sampler]:
    dist, transforms = _import("pyro.distributions"), _import("pyro.distributions.transforms")
    if context_features:
        make = lambda: transforms.conditional_affine_autoregressive(FEATURES, context_features, list(HIDDEN))
    else:
        make = lambda: transforms.affine_autoregressive(FEATURES, list(HIDDEN))
    layers = torch.nn.ModuleList(make() for _ in range(TRANSFORMS))

    @cache
    def flow() -> Any:  # made when the layers are on their device
        like = next(layers.parameters())
        base = torch.distributions.Normal(like.new_zeros(FEATURES), like.new_ones(FEATURES))
        kind = dist.ConditionalTransformedDistribution if context_features else dist.TransformedDistribution
        return kind(base, [layer.inv for layer in layers])

    def sample(n: int, context: torch.Tensor | None) -> torch.Tensor:
        return flow().sample((n,)) if context is None else flow().condition(context).sample((n, len(context)))

    return layers, sample


def _import(module: str):
    try:
        return import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.split('.')[0]} cannot be imported ({error})") from error
