"""Reverse KL: fit a flow to a density that can be evaluated up to a constant, as in variational inference, and find the constant.

    KL(q || p) = E_q[log q(x) - log p~(x)] + log Z,   p(x) = p~(x) / Z

The samples come from the flow with their densities in one pass, so a flow whose sampling is parallel (IAF, couplings) is trained at
the price of two evaluations. A banana whose two coordinates are bent over each other, Z = 4 pi:

    >>> import math, torch
    >>> from flowkernels.flows import IAF
    >>> from flowkernels.training import log_normalizer, train_reverse_kl
    >>> def banana(x):
    ...     return -x[:, 0] ** 2 / 8 - (x[:, 1] - x[:, 0] ** 2 / 4) ** 2 / 2
    >>> _ = torch.manual_seed(0)
    >>> flow = IAF(2, transforms=4, hidden_features=(32, 32), activation="tanh")
    >>> losses = train_reverse_kl(flow, banana, steps=400, learning_rate=1e-2)
    >>> found = log_normalizer(flow, banana, 20_000)
    >>> abs(found.log_z - math.log(4 * math.pi)) < 0.05 and found.effective_samples > 0.8 * 20_000
    True
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._wide import wide
from ..flows import Flow
from ..layers._sizes import parse_count
from .model import rows_in_flight

LogDensity = Callable[..., Tensor]


def reverse_kl(flow: Flow, log_density: LogDensity, n: int, context: Tensor | None = None) -> Tensor:
    """E_q[log q(x) - log p~(x)], estimated from n samples of the flow: KL(q || p) - log Z, in nats, a scalar with its gradient.

    Args:
        flow: q.
        log_density: log p~, differentiable: x [rows, *shape] to [rows]; called as log_density(x, context) where there is a context,
            [rows, context features].
        n: samples, for each row of the context where there is one.
        context: [contexts, context features]; the mean is over all of them.

    Raises:
        TypeError: log_density returns no tensor.
        ValueError: it returns another shape, something that is not finite (the sample is named), or a tensor that does not depend on x
            by autograd; or gradients are switched off.
    """
    if not torch.is_grad_enabled():
        raise ValueError(
            "reverse_kl needs gradients, and they are switched off (torch.no_grad or inference_mode); use log_normalizer there"
        )
    parse_count("n", n)
    x, log_q, rows = _samples(flow, n, context)
    if not torch.isfinite(x.detach()).all():
        raise ValueError("samples of the flow must be finite: its parameters have become NaN or infinite, or too large")
    log_p = _evaluate(log_density, x, rows)
    if x.requires_grad and not log_p.requires_grad:
        raise ValueError(
            "log_density must be differentiable: what it returns does not depend on x by autograd (detached, or computed outside torch)"
        )
    bad = (~torch.isfinite(log_p.detach())).nonzero()
    if len(bad):
        i = int(bad[0])
        more = "; a flow has samples everywhere, so a bounded density needs a soft wall" if log_p[i] == -math.inf else ""
        raise ValueError(f"log_density must be finite; it is {log_p[i].item()} for sample {i}, x = {_show(x[i])}{more}")
    return (log_q - log_p).mean()


def train_reverse_kl(
    flow: Flow,
    log_density: LogDensity,
    *,
    context: Tensor | None = None,
    steps: int = 1000,
    samples: int = 256,
    learning_rate: float = 1e-3,
    clip_norm: float = 20.0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Minimise `reverse_kl` by Adam, the learning rate falling to zero as a cosine. Noise comes from torch's global generator.

    Args:
        flow, log_density, context: as in `reverse_kl`; samples: its n, in every step.
        clip_norm: largest norm of a gradient.
        on_step: called after each step with its number, from 1, and its loss.

    Returns:
        The loss of every step, in nats: -log Z where q = p, more elsewhere.

    Raises:
        TypeError, ValueError: as in `reverse_kl`; a number is out of range, or the loss or a gradient is no longer finite.
    """
    for name, value in (("steps", steps), ("samples", samples)):
        parse_count(name, value)
    if not any(p.requires_grad for p in flow.parameters()):
        raise ValueError("flow must have parameters to train; all of them are frozen, requires_grad=False, or there are none")
    for name, value in (("learning_rate", learning_rate), ("clip_norm", clip_norm)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive; got {value}")
    optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(1, steps + 1):
        loss = reverse_kl(flow, log_density, samples, context)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), clip_norm).item()
        if not math.isfinite(norm):
            raise ValueError(f"the gradient's norm is {norm} in step {step}: log_density may have no finite gradient at some sample")
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} in step {step}; learning_rate {learning_rate} may be too large")
        on_step(step, losses[-1])
    return losses


