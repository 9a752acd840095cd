"""Glow on 32 x 32 colour images: density, sampling and a training step, against normflows' GlowBlocks with the same conditioners, run by
torch's convolutions; and steps whose conditioners cost nothing.

normflows' model has no learned priors; ours has, and they are in our times.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor, nn

from flowkernels import backend
from flowkernels.flows import Glow
from flowkernels.flows.glow_steps import GlowSteps
from flowkernels.flows.networks import ConvNet

from .bench_flows import sampling, training
from .case import Call, Case, Competitor, Target, compiled
from .flow_models import OURS, Model, _import, ours

NORMFLOWS, REFERENCE, COMPILED, CONDITIONERS = "normflows", "reference", "torch.compile", "torch's conditioners alone"
IMAGE, LEVELS, HIDDEN, BATCH = (3, 32, 32), 3, 64, 16


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer, and fewer turns."""
    seconds = 0.3 if quick else 2.0
    models = [
        case for steps in ((8,) if quick else (2, 8, 32)) for case in _cases(steps, seconds, device, compiled=not quick and steps < 32)
    ]
    return [*_bare_steps(seconds, device), *models, *_cases(8, seconds, device, batch=1)]


def _cases(steps: int, seconds: float, device: torch.device, *, batch: int = BATCH, compiled: bool = False) -> Iterator[Case]:
    """compiled: the reference under torch.compile too, which takes a minute or so for each case."""
    x = (torch.rand(batch, *IMAGE, generator=torch.Generator().manual_seed(1)) - 0.5).to(device)
    z = torch.randn(batch, x[0].numel(), generator=torch.Generator().manual_seed(2)).to(device)
    models: dict[str, Callable[[], Model]] = {OURS: lambda: _ours(steps, x), NORMFLOWS: lambda: normflows_glow(steps, x)}
    name = f"{LEVELS} levels x {steps} steps, hidden {HIDDEN}, [{batch}, {', '.join(map(str, IMAGE))}]"
    for work, make, rows, must, aim in (
        ("density", _density, x, 1.25, 1.45),
        ("sampling", sampling, z, 1.5, 1.8),
        ("training step", training, x, 1.3, 1.6),
    ):
        competitors = [make(n, build, rows) for n, build in models.items()]
        competitors.append(_by_reference(competitors[0]))
        if compiled:
            competitors.append(_compiled(make, models[OURS], rows))
        competitors.append(_conditioners(steps, rows, grad=work == "training step"))
        targets = [Target("speedup", must, aim, NORMFLOWS)] if steps == 8 and batch == BATCH else []
        yield Case(f"{work}, {name}", competitors, targets=targets, seconds=seconds, device=device)


def _density(name: str, build: Callable[[], Model], x: Tensor) -> Competitor:
    """Data to noise and the log-determinant, in evaluation mode."""

    def made() -> Call:
        model = build()
        model.module.eval()
        exact = model.double()
        return Call(lambda: model.to_noise(model.module, x), lambda: exact.to_noise(exact.module, x.double()))

    return Competitor(name, made, ours=name == OURS, package=name)


def _ours(steps: int, x: Tensor) -> Model:
    torch.manual_seed(0)
    flow = Glow(IMAGE, levels=LEVELS, steps=steps, hidden_channels=HIDDEN).to(x.device)
    flow(x)
    return ours(_moved(flow))


