"""Non-linear independent components estimation."""

import math
from collections.abc import Sequence

from ..layers import MLP, AdditiveCoupling, DiagonalScale, Reshape
from ..layers._sizes import parse_count, parse_shape, parse_widths
from .base import Base, StandardLogistic
from .flow import Flow


class NICE(Flow):
    """NICE (Dinh et al. 2014, arXiv 1410.8516): additive couplings and one diagonal scale; both directions are parallel.

    The couplings alternate between odd and even features. Only the diagonal scale changes volumes, so that the log-determinant is the
    same everywhere. Images are flattened row by row.

    Args:
        shape: number of features, or (C, H, W).
        context_features: width of the context; 0 for none. It joins the input of every conditioner.
        couplings: number of couplings. Three are needed for every feature to act on every other.
        hidden_features: widths of each conditioner's hidden layers; the paper's for MNIST by default.
        base: base distribution; standard logistic by default, as in the paper's models of images.

    Raises:
        ValueError: there are fewer than two features to split, or no couplings.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        context_features: int = 0,
        couplings: int = 4,
        hidden_features: Sequence[int] = (1000, 1000, 1000, 1000, 1000),
        base: Base | None = None,
    ) -> None:
        shape = parse_shape(shape)
        features = math.prod(shape)
        if features < 2:
            raise ValueError(f"shape must have at least 2 features to split; got {features}")
        couplings, widths = parse_count("couplings", couplings), parse_widths(hidden_features)
        layers = [] if len(shape) == 1 else [Reshape(shape, (features,))]
        for i in range(couplings):
            part, transformed = ("even", (features + 1) // 2) if i % 2 else ("odd", features // 2)
            conditioner = MLP(features - transformed, widths, transformed, context_features=context_features)
            layers.append(AdditiveCoupling(conditioner, part=part))
        layers.append(DiagonalScale(features))
        super().__init__(layers, shape, context_features=context_features, base=StandardLogistic() if base is None else base)
