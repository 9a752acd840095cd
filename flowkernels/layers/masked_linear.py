"""Parameters of one layer of a masked network."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops import masked_linear
from ..ops.degrees import check_staircase
from ..ops.masked_linear.reference import staircase_mask
from ._context import check_context
from ._sizes import parse_context_features, parse_count
from ._structure import Structured


class MaskedLinear(Structured):
    """Linear layer under a staircase mask, with an optional unmasked context term.

        y = x masked@ weight + bias + context @ context_weight [+ context_bias]

    The weight is input-major, [in_features, out_features]; its entries outside the staircase are zero and stay so, because their
    gradient is zero.

    Args:
        visible: number of inputs that each output sees, ascending, int32 [out_features] (`ops.degrees.staircase`).
        in_features: number of inputs.
        context_features: width of the context; 0 for none.
        context_bias: give the context term a bias of its own, for networks that put an activation between the two.

    Shape:
        x: [*, in_features]; context: [*, context_features]; y: [*, out_features].

    Raises:
        ValueError: visible does not ascend, or exceeds the inputs; or a size is no whole number, or too small.
        TypeError: visible is no tensor.
    """

    def __init__(self, visible: Tensor, in_features: int, *, context_features: int = 0, context_bias: bool = False) -> None:
        super().__init__()
        in_features, context_features = parse_count("in_features", in_features, 0), parse_context_features(context_features)
        if not isinstance(visible, Tensor):
            raise TypeError(f"visible must be a torch.Tensor, as ops.degrees.staircase makes it; got {type(visible).__name__}")
        if visible.dim() != 1 or visible.is_floating_point():
            raise ValueError(f"visible must be of whole numbers, [out_features]; got {visible.dtype}, {list(visible.shape)}")
        out_features = len(visible)
        check_staircase(visible, in_features)
        self.register_integers("visible", visible.to(torch.int32, copy=True))
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        context_weight = nn.Parameter(torch.empty(context_features, out_features)) if context_features else None
        self.register_parameter("context_weight", context_weight)
        self.register_parameter("context_bias", nn.Parameter(torch.empty(out_features)) if context_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(fan-in), as in nn.Linear. Fan-in counts all inputs, those that an output does not see too: a unit that sees
        few of them would have weights and a bias so large that training begins far off."""
        contexts = 0 if self.context_weight is None else self.context_weight.shape[0]
        bound = max(self.weight.shape[0] + contexts, 1) ** -0.5
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter is not None:
                    parameter.copy_((torch.rand_like(parameter) * 2 - 1) * bound)
            self.weight.mul_(staircase_mask(self.visible, self.weight.shape[0]))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context(self.context_weight, x, context)
        y = masked_linear(x, self.weight, self.bias, self.visible)
        if context is not None:
            y = y + context @ self.context_weight
        return y if self.context_bias is None else y + self.context_bias

    def extra_repr(self) -> str:
        contexts = 0 if self.context_weight is None else self.context_weight.shape[0]
        return f"in_features={self.weight.shape[0]}, out_features={self.weight.shape[1]}, context_features={contexts}"


class Unitwise(Structured):
    """What happens to each unit by itself as a layer reads it: y = x * weight + bias, or y = x, before an activation.

    Args:
        units: number of units.
        affine: whether there are weight and bias, as a batch norm in evaluation mode leaves them.

    Raises:
        ValueError: units is no whole number of at least 1.
    """

    def __init__(self, units: int, *, affine: bool = False) -> None:
        super().__init__()
        units = parse_count("units", units)
        self.register_buffer("visible", torch.arange(1, units + 1, dtype=torch.int32), persistent=False)
        if affine:
            self.weight, self.bias = nn.Parameter(torch.ones(units)), nn.Parameter(torch.zeros(units))
        else:  # empty, which is how the op is told
            self.register_buffer("weight", torch.empty(0), persistent=False)
            self.register_buffer("bias", torch.empty(0), persistent=False)

    def _changed(self) -> Iterator[str]:
        if not self.visible.is_meta and not torch.equal(self.visible.cpu(), torch.arange(1, len(self.visible) + 1, dtype=torch.int32)):
            yield "visible"

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self._make_anew()
        return self

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._make_anew(loaded=True)

    def _make_anew(self, *, loaded: bool = False) -> None:
        """No state dict holds these buffers, so they survive to_empty and averages; what is loaded may bring data to the meta device."""
        for name in self._non_persistent_buffers_set:
            buffer = self._buffers[name]
            device = "cpu" if loaded and buffer.is_meta else buffer.device
            units = torch.arange(1, len(buffer) + 1, device=device)
            self._buffers[name] = units.to(torch.int32 if name == "visible" else buffer.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias if self.weight.numel() else x

    def extra_repr(self) -> str:
        return f"units={len(self.visible)}, affine={bool(self.weight.numel())}"
