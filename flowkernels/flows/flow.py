"""What every flow can do: transform both ways, score, sample, and act as a torch distribution."""

from collections.abc import Iterable

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from ..layers.invertible_conv1x1 import InvertibleConv1x1, freeze_weights
from .base import StandardNormal


class Flow(nn.Module):
    """A normalizing flow: a stack of layers from data x to standard noise z (Papamakarios et al. 2021, section 2).

        z, logabsdet = flow(x, context)             log p(x) = log base(z) + logabsdet
        x, logabsdet = flow.inverse(z, context)

    Args:
        layers: modules with `forward(x, context)` and `inverse(z, context)`, each returning (output, logabsdet [batch]).
        features: number of features D; z is [batch, D].
        context_features: width of the context; 0 for none.
        base: base distribution; standard normal by default.
    """

    def __init__(
        self, layers: Iterable[nn.Module], features: int, *, context_features: int = 0, base: StandardNormal | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.features = features
        self.context_features = context_features
        self.base = StandardNormal() if base is None else base

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise. x: [batch, features] -> z [batch, features], log|det dz/dx| [batch]."""
        total = None
        for layer in self.layers:
            x, logabsdet = layer(x, context)
            total = logabsdet if total is None else total + logabsdet
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise to data. z: [batch, features] -> x [batch, features], log|det dx/dz| [batch]."""
        total = None
        for layer in reversed(self.layers):
            z, logabsdet = layer.inverse(z, context)
            total = logabsdet if total is None else total + logabsdet
        return z, total

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density (nats) of each row of x: [batch, features] -> [batch]."""
        z, logabsdet = self(x, context)
        return self.base.log_prob(z) + logabsdet

    def distribution(self, context: Tensor | None = None) -> "FlowDistribution":
        """p(x | context) as a torch distribution. context: [*batch, context features], or None."""
        return FlowDistribution(self, context)

    def sample(self, n: int, context: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """n samples for each context, without gradient: [n, *context batch, features]. temperature scales the base noise."""
        return self.distribution(context).sample((n,), temperature)

    def rsample(self, n: int, context: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """As `sample`, and gradients reach the parameters and the context (reparametrised)."""
        return self.distribution(context).rsample((n,), temperature)

    def sample_and_log_prob(self, n: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """n samples for each context and their log-densities, in one pass, without gradient."""
        with torch.no_grad():
            return self.rsample_and_log_prob(n, context)

    def rsample_and_log_prob(self, n: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """n samples for each context and their log-densities, in one pass: [n, *context batch, features], [n, *context batch]."""
        return self.distribution(context).rsample_and_log_prob((n,))

    def freeze(self) -> "Flow":
        """Evaluation mode for serving: what costs to prepare is prepared once and kept until `train()`, loading or moving."""
        self.eval()
        freeze_weights({name: module for name, module in self.named_modules() if isinstance(module, InvertibleConv1x1)})
        return self


class FlowDistribution(Distribution):
    """The distribution of a flow under given contexts; see `Flow.distribution`."""

    arg_constraints: dict = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self, flow: Flow, context: Tensor | None = None) -> None:
        if context is None and flow.context_features:
            raise ValueError(f"context is missing: the flow takes [*batch, {flow.context_features}]")
        if context is not None and (not flow.context_features or context.shape[-1] != flow.context_features):
            wanted = f"[*batch, {flow.context_features}]" if flow.context_features else "no context"
            raise ValueError(f"context must be {wanted}; got {list(context.shape)}")
        self.flow, self.context = flow, context
        batch = Size() if context is None else context.shape[:-1]
        super().__init__(batch, Size((flow.features,)), validate_args=False)

    def _rows(self, shape: Size) -> Tensor | None:
        """The context of each of the samples of a shape that ends in the batch shape, as rows."""
        if self.context is None:
            return None
        return self.context.expand(*shape, self.flow.context_features).reshape(shape.numel(), self.flow.context_features)

    def expand(self, batch_shape: Size, _instance=None) -> "FlowDistribution":
        batch_shape = Size(batch_shape)
        if self.context is None:
            if batch_shape:
                raise NotImplementedError("a flow without a context has no batch shape to expand; use sample(shape)")
            return self
        return FlowDistribution(self.flow, self.context.expand(*batch_shape, self.flow.context_features))

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        rows = value.expand(*shape, value.shape[-1]).reshape(shape.numel(), value.shape[-1])
        return self.flow.log_prob(rows, self._rows(shape)).view(shape)

    def sample(self, sample_shape: Size | tuple = (), temperature: float = 1.0) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape, temperature)

    def rsample(self, sample_shape: Size | tuple = (), temperature: float = 1.0) -> Tensor:
        shape = self._extended_shape(Size(sample_shape))
        z = self._noise(shape)
        x, _ = self.flow.inverse(z * temperature if temperature != 1.0 else z, self._rows(shape[:-1]))
        return x.view(shape)

    def rsample_and_log_prob(self, sample_shape: Size | tuple = ()) -> tuple[Tensor, Tensor]:
        """Samples and their log-densities in one pass."""
        shape = self._extended_shape(Size(sample_shape))
        z = self._noise(shape)
        x, logabsdet = self.flow.inverse(z, self._rows(shape[:-1]))
        return x.view(shape), (self.flow.base.log_prob(z) - logabsdet).view(shape[:-1])

    def _noise(self, shape: Size) -> Tensor:
        like = next(self.flow.parameters()) if self.context is None else self.context
        return self.flow.base.sample(shape[:-1].numel(), shape[-1], like=like)
