"""Flows as distributions of Pyro."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Generator, Size, Tensor
from torch.distributions import Distribution

from .._torch import times_written
from ..flows import Flow
from ..flows.flow import FlowDistribution


def to_pyro(flow: Flow, context: Tensor | None = None) -> Distribution:
    """The distribution of a flow as one of Pyro's, for `pyro.sample` in models and guides.

        def guide():
            pyro.module("flow", flow)
            pyro.sample("z", to_pyro(flow))

    Its log_prob of its own last sample comes from the pass that drew it, with the same gradients, as in Pyro's own transforms: so an IAF
    is a guide at the price of a pass. It is that of the parameters then: make the distribution anew in each step, as guides do. Any other
    value is scored as by `flow.log_prob`.

    Args:
        flow: any flow of this package.
        context: [*batch, context features], or None for a flow without; see `Flow.distribution`.

    Returns:
        A Pyro distribution of batch shape [*batch] and event shape `flow.shape`.

    Raises:
        TypeError, ValueError: flow is none, or the context does not fit it.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"flow must be a flowkernels.flows.Flow; got {type(flow).__name__}")
    return _pyro_distribution()(flow, context)


@cache
def _pyro_distribution() -> type[FlowDistribution]:
    from pyro.distributions.torch_distribution import TorchDistributionMixin

    class PyroFlowDistribution(FlowDistribution, TorchDistributionMixin):
        _last: tuple[Tensor, int, Tensor] | None = None

        def rsample(self, sample_shape: Size | tuple = (), temperature: float = 1.0, *, generator: Generator | None = None) -> Tensor:
            if temperature != 1.0:  # such samples have another density
                return super().rsample(sample_shape, temperature, generator=generator)
            x, log_prob = self.rsample_and_log_prob(sample_shape, generator=generator)
            self._last = x, times_written(x), log_prob
            return x

        def log_prob(self, value: Tensor) -> Tensor:
            x, version, log_prob = self._last or (None, 0, None)
            if value is not x or times_written(x) != version:
                return super().log_prob(value)
            if not torch.is_grad_enabled():
                return log_prob.detach()
            # a sample that was drawn without gradient is scored with one: of the parameters, or of itself where somebody moves it
            return super().log_prob(value) if x.grad_fn is None else log_prob

        def __reduce__(self) -> tuple[Callable, tuple, dict]:  # copies and pickles have no samples, as those of Pyro's transforms
            return _unpickled, (), {name: value for name, value in vars(self).items() if name != "_last"}

    return PyroFlowDistribution


def _unpickled() -> FlowDistribution:
    """What a copy's attributes are put into."""
    return object.__new__(_pyro_distribution())
