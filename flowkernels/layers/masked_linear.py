"""Parameters of one masked linear layer."""

import torch
from torch import Tensor, nn

from ..ops import masked_linear
from ..ops.masked_linear.reference import staircase_mask


class MaskedLinear(nn.Module):
    """Linear layer under a staircase mask, with an optional unmasked context term.

        y = x masked@ weight + bias + context @ context_weight

    The weight is input-major, [in_features, out_features]; its entries outside the staircase are zero and stay so, because their
    gradient is zero.

    Args:
        visible: number of inputs that each output sees, ascending, int32 [out_features] (`ops.degrees.staircase`).
        in_features: number of inputs.
        context_features: width of the context; 0 for none.
    """

    def __init__(self, visible: Tensor, in_features: int, *, context_features: int = 0) -> None:
        super().__init__()
        out_features = len(visible)
        self.register_buffer("visible", visible.to(torch.int32))
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        context_weight = nn.Parameter(torch.empty(context_features, out_features)) if context_features else None
        self.register_parameter("context_weight", context_weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(fan-in), as in nn.Linear, where fan-in counts what an output sees."""
        contexts = 0 if self.context_weight is None else self.context_weight.shape[0]
        bound = 1 / (self.visible + contexts).clamp(min=1).sqrt()
        with torch.no_grad():
            for parameter in (self.weight, self.bias, self.context_weight):
                if parameter is not None:
                    parameter.copy_((torch.rand_like(parameter) * 2 - 1) * bound)
            self.weight.mul_(staircase_mask(self.visible, self.weight.shape[0]))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y = masked_linear(x, self.weight, self.bias, self.visible)
        return y if self.context_weight is None else y + context @ self.context_weight

    def extra_repr(self) -> str:
        contexts = 0 if self.context_weight is None else self.context_weight.shape[0]
        return f"in_features={self.weight.shape[0]}, out_features={self.weight.shape[1]}, context_features={contexts}"
