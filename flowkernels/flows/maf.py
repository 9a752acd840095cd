"""Masked autoregressive flow."""

from collections.abc import Sequence

from ..layers import FlowBatchNorm, MaskedAutoregressive
from ..layers._sizes import parse_count, parse_widths
from ..ops import ScaleMap
from .base import Base
from .flow import Flow


class MAF(Flow):
    """Masked autoregressive flow (Papamakarios et al. 2017, arXiv 1705.07057): parallel density, sequential sampling.

    A stack of masked autoregressive layers whose orders alternate between ascending and descending, with batch norm between them
    on request. Sampling runs the fused sequential inverse: one pass a layer instead of one a feature.

    Args:
        features: number of features D.
        context_features: width of the context; 0 for none.
        transforms: number of autoregressive layers.
        hidden_features: widths of each layer's hidden layers.
        batch_norm: flow batch norm after each autoregressive layer; in training mode a density then depends on the batch it is in.
        activation, residual, scale, context_rule: see `layers.MaskedAutoregressive`.
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
        batch_norm: bool = False,
        activation: str = "relu",
        residual: bool = False,
        scale: ScaleMap | None = None,
        context_rule: str = "every_output",
        base: Base | None = None,
    ) -> None:
        transforms, hidden_features = parse_count("transforms", transforms), parse_widths(hidden_features)
        layers = []
        for i in range(transforms):
            order = "descending" if i % 2 else "ascending"
            layers.append(
                MaskedAutoregressive(
                    features,
                    hidden_features,
                    context_features=context_features,
                    activation=activation,
                    residual=residual,
                    scale=scale,
                    order=order,
                    context_rule=context_rule,
                )
            )
            if batch_norm:
                layers.append(FlowBatchNorm(features))
        super().__init__(layers, features, context_features=context_features, base=base)