def normflows_glow(steps: int, x: Tensor, *, levels: int = LEVELS, hidden: int = HIDDEN) -> Model:
    """The model of images like x in normflows. Its layers go from noise to data: their inverse is our forward map."""
    flows = _import("normflows").flows
    image = tuple(x.shape[1:])
    torch.manual_seed(0)
    modules = nn.ModuleList()
    for level in range(levels):
        channels = 4 * x.shape[1] * 2**level
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls the deprecated torch.lu
            blocks = [flows.GlowBlock(channels, hidden, split_mode="channel", scale_map="sigmoid") for _ in range(steps)]
        for block in blocks:
            _, coupling, _ = block.flows[0].flows
            coupling.param_map = _ByTorch(ConvNet(channels // 2, hidden, channels))
        modules.append(nn.ModuleList([flows.Squeeze(), *blocks]))

    def to_noise(modules: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        parts, total = [], 0.0
        for level in modules:
            for layer in level:
                x, logabsdet = layer.inverse(x)
                total = total + logabsdet
            if level is not modules[-1]:
                x, left = x.chunk(2, 1)
                parts.append(left.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1), total

    def to_data(modules: nn.Module, z: Tensor) -> Tensor:
        c, h, w = image
        shapes = [(2 * c * 2**i, h // 2 ** (i + 1), w // 2 ** (i + 1)) for i in range(levels)]
        shapes[-1] = (2 * shapes[-1][0], *shapes[-1][1:])
        parts = [part.view(-1, *s) for part, s in zip(z.split([c * h * w for c, h, w in shapes], 1), shapes, strict=True)]
        x = parts[-1]
        for i in reversed(range(levels)):
            x = x if i == levels - 1 else torch.cat([x, parts[i]], 1)
            for layer in reversed(modules[i]):
                x, _ = layer(x)
        return x

    modules.to(x.device)
    to_noise(modules, x)  # initialises actnorm
    return Model(_moved(modules), to_noise, to_data)


class _ByTorch(nn.Module):
    """Our conditioner as others run it: by torch's convolutions rather than our kernel."""

    def __init__(self, net: ConvNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with backend("reference"):
            return self.net(x)


@torch.no_grad()
def _moved(module: nn.Module) -> nn.Module:
    """Away from the initial weights, where every conditioner returns zero."""
    for p in module.parameters():
        p.add_(0.01 * torch.randn_like(p))
    return module


def _by_reference(competitor: Competitor) -> Competitor:
    """The same model, its ops in plain PyTorch."""

    def build() -> Call:
        call = competitor.build()

        def run() -> object:
            with backend("reference"):
                return call.run()

        return replace(call, run=run)

    return Competitor(REFERENCE, build, package="torch")


def _compiled(make: Callable[..., Competitor], build: Callable[[], Model], rows: Tensor) -> Competitor:
    """torch.compile of the reference."""

    def built() -> Call:
        model = build()
        exact = make(COMPILED, build, rows).build().exact  # of the model as it is: compiling it for float64 too would take as long again
        fused = replace(model, to_noise=compiled(model.to_noise), to_data=compiled(model.to_data))
        reference = _by_reference(make(COMPILED, lambda: fused, rows)).build()
        started = perf_counter()
        with torch.inference_mode(not reference.grad):
            reference.run()
        return replace(reference, exact=exact, note=f"compiled in {perf_counter() - started:.0f} s")

    return Competitor(COMPILED, built, package="torch")


class _Constant(nn.Module):
    """A conditioner that costs nothing."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.register_buffer("output", output)

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def _bare_steps(seconds: float, device: torch.device) -> Iterator[Case]:
    """Steps without their conditioners: actnorm, 1x1 convolution and coupling. Each side gets what its conditioner would return, in the
    memory format in which it works.
    """
    count, shape = 4, (32, 48, 16, 16)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)

    def build_ours() -> Model:
        torch.manual_seed(0)
        level = Glow((12, 32, 32), levels=1, steps=count, hidden_channels=1).to(device)
        level(torch.randn(8, 12, 32, 32, device=device))
        steps = next(module for module in level.modules() if isinstance(module, GlowSteps))
        given = _Constant(raw.contiguous(memory_format=torch.channels_last))
        for coupling in steps.couplings:
            coupling.conditioner = given
        return ours(steps)

    def build_normflows() -> Model:
        flows = _import("normflows").flows
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls the deprecated torch.lu
            blocks = nn.ModuleList(flows.GlowBlock(shape[1], 1, split_mode="channel", scale_map="sigmoid") for _ in range(count)).to(device)
        given = _Constant(raw)
        for block in blocks:
            _, coupling, _ = block.flows[0].flows
            coupling.param_map = given

        def through(blocks: nn.Module, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
            total = 0.0
            for block in blocks if inverse else reversed(blocks):
                x, logabsdet = block.inverse(x) if inverse else block(x)
                total = total + logabsdet
            return x, total

        with torch.no_grad():
            through(blocks, x, inverse=True)  # initialises actnorm
        to_noise, to_data = (lambda module, x, i=i: through(module, x, inverse=i) for i in (True, False))
        return Model(blocks, to_noise, lambda module, z: to_data(module, z)[0])

    for direction, make in (("forward", _density), ("inverse", sampling)):
        competitors = [make(name, build, x) for name, build in ((OURS, build_ours), (NORMFLOWS, build_normflows))]
        competitors.append(_by_reference(competitors[0]))
        name = f"{count} steps without their conditioners, {direction}, {list(shape)}"
        yield Case(name, competitors, targets=[Target("speedup", 3.0, 6.0, NORMFLOWS)], seconds=seconds, device=device)


def _conditioners(steps: int, rows: Tensor, grad: bool) -> Competitor:
    """What remains of a Glow whose conditioners are torch's: every conditioner once, and its gradients where it is trained."""

    def build() -> Call:
        torch.manual_seed(0)
        nets, inputs = nn.ModuleList(), []
        for level in range(LEVELS):
            channels, side = 4 * IMAGE[0] * 2**level, IMAGE[1] // 2 ** (level + 1)
            nets.extend(_moved(ConvNet(channels // 2, HIDDEN, channels)) for _ in range(steps))
            inputs += [torch.randn(len(rows), channels // 2, side, side, device=rows.device, requires_grad=grad)] * steps
        nets.to(rows.device)
        optimizer = torch.optim.Adam(nets.parameters(), lr=0.0, fused=True)

        def run() -> list[Tensor]:
            with backend("reference"):
                outputs = [net(x) for net, x in zip(nets, inputs, strict=True)]
            if grad:
                optimizer.zero_grad()
                torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
                optimizer.step()
            return [y.detach() for y in outputs]

        return Call(run, grad=grad)

    return Competitor(CONDITIONERS, build, package="torch")
