"""The masked autoregressive layer: MAF's in its parallel direction, IAF's in the other."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops import Conditioner, ScaleMap, autoregressive, check_conditioner
from ..ops.activation import Activation, parse_activation
from ..ops.degrees import hidden_degrees, staircase
from ..ops.scale_map import parse_form
from .masked_linear import MaskedLinear


class MaskedAutoregressive(nn.Module):
    """Affine autoregressive transform with a MADE as its conditioner (Papamakarios et al. 2017; Germain et al. 2015).

        forward:  z_i = x_i * sigma(s_i) + shift_i,   (shift_i, s_i) = MADE(x generated before i, context)
        inverse:  x_i = (z_i - shift_i) / sigma(s_i), in the order of generation, in one fused loop

    Args:
        features: number of features D.
        hidden_features: widths of the hidden layers.
        context_features: width of the context; 0 for none. A context reaches every output, the first included.
        activation: "relu", "tanh", "elu", "gelu", "silu", "leaky_relu", "softplus", "sigmoid", or the torch function or module.
        residual: residual blocks; not in this version.
        scale: scale map; `ScaleMap.softclip()` by default.
        form: affine form; see `ops.autoregressive`.
        order: "ascending", "descending", or a permutation whose k-th entry is the feature generated k-th.
        degrees: rule of the hidden degrees: "even", "cycling" (as other libraries count) or "random".

    Shape:
        x, z: [batch, features]; context: [batch, context_features]; logabsdet: [batch], in nats.
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (512, 512),
        *,
        context_features: int = 0,
        activation: str | Callable = "relu",
        residual: bool = False,
        scale: ScaleMap | None = None,
        form: str = "scale_shift",
        order: str | Sequence[int] | Tensor = "ascending",
        degrees: str = "even",
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1; got {features}")
        if not hidden_features or min(hidden_features) < 1:
            raise ValueError(f"hidden_features must be widths of at least 1; got {tuple(hidden_features)}")
        if context_features < 0:
            raise ValueError(f"context_features must be at least 0; got {context_features}")
        if residual:
            raise NotImplementedError("residual=True is not in this version; use residual=False")
        self.features = features
        self.context_features = context_features
        self.activation = parse_activation(activation)
        self.scale = ScaleMap.softclip() if scale is None else scale
        self.form = parse_form(form)
        self.register_buffer("order", parse_order(order, features))

        below, widths, layers = torch.arange(1, features + 1), tuple(hidden_features), []
        for units in widths:
            above = hidden_degrees(units, features, rule=degrees, context=context_features > 0)
            layers.append(MaskedLinear(staircase(below, above, strict=False), len(below), context_features=context_features))
            below = above
        outputs = torch.arange(1, features + 1).repeat_interleave(2)
        layers.append(MaskedLinear(staircase(below, outputs, strict=True), len(below), context_features=context_features))
        self.layers = nn.ModuleList(layers)
        self._activations = [int(self.activation)] * len(widths) + [int(Activation.IDENTITY)]
        check_conditioner(self.conditioner())

    def conditioner(self) -> Conditioner:
        """The network as the op takes it."""
        # from the dictionaries: attribute access on modules costs half a microsecond each, and small flows are made of microseconds
        modules = self._modules["layers"]._modules.values()
        stores = [m._parameters for m in modules]
        try:
            weights, biases = [s["weight"] for s in stores], [s["bias"] for s in stores]
            context_weights = [s["context_weight"] for s in stores] if self.context_features else []
        except KeyError:  # a parametrization computes one of them
            weights, biases = [m.weight for m in modules], [m.bias for m in modules]
            context_weights = [m.context_weight for m in modules] if self.context_features else []
        visible = [m._buffers["visible"] for m in modules]
        return Conditioner(weights, biases, visible, self._activations, context_weights, self._buffers["order"])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return autoregressive(x, self.conditioner(), context, scale=self.scale, form=self.form)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return autoregressive(z, self.conditioner(), context, scale=self.scale, form=self.form, inverse=True)

    def extra_repr(self) -> str:
        return f"features={self.features}, context_features={self.context_features}, activation={self.activation.name.lower()}, " + (
            f"scale={self.scale!r}, form={self.form.name.lower()}"
        )


def parse_order(order: str | Sequence[int] | Tensor, features: int) -> Tensor:
    """Indices of the features in the order in which they are generated, int64 [features]."""
    if isinstance(order, str):
        if order not in ("ascending", "descending"):
            raise ValueError(f"order must be 'ascending', 'descending' or a permutation; got {order!r}")
        ascending = torch.arange(features)
        return ascending if order == "ascending" else ascending.flip(0)
    permutation = torch.as_tensor(order, dtype=torch.int64).clone()
    if permutation.shape != (features,) or permutation.sort().values.ne(torch.arange(features)).any():
        raise ValueError(f"order must be a permutation of 0..{features - 1}; got {permutation.tolist()}")
    return permutation
