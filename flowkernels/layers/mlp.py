"""Fully connected networks, as conditioners of couplings of vectors."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .._torch import has_global_hooks
from ._context import check_context
from ._dtype import check_dtype
from ._plain import is_plain
from ._sizes import parse_context_features, parse_count, parse_widths


class Dense(nn.Module):
    """y = x @ weight + context @ context_weight + bias.

    Weights are input-major, [inputs, outputs], as the fused kernels take them. All parameters begin uniform within 1 / sqrt(fan-in), as in
    nn.Linear.

    Args:
        inputs: width of x.
        outputs: width of y.
        context_features: width of the context; 0 for none.
    """

    def __init__(self, inputs: int, outputs: int, *, context_features: int = 0) -> None:
        super().__init__()
        bound = 1 / math.sqrt(max(inputs + context_features, 1))
        uniform = lambda *shape: nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.weight, self.bias = uniform(inputs, outputs), uniform(outputs)
        self.register_parameter("context_weight", uniform(context_features, outputs) if context_features else None)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_dtype(self.bias, x=x, context=context)
        if x.shape[-1:] != self.weight.shape[:1]:
            raise ValueError(f"x must have shape [*, {self.weight.shape[0]}], as wide as the network's input; got {list(x.shape)}")
        # not F.linear of a transposed weight, whose gradient comes out transposed and is copied
        y = torch.addmm(self.bias, x, self.weight) if x.dim() == 2 else x @ self.weight + self.bias
        check_context(self.context_weight, x, context)
        return y if context is None else y + context @ self.context_weight

    def extra_repr(self) -> str:
        contexts = 0 if self.context_weight is None else len(self.context_weight)
        return f"inputs={self.weight.shape[0]}, outputs={self.weight.shape[1]}, context_features={contexts}"


class MLP(nn.Module):
    """ReLU network with a linear output; the context joins its input.

    On a CPU, couplings of vectors run it inside their own kernel (`layers.AffineCoupling`), unless its weights are so large that BLAS is
    faster.

    Args:
        features: width of x.
        hidden_features: widths of the hidden layers.
        outputs: width of what is returned.
        context_features: width of the context; 0 for none.

    Shape:
        x: [batch, features]; context: [batch, context_features]; output: [batch, outputs].

    Raises:
        ValueError: a size is no whole number, or too small.
    """

    def __init__(self, features: int, hidden_features: Sequence[int], outputs: int, *, context_features: int = 0) -> None:
        super().__init__()
        features, outputs = parse_count("features", features), parse_count("outputs", outputs)
        context_features = parse_context_features(context_features)
        first, *rest = pairwise([features, *parse_widths(hidden_features), outputs])
        self.layers = nn.ModuleList([Dense(*first, context_features=context_features), *(Dense(*widths) for widths in rest)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.layers[0](x, context)
        for below, layer in pairwise(self.layers):
            own = is_plain(below, Dense) and not has_global_hooks()  # else somebody may have kept what it returned
            h = layer(torch.relu_(h) if own else torch.relu(h))
        return h
