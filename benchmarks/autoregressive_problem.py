"""One masked autoregressive layer and its inputs, and everybody who can compute it."""

from collections.abc import Callable
from functools import cache, cached_property, partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import flowkernels
from flowkernels.layers import MaskedAutoregressive
from flowkernels.ops.autoregressive.reference import autoregressive_reference
from flowkernels.ops.masked_linear.reference import staircase_mask
from flowkernels.ops.scale_map import apply_form, invert_form

from .case import Call, Competitor, compiled
from .peers import LIBRARIES, build_peer, exact_copy, forward_of, inverse_of, masked_into_dense

OURS, REFERENCE, DENSE, COMPILED = "flowkernels", "reference", "dense forward", "torch.compile"


class Problem:
    """A layer of `features` with hidden layers `hidden_features`, and a batch of `batch` rows of `context_features` context.

    check_rows: so many rows, evenly spread, are compared with float64.
    """

    def __init__(
        self,
        features: int,
        hidden_features: tuple[int, ...],
        batch: int,
        device: torch.device,
        *,
        context_features: int = 0,
        check_rows: int = 256,
    ) -> None:
        self.features, self.hidden_features, self.batch, self.device = features, hidden_features, batch, device
        self.context_features = context_features
        self.rows = torch.linspace(0, batch - 1, min(batch, check_rows)).round().long().to(device)

    @property
    def name(self) -> str:
        widths = set(self.hidden_features)
        hidden = f"{self.hidden_features[0]}x{len(self.hidden_features)}" if len(widths) == 1 else "-".join(map(str, self.hidden_features))
        context = f", context {self.context_features}" if self.context_features else ""
        return f"D={self.features}, H={hidden}{context}, batch {self.batch:,}"

    @cached_property
    def layer(self) -> MaskedAutoregressive:
        return _layer(self.features, self.hidden_features, self.context_features, self.device)

    @cached_property
    def input(self) -> Tensor:
        """Standard noise, which serves as data too."""
        return torch.randn(self.batch, self.features, generator=torch.Generator().manual_seed(1)).to(self.device)

    @cached_property
    def context(self) -> Tensor | None:
        if not self.context_features:
            return None
        return torch.randn(self.batch, self.context_features, generator=torch.Generator().manual_seed(2)).to(self.device)

    @cached_property
    def macs(self) -> float:
        """Multiply-adds inside the staircases."""
        return float(self.batch * sum(int(m.visible.sum()) + self.context_features * len(m.visible) for m in self.layer.layers))

    @cached_property
    def bytes(self) -> float:
        """Input, context, outputs, and each weight inside the staircase once."""
        return 4.0 * (self.batch * (2 * self.features + 1 + self.context_features) + self.macs / self.batch)

    def dense(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The conditioner as a plain network whose weights are already masked."""
        parts: list[nn.Module] = []
        for m in self.layer.layers:
            mask = staircase_mask(m.visible, m.weight.shape[0])
            parts += [masked_into_dense((m.weight.detach() * mask).T.to(dtype), m.bias.detach().to(dtype)), nn.ReLU(inplace=True)]
        return nn.Sequential(*parts[:-1])

    @cached_property
    def exact_forward(self) -> tuple[Tensor, Tensor]:
        """The forward map of the checked rows, and its log-determinant, in float64."""
        x, conditioner = self.input[self.rows].double(), self._exact_conditioner()
        z, log_derivative = apply_form(self.layer.form, x, *conditioner(x, slice(None)), self.layer.scale)
        return z, log_derivative.sum(-1)

    @cached_property
    def exact_inverse(self) -> tuple[Tensor, Tensor]:
        """The inverse of the checked rows, and its log-determinant, in float64, one feature a pass."""
        z, conditioner = self.input[self.rows].double(), self._exact_conditioner()
        x, logabsdet = torch.zeros_like(z), z.new_zeros(len(z))
        for i in range(self.features):
            shift, raw = conditioner(x, slice(2 * i, 2 * i + 2))
            x[:, i : i + 1], log_derivative = invert_form(self.layer.form, z[:, i : i + 1], shift, raw, self.layer.scale)
            logabsdet += log_derivative[:, 0]
        return x, logabsdet

    def _exact_conditioner(self) -> Callable[[Tensor, slice], tuple[Tensor, Tensor]]:
        """Shift and raw scale in float64 for those outputs of the network that a slice picks."""
        *hidden, last = [part for part in self.dense(torch.float64) if isinstance(part, nn.Linear)]
        context = None if self.context is None else self.context[self.rows].double()
        terms = [0.0 if context is None else context @ m.context_weight.double() for m in self.layer.layers]

        def conditioner(x: Tensor, outputs: slice) -> tuple[Tensor, Tensor]:
            for linear, term in zip(hidden, terms, strict=False):
                x = torch.relu(linear(x) + term)
            out = nn.functional.linear(x, last.weight[outputs], last.bias[outputs])
            if context is not None:
                out = out + terms[-1][:, outputs]
            return out[:, 0::2], out[:, 1::2]

        return conditioner


def ours(problem: Problem, direction: str, *, memory: bool = False) -> Competitor:
    """The layer's call as a user makes it; direction is "inverse" or "forward"."""

    def build() -> Call:
        call = partial(getattr(problem.layer, direction), problem.input, problem.context)
        return Call(call, _exact(problem, direction), problem.rows, note=implementation(problem.device))

    return Competitor(OURS, build, ours=True, package="flowkernels", memory=memory)


def reference(problem: Problem, direction: str) -> Competitor:
    """The same layer in plain PyTorch: one pass forward, D passes for the inverse."""

    def run() -> Any:
        with flowkernels.backend("reference"):
            return getattr(problem.layer, direction)(problem.input, problem.context)

    return Competitor(REFERENCE, lambda: Call(run, _exact(problem, direction), problem.rows), package="torch")


def compiled_forward(problem: Problem) -> Competitor:
    """torch.compile of the reference's forward map."""

    def build() -> Call:
        layer = problem.layer
        conditioner = layer.conditioner()

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            return autoregressive_reference(x, conditioner, None, layer.scale, layer.form, False)

        run = partial(compiled(forward, fullgraph=True), problem.input)
        started = perf_counter()
        with torch.inference_mode():
            run()
        return Call(run, _exact(problem, "forward"), problem.rows, note=f"compiled in {perf_counter() - started:.0f} s")

    return Competitor(COMPILED, build, package="torch")


def dense_forward(problem: Problem, *, memory: bool = False) -> Competitor:
    """One forward pass of a dense network of the same sizes, with its weights already masked; no affine map after it."""

    def build() -> Call:
        exact = problem.dense(torch.float64)
        run = partial(problem.dense(), problem.input)
        return Call(run, lambda: exact(problem.input[problem.rows].double()), problem.rows)

    return Competitor(DENSE, build, package="torch", memory=memory)


def peer(library: str, problem: Problem, direction: str, *, memory: bool = False) -> Competitor:
    """Another library's layer."""

    def build() -> Call:
        module = build_peer(library, problem.features, problem.hidden_features).to(problem.device)
        way = {"inverse": inverse_of, "forward": forward_of}[direction]
        run, z = way(library, module), problem.input
        return Call(partial(run, z), lambda: way(library, exact_copy(module))(z[problem.rows].double()), problem.rows)

    return Competitor(library, build, package=library, memory=memory)


def peers(problem: Problem, direction: str) -> list[Competitor]:
    """All other libraries' layers."""
    return [peer(library, problem, direction) for library in LIBRARIES]


def implementation(device: torch.device) -> str:
    """Which implementation serves the op on a device."""
    key = device.type.upper()
    if torch._C._dispatch_has_kernel_for_dispatch_key("flowkernels::autoregressive", key):
        return f"compiled {key} kernel"
    return "no compiled kernel: the reference runs"


def _exact(problem: Problem, direction: str) -> Callable[[], Any]:
    return lambda: problem.exact_inverse if direction == "inverse" else problem.exact_forward


@cache
def _layer(features: int, hidden_features: tuple[int, ...], context_features: int, device: torch.device) -> MaskedAutoregressive:
    torch.manual_seed(0)
    return MaskedAutoregressive(features, hidden_features, context_features=context_features).eval().to(device)