class Normalizer(NamedTuple):
    """log Z with its standard error, both in nats, and of how many samples of p itself the n are worth (Kong 1992)."""

    log_z: float
    standard_error: float
    effective_samples: float


@torch.no_grad()
def log_normalizer(flow: Flow, log_density: LogDensity, n: int, context: Tensor | None = None) -> Normalizer:
    """log Z = log of the integral of p~, by importance sampling from the flow: log mean p~(x) / q(x) over n samples.

    The standard error is that of a mean, by the delta method, of what the flow reaches: where it is narrower than p, as reverse KL leaves
    it, log Z comes out low by what it never draws, and neither the error nor the effective samples tell. A density may be 0
    (log_density -inf) here; where it is 0 at all samples, log Z is -inf, its error infinite, and none is effective.

    Args:
        flow, log_density: as in `reverse_kl`.
        n: number of samples.
        context: the one context, [context features], where the flow takes one.

    Raises:
        TypeError, ValueError: as in `reverse_kl`; context holds several rows.
    """
    if parse_count("n", n) < 2:
        raise ValueError(f"n must be at least 2; got {n}")
    if context is not None and context.dim() != 1:
        raise ValueError(f"context must be a single one, [{flow.context_features}]; got {list(context.shape)}")
    parts = []
    for first in range(0, n, rows_in_flight(flow)):
        x, log_q, rows = _samples(flow, min(n - first, rows_in_flight(flow)), context)
        log_p = _evaluate(log_density, x, rows)
        bad = (log_p.isnan() | (log_p == math.inf)).nonzero()
        if len(bad):
            i = int(bad[0])
            raise ValueError(f"log_density must be finite or -inf; it is {log_p[i].item()} for sample {first + i}, x = {_show(x[i])}")
        parts.append(wide(log_p) - wide(log_q))
    log_weight = torch.cat(parts)
    log_z = log_weight.logsumexp(0) - math.log(n)
    if log_z == -math.inf:
        return Normalizer(-math.inf, math.inf, 0.0)
    weight = (log_weight - log_z).exp()  # of mean 1
    return Normalizer(log_z.item(), (weight.std() / math.sqrt(n)).item(), (weight.sum() ** 2 / weight.square().sum()).item())


def _samples(flow: Flow, n: int, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Samples [rows, *shape], log q [rows] and the contexts [rows, context features]."""
    x, log_q = flow.rsample_and_log_prob(n, context)
    rows = None if context is None else context.expand(n, *context.shape).reshape(-1, context.shape[-1])
    return x.reshape(-1, *flow.shape), log_q.reshape(-1), rows


def _evaluate(log_density: LogDensity, x: Tensor, rows: Tensor | None) -> Tensor:
    log_p = log_density(x) if rows is None else log_density(x, rows)
    if not isinstance(log_p, Tensor):
        raise TypeError(f"log_density must return a tensor; got {type(log_p).__name__}")
    if log_p.shape != x.shape[:1]:
        raise ValueError(f"log_density must return shape [{len(x)}], a number for each row of x; got {list(log_p.shape)}")
    return log_p


def _show(x: Tensor) -> str:
    values = ", ".join(f"{value:g}" for value in x.flatten()[:8].tolist())
    return f"[{values}{', ...' if x.numel() > 8 else ''}]"
