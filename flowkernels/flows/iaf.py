"""Inverse autoregressive flow."""

from collections.abc import Sequence

from ..layers import Inverse, MaskedAutoregressive
from ..layers._sizes import parse_count, parse_widths
from ..ops import ScaleMap
from .base import Base
from .flow import Flow


class IAF(Flow):
    """Inverse autoregressive flow (Kingma et al. 2016, arXiv 1606.04934): parallel sampling, sequential density.

    The layers of a MAF the other way round. Noise passes `transforms` steps, whose orders alternate between ascending and descending:

        z_i <- z_i * sigma(s_i) + shift_i,                         (shift_i, s_i) = MADE(z_<i, context)
        z_i <- sigma_i * z_i + (1 - sigma_i) * shift_i             with `gate`, sigma_i = sigmoid(s_i + 2): the paper's equation 10

    A sample comes with its density in that same pass (`sample_and_log_prob`, `rsample_and_log_prob`). The density of a point from
    outside, and training by maximum likelihood with its gradient, go through the fused sequential loop.

    Args:
        features: number of features D.
        context_features: width of the context; 0 for none.
        transforms: number of autoregressive steps.
        hidden_features: widths of each step's hidden layers.
        gate: the paper's numerically stable form; it starts near the identity. With its own scale map, sigmoid(s + 2),
            a step's scale is at most 1.
        scale: scale map; `ScaleMap.softclip()` by default, `ScaleMap.sigmoid(bias=2.0)` with `gate` (the paper's bias is 1 to 2).
        activation, residual, context_rule: see `layers.MaskedAutoregressive`.
        base: base distribution of the noise; standard normal by default.

    Raises:
        ValueError: an argument is out of range, or not one of the listed choices.
    """

    def __init__(
        self,
        features: int,
        *,
        context_features: int = 0,
        transforms: int = 5,
        hidden_features: Sequence[int] = (512, 512),
        gate: bool = False,
        activation: str = "relu",
        residual: bool = False,
        scale: ScaleMap | None = None,
        context_rule: str = "every_output",
        base: Base | None = None,
    ) -> None:
        transforms, hidden_features = parse_count("transforms", transforms), parse_widths(hidden_features)
        if gate and scale is None:
            scale = ScaleMap.sigmoid(bias=2.0)
        steps = [
            MaskedAutoregressive(
                features,
                hidden_features,
                context_features=context_features,
                activation=activation,
                residual=residual,
                scale=scale,
                form="gate" if gate else "scale_shift",
                order="descending" if i % 2 else "ascending",
                context_rule=context_rule,
            )
            for i in range(transforms)
        ]
        # a flow's layers go from data to noise
        super().__init__([Inverse(step) for step in reversed(steps)], features, context_features=context_features, base=base)
