"""A flow together with the preprocessing of its data: log-densities, noise and samples in the user's units."""

import math

import torch
from torch import Generator, Tensor

from .._wide import wide, wide_dtype
from ..data import GreyLevels, Preprocess, Table
from ..flows import Flow
from ..flows.flow import check_temperature

_ROWS = 4096


def rows_in_flight(flow: Flow) -> int:
    """How many rows go through a flow at once: about a million numbers, and at most 4,096 rows."""
    return max(1, min(_ROWS, 2**20 // flow.features))


class DataModel:
    """log p(x) = log p_flow(y | context) + log|det dy/dx|,  y = preprocess(x).

    Args:
        flow: the flow.
        preprocess: the fixed map of x.
        context_map: the fixed map of the context; None where it is taken as it is.
    """

    def __init__(self, flow: Flow, preprocess: Preprocess, context_map: Preprocess | None = None) -> None:
        self.flow, self.preprocess, self.context_map = flow, preprocess, context_map

    def fit_preprocess(self, train: Table) -> None:
        """Take the training rows' statistics."""
        self.preprocess.check(train.x, f"data {train.name}")
        self.preprocess.fit(train.x)
        if self.context_map is not None and train.context is not None:
            self.context_map.fit(train.context)

    def check(self, table: Table) -> None:
        """Refuse rows that are not for this model.

        Raises:
            ValueError: the width of the data or the context differs, or the shape of images, or a context is missing or unexpected.
        """
        self._check_shapes(table)
        self.preprocess.check(table.x, f"data {table.name}")

    def _check_shapes(self, table: Table) -> None:
        if table.image_shape is not None and len(self.flow.shape) == 3 and tuple(table.image_shape) != tuple(self.flow.shape):
            wanted, got = list(self.flow.shape), list(table.image_shape)
            raise ValueError(f"data must be images of shape {wanted}, [channels, height, width], like the run's; {table.name} has {got}")
        if table.x.shape[1] != self.flow.features:
            raise ValueError(f"data must have {self.flow.features} columns, like the run's; {table.name} has {table.x.shape[1]}")
        self.check_context(table.context, table.name)

    def check_context(self, context: Tensor | None, name: str) -> None:
        """Refuse a context that is missing, unexpected or of another width, with a ValueError."""
        width = self.flow.context_features
        if context is None and width:
            raise ValueError(f"context is missing: the run takes {width} columns of context, and {name} gives none")
        if context is not None and not width:
            raise ValueError(f"context was given, {list(context.shape)}, but the run takes none")
        if context is not None and context.shape[1] != width:
            raise ValueError(f"context must have {width} columns, like the run's; got {context.shape[1]}")

    def prepare(self, table: Table, generator: Generator | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the flow sees.

        Returns:
            y [rows, *shape of the flow] in its dtype, log|det dy/dx| [rows], in float64 where the device has it, and the context in the
            flow's dtype; on its device.

        Raises:
            ValueError: the rows have another shape, or are too large for the flow's dtype.
        """
        self._check_shapes(table)
        parts, totals = [], []
        for x in table.x.split(_ROWS):  # in float64, so not all at once
            y, logabsdet = self.preprocess.forward(x, generator)
            parts.append(self._cast(y))
            totals.append(logabsdet)
        y = torch.cat(parts)
        _check_finite("data", table.name, y, table.x)
        logabsdet = torch.cat(totals).to(y.device, wide_dtype(y.device))
        return y.view(len(y), *self.flow.shape), logabsdet, self.prepare_context(table.context, table.name)

    def prepare_context(self, context: Tensor | None, name: str = "the context") -> Tensor | None:
        """The context as the flow sees it; name: of where it came from."""
        if context is None:
            return None
        seen = self._cast(context if self.context_map is None else self.context_map.forward(context)[0])
        _check_finite("context", name, seen, context)
        return seen

    def _cast(self, x: Tensor) -> Tensor:
        parameter = next(self.flow.parameters())
        return x.to(device=parameter.device, dtype=parameter.dtype)

    @torch.no_grad()
    def log_prob(self, table: Table, generator: Generator | None = None, draws: int = 1) -> Tensor:
        """log p(x) of each row in nats, [rows] float64.

        Grey levels are dequantised with noise from the generator, and the mean over `draws` draws is given. Other data takes no noise.
        """
        if not isinstance(draws, int) or draws < 1:
            raise ValueError(f"draws must be a whole number from 1 on; got {draws}")
        self.flow.eval()
        draws = draws if self.preprocess.random else 1
        total = torch.zeros(len(table), dtype=torch.float64)
        for _ in range(draws):
            y, logabsdet, context = self.prepare(table, generator)
            parts = [wide(self.flow.log_prob(*rows)) for rows in self._chunks(y, context)]
            total += (torch.cat(parts) + logabsdet).cpu()
        return total / draws

    @torch.no_grad()
    def encode(self, table: Table, generator: Generator | None = None) -> Tensor:
        """z = f(y) of each row, [rows, features]."""
        self.flow.eval()
        y, _, context = self.prepare(table, generator)
        return torch.cat([self.flow(*rows)[0] for rows in self._chunks(y, context)]).cpu()

    @torch.no_grad()
    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """x = g(z) of each row, [rows, features], float64, in the units of x; context: [rows, context features], as the user has it."""
        self.flow.eval()
        z, context = self._cast(z), self.prepare_context(context)
        y = torch.cat([self.flow.inverse(*rows)[0] for rows in self._chunks(z, context)])
        return self.preprocess.inverse(y.flatten(1).cpu().double())

    def sample(self, n: int, context: Tensor | None = None, temperature: float = 1.0, generator: Generator | None = None) -> Tensor:
        """n samples, or n for each row of the context, one row's after another's: [n or rows * n, features], float64, in the units of x."""
        check_temperature(temperature)
        if context is not None:
            context = context.repeat_interleave(n, 0)
            n = len(context)
        like = next(self.flow.parameters())
        z = self.flow.base.sample(n, self.flow.features, like=like.cpu(), generator=generator) * temperature
        return self.decode(z, context)

    def bits_per_dim(self, nats: float) -> float | None:
        """Bits per dimension of a mean log-density, where x has grey levels; None where it has units of its own."""
        return -nats / (self.flow.features * math.log(2)) if isinstance(self.preprocess, GreyLevels) else None

    def _chunks(self, x: Tensor, context: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        rows = rows_in_flight(self.flow)
        parts = x.split(rows)
        contexts = [None] * len(parts) if context is None else context.split(rows)
        return list(zip(parts, contexts, strict=True))


def _check_finite(what: str, name: str, seen: Tensor, given: Tensor) -> None:
    """seen: what the flow sees of `given`, both [rows, columns]."""
    bad = ~torch.isfinite(seen)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{what} must fit {seen.dtype} after preprocessing; row {row}, column {column}, counted from 0, of {name} "
            f"is {given[row, column]:g}"
        )
