"""What every flow can do: transform both ways, score, sample, and act as a torch distribution."""

import math
from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Generator, Size, SymInt, Tensor, nn
from torch.distributions import Distribution, constraints

from .._dtypes import HALF
from ..layers import Chain, InvertibleConv1x1
from ..layers._fold import freeze_weights
from ..layers._sizes import is_count, parse_context_features, parse_shape
from .base import Base, StandardNormal


class Flow(Chain):
    """A normalizing flow: a stack of layers from data x to standard noise z (Papamakarios et al. 2021, section 2).

        z, logabsdet = flow(x, context)             log p(x) = log base(z) + logabsdet
        x, logabsdet = flow.inverse(z, context)

    Args:
        layers: modules with `forward(x, context)` and `inverse(z, context)`, each returning (output, logabsdet [batch]). The last
            one's output is flat.
        shape: number of features D, or the shape of one row of x, such as (3, 32, 32) or (2, 100).
        context_features: width of the context; 0 for none.
        base: base distribution, as `flows.Base` says; standard normal by default.

    Shape:
        x: [batch, *shape]; z: [batch, features], features being the product of the shape; logabsdet: [batch], in nats.

    Raises:
        ValueError: shape or context_features is out of range; or, of any call, an argument has another shape, dtype or device than it must.
        TypeError: base is no distribution, or an argument of a call no tensor.
    """

    def __init__(
        self, layers: Iterable[nn.Module], shape: int | Sequence[int], *, context_features: int = 0, base: Base | None = None
    ) -> None:
        super().__init__(layers)
        self.shape = parse_shape(shape, sites=None)
        self.features = math.prod(self.shape)
        self.context_features = parse_context_features(context_features)
        self.base = StandardNormal() if base is None else _checked_base(base)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise: z [batch, features] and log|det dz/dx| [batch]."""
        self._check("x", x, self.shape, context)
        z, logabsdet = super().forward(x, context)
        if z.dim() != 2 or z.shape[1] != self.features:
            raise ValueError(f"the last layer must return flat noise, [batch, {self.features}]; got {list(z.shape)}: add a layers.Reshape")
        return z, logabsdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise to data: x [batch, *shape] and log|det dx/dz| [batch]."""
        self._check("z", z, (self.features,), context)
        return super().inverse(z, context)

    def _check(self, name: str, rows: Tensor, shape: tuple[int, ...], context: Tensor | None) -> None:
        for argument, given in ((name, rows), ("context", context)):
            if given is not None and not isinstance(given, Tensor):
                raise TypeError(_no_tensor(argument, given))
        if rows.shape[1:] != shape:
            more = ": distribution(context).log_prob takes any" if name == "x" and rows.shape[-len(shape) :] == shape else ""
            raise ValueError(f"{name} must have shape [batch, {', '.join(map(str, shape))}]; got {list(rows.shape)}{more}")
        if context is None:
            if self.context_features:
                raise ValueError(f"context is missing: the flow takes [{rows.shape[0]}, {self.context_features}]")
        elif not self.context_features or context.shape != (rows.shape[0], self.context_features):
            wanted = f"[{rows.shape[0]}, {self.context_features}], a row for each of {name}" if self.context_features else _NO_CONTEXT
            raise ValueError(f"context must be {wanted}; got {list(context.shape)}")

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density (nats) of each row of x: [batch, *shape] -> [batch]. Score in evaluation mode: batch norms in training mode
        normalise by the rows they see, and take note of them."""
        z, logabsdet = self(x, context)
        return self._base_log_prob(z) + logabsdet

    def _base_log_prob(self, z: Tensor) -> Tensor:
        density = self.base.log_prob(z)
        if density.shape != z.shape[:1]:
            raise ValueError(f"base.log_prob must return one number for each row, {list(z.shape[:1])}; got {list(density.shape)}")
        return density

    def distribution(self, context: Tensor | None = None) -> "FlowDistribution":
        """p(x | context) as a torch distribution. context: [*batch, context features], or None."""
        return FlowDistribution(self, context)

    def sample(self, n: int, context: Tensor | None = None, temperature: float = 1.0, *, generator: Generator | None = None) -> Tensor:
        """n samples for each context, without gradient: [n, *context batch, *shape]. temperature scales the base noise, which comes from
        the generator, or from torch's own."""
        return self.distribution(context).sample(_count(n), temperature, generator=generator)

    def rsample(self, n: int, context: Tensor | None = None, temperature: float = 1.0, *, generator: Generator | None = None) -> Tensor:
        """As `sample`, and gradients reach the parameters and the context (reparametrised)."""
        return self.distribution(context).rsample(_count(n), temperature, generator=generator)

    def sample_and_log_prob(self, n: int, context: Tensor | None = None, *, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """n samples for each context and their log-densities, in one pass, without gradient."""
        return self.distribution(context).sample_and_log_prob(_count(n), generator=generator)

    def rsample_and_log_prob(self, n: int, context: Tensor | None = None, *, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """n samples for each context and their log-densities, in one pass: [n, *context batch, *shape], [n, *context batch]."""
        return self.distribution(context).rsample_and_log_prob(_count(n), generator=generator)

    def freeze(self) -> Self:
        """Evaluation mode for serving: what costs to prepare is prepared once and kept until `train()`, loading, moving or writing
        into the parameters. Writes that torch does not count are not seen: through `.data`, `vector_to_parameters` or NumPy, and by
        fused optimizers; and a flow under torch.compile sees none. Call `freeze()` again, or `train()` before them.

        Raises:
            ValueError: the weight of a 1x1 convolution is singular; the message names it, and its condition number.
        """
        self.eval()
        freeze_weights({name: module for name, module in self.named_modules() if isinstance(module, InvertibleConv1x1)})
        return self


_NO_CONTEXT = "None, as the flow takes none"


def _no_tensor(argument: str, given: object) -> str:
    return f"{argument} must be a torch.Tensor; got {type(given).__module__}.{type(given).__qualname__}"


def _checked_base(base: Base) -> Base:
    whole = not isinstance(base, type) and all(callable(getattr(base, name, None)) for name in ("log_prob", "sample"))
    if not whole or isinstance(base, Distribution):
        kind = f"the class {base.__name__}" if isinstance(base, type) else type(base).__name__
        raise TypeError(f"base must have log_prob(z) and sample(n, features, *, like), as flows.StandardNormal has; got {kind}")
    return base


def check_temperature(temperature: float) -> None:
    """Refuse what noise cannot be scaled by, with a ValueError."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0; got {temperature}")


def _broadcast(a: Size, b: Size) -> Size | None:
    """The shape that both broadcast to; None where there is none. torch.broadcast_shapes imports half a second of other packages."""
    n = max(len(a), len(b))
    pairs = [*zip((1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b, strict=True)]
    return Size([q if p == 1 else p for p, q in pairs]) if all(p == q or 1 in (p, q) for p, q in pairs) else None


def _count(n: int) -> tuple[int]:
    if not isinstance(n, SymInt) and not is_count(n, 0):  # torch.export gives such for a size that is left open
        raise ValueError(f"n must be a whole number of at least 0; got {n!r}: distribution(context).sample takes shapes")
    return (n,)


class FlowDistribution(Distribution):
    """The distribution of a flow under given contexts; see `Flow.distribution`."""

    arg_constraints: dict = {}
    has_rsample = True

    def __init__(self, flow: Flow, context: Tensor | None = None) -> None:
        if context is None and flow.context_features:
            raise ValueError(f"context is missing: the flow takes [*batch, {flow.context_features}]")
        if context is not None and not isinstance(context, Tensor):
            raise TypeError(_no_tensor("context", context))
        if context is not None and (not flow.context_features or context.shape[-1:] != (flow.context_features,)):
            wanted = f"[*batch, {flow.context_features}]" if flow.context_features else _NO_CONTEXT
            raise ValueError(f"context must be {wanted}; got {list(context.shape)}")
        self.flow, self.context = flow, context
        if context is not None:
            _check_context(context, _first_parameter(flow))
        batch = Size() if context is None else context.shape[:-1]
        super().__init__(batch, Size(flow.shape), validate_args=False)

    def __repr__(self) -> str:
        return f"FlowDistribution({type(self.flow).__name__}, batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def _rows(self, shape: Size) -> Tensor | None:
        """The context of each of the samples of a shape that ends in the batch shape, as rows."""
        if self.context is None:
            return None
        return self.context.expand(*shape, self.flow.context_features).reshape(math.prod(shape), self.flow.context_features)

    def expand(self, batch_shape: Size, _instance=None) -> "FlowDistribution":
        batch_shape = Size(batch_shape)
        if self.context is None:
            torch.empty(self.batch_shape, device="meta").expand(batch_shape)  # or torch says why not
        expanded = self._get_checked_instance(FlowDistribution, _instance)  # of a subclass too, such as Pyro's plates need
        expanded.flow = self.flow
        expanded.context = None if self.context is None else self.context.expand(*batch_shape, self.flow.context_features)
        Distribution.__init__(expanded, batch_shape, self.event_shape, validate_args=False)
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (nats) of each value: [*batch, *event shape], broadcast against the contexts, to [*batch]."""
        if not isinstance(value, Tensor):
            raise TypeError(_no_tensor("value", value))
        event = len(self.event_shape)
        if value.shape[-event:] != self.event_shape:
            raise ValueError(f"value must have shape [*batch, {', '.join(map(str, self.event_shape))}]; got {list(value.shape)}")
        shape = _broadcast(value.shape[:-event], self.batch_shape)
        if shape is None:
            wanted = f"value must have a batch that broadcasts with that of the contexts, {list(self.batch_shape)}"
            raise ValueError(f"{wanted}; got {list(value.shape)}")
        rows = value.expand(*shape, *value.shape[-event:]).reshape(math.prod(shape), *value.shape[-event:])
        return self.flow.log_prob(rows, self._rows(shape)).view(shape)

    def sample(self, sample_shape: Size | tuple = (), temperature: float = 1.0, *, generator: Generator | None = None) -> Tensor:
        """Samples without gradient: [*sample_shape, *context batch, *event shape]. temperature scales the base noise."""
        if not torch.is_grad_enabled():  # a microsecond of a small flow's sixty
            return self.rsample(sample_shape, temperature, generator=generator)
        with torch.no_grad():
            return self.rsample(sample_shape, temperature, generator=generator)

    def rsample(self, sample_shape: Size | tuple = (), temperature: float = 1.0, *, generator: Generator | None = None) -> Tensor:
        """As `sample`, and gradients reach the parameters and the context."""
        check_temperature(temperature)
        batch = self._sample_batch(sample_shape)
        z = self._noise(math.prod(batch), generator)
        x, _ = self._from_noise(z * temperature if temperature != 1.0 else z, batch)
        shape = batch + self.event_shape
        return x if x.shape == shape else x.view(shape)

    def sample_and_log_prob(self, sample_shape: Size | tuple = (), *, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Samples and their log-densities in one pass, without gradient."""
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape, generator=generator)

    def rsample_and_log_prob(self, sample_shape: Size | tuple = (), *, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Samples, [*sample_shape, *context batch, *event shape], and their log-densities, in one pass."""
        batch = self._sample_batch(sample_shape)
        z = self._noise(math.prod(batch), generator)
        x, logabsdet = self._from_noise(z, batch)
        return x.view(batch + self.event_shape), (self.flow._base_log_prob(z) - logabsdet).view(batch)

    def _from_noise(self, z: Tensor, batch: Size) -> tuple[Tensor, Tensor]:
        """The inverse of the flow for noise of a batch shape, whose contexts take turns from row to row."""
        contexts = 1 if self.context is None else math.prod(self.batch_shape)
        if contexts < 2 or z.shape[0] < _LONG * contexts or not z.is_cpu or torch.is_grad_enabled():
            return self.flow.inverse(z, self._rows(batch))
        # rows of one context put together: kernels make what belongs to the context once for all of them
        n = z.shape[0] // contexts
        turn = lambda rows, a, b: rows.unflatten(0, (a, b)).transpose(0, 1).flatten(0, 1)
        context = self.context.reshape(contexts, 1, -1).expand(contexts, n, -1).flatten(0, 1)
        x, logabsdet = self.flow.inverse(turn(z, n, contexts), context)
        return turn(x, contexts, n), turn(logabsdet, contexts, n)

    def _sample_batch(self, sample_shape: Size | tuple) -> Size:
        return Size(sample_shape) + self.batch_shape

    def _noise(self, n: int, generator: Generator | None) -> Tensor:
        like = self.context if self.context is not None else _first_parameter(self.flow)
        like = torch.empty(0) if like is None else like
        drawn_by = {} if generator is None else {"generator": generator}  # a user's base need not take one
        return self.flow.base.sample(n, self.flow.features, like=like, **drawn_by)


def _check_context(context: Tensor, parameter: Tensor | None) -> None:
    """The noise has the context's dtype: that of the flow, or half precision beside float32."""
    if parameter is None or context.dtype == parameter.dtype or (context.dtype in HALF and parameter.dtype == torch.float32):
        return
    raise ValueError(f"context must be {parameter.dtype}, like the flow's parameters; got {context.dtype}")


_LONG = 512  # samples of a context, from where on putting them together pays: more than a tile of the kernels'


def _first_parameter(module: nn.Module) -> Tensor | None:
    """The first of `parameters()`, which would list all modules before: small flows feel it."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        if child is not None and (found := _first_parameter(child)) is not None:
            return found
    return None
