"""The masked autoregressive layer: MAF's in its parallel direction, IAF's in the other."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops import Conditioner, Map, MaskedLayer, ScaleMap, autoregressive, check_conditioner
from ..ops.activation import Activation, parse_activation
from ..ops.degrees import check_rule, hidden_degrees, staircase
from ..ops.scale_map import Form, parse_form, parse_scale
from ._building import built_on_cpu
from ._programs import KeepsPrograms, Step
from ._sizes import parse_context_features, parse_count, parse_widths
from ._structure import Structured
from .masked_linear import MaskedLinear, Unitwise

# Shift and raw scale begin at so much of what nn.Linear would give: a new layer is near its form with both at zero, and a flow of several
# near standard noise. From there training reaches a better likelihood: measured on digits, and on made tables of 16 and 43 features.
INITIAL_OUTPUTS = 0.1


class MaskedAutoregressive(KeepsPrograms, Structured):
    """Affine autoregressive transform with a MADE as its conditioner (Papamakarios et al. 2017; Germain et al. 2015).

        forward:  z_i = x_i * sigma(s_i) + shift_i,   (shift_i, s_i) = MADE(x generated before i, context)
        inverse:  x_i = (z_i - shift_i) / sigma(s_i), in the order of generation, in one fused loop

    The modules in `layers` hold the parameters and are not called: what makes their weights works (torch.nn.utils.parametrizations,
    torch.nn.utils.prune), other hooks of theirs do not. Weights that a mask hides are zeros, so `weight_norm` must be that of a whole
    matrix, dim=None: the norm of a row or column that nobody sees is 0, by which it divides. A new layer is near the identity.

    Args:
        features: number of features D.
        hidden_features: widths of the hidden layers; with `residual`, the width of each residual block, all of them equal.
        context_features: width of the context; 0 for none.
        activation: "relu", "tanh", "elu", "gelu", "silu", "leaky_relu", "softplus", "sigmoid", or the torch function or module.
        residual: after a first masked layer, residual blocks h + W2 act(W1 act(h) + context term), as in the residual MADE of
            neural spline flows (Durkan et al. 2019, appendix B); the second layer of each block starts near zero.
        scale: scale map; `ScaleMap.softclip()` by default.
        form: affine form; see `ops.autoregressive`.
        order: "ascending", "descending", or a permutation whose k-th entry is the feature generated k-th.
        degrees: rule of the hidden degrees: "even", "cycling" (as other libraries count) or "random".
        context_rule: which outputs the context reaches. "every_output", by hidden units that see no feature and by a term in the
            output layer; or the old rule, "all_but_first", as in MAF's own code, nflows and normflows: hidden degrees begin at 1
            and the output layer takes no context, so that the distribution of the first generated feature ignores it.

    Shape:
        x, z: [batch, features]; context: [batch, context_features]; logabsdet: [batch], in nats.

    Raises:
        ValueError: a size, name or permutation is none of these; or, of a call, a shape, dtype or device does not fit.
    """

    map_settings = ("scale", "form")

    @built_on_cpu
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
        context_rule: str = "every_output",
    ) -> None:
        super().__init__()
        widths = parse_widths(hidden_features)
        features = parse_count("features", features)
        if residual and len(set(widths)) > 1:
            raise ValueError(f"hidden_features must all be equal with residual=True; got {widths}")
        context_features = parse_context_features(context_features)
        if context_rule not in ("every_output", "all_but_first"):
            raise ValueError(f"context_rule must be 'every_output' or 'all_but_first'; got {context_rule!r}")
        check_rule("degrees", degrees)
        every_output = context_features > 0 and context_rule == "every_output"
        code = parse_activation(activation)
        draw = lambda units: hidden_degrees(units, features, rule=degrees, context=every_output)
        inputs = torch.arange(1, features + 1)
        build = _residual_network if residual else _plain_network
        modules, layers, below = build(inputs, widths, context_features, code, draw)
        last = MaskedLinear(
            staircase(below, inputs.repeat_interleave(2), strict=True),
            len(below),
            context_features=context_features if every_output else 0,
        )
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.mul_(INITIAL_OUTPUTS)
        modules.append(last)
        layers.append(_layer(last))
        self._assemble(modules, Conditioner.of(layers, parse_order(order, features)), scale, form)

    @classmethod
    def of(cls, conditioner: Conditioner, *, scale: ScaleMap | None = None, form: str = "scale_shift") -> "MaskedAutoregressive":
        """The layer of a given network, whose tensors are copied into its parameters; so are other libraries' networks taken over.

        Raises:
            ValueError: the network is not autoregressive; see `ops.check_conditioner`.
        """
        check_conditioner(conditioner, parse_scale(scale))
        last = conditioner.weights[-1]
        if conditioner.order is None:
            conditioner = conditioner._replace(order=torch.arange(last.shape[1] // 2, device=last.device))
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._assemble([_module(part) for part in conditioner.layers], conditioner, scale, form)
        return layer

    def _assemble(self, modules: list[nn.Module], network: Conditioner, scale: ScaleMap | None, form: str) -> None:
        self.scale = parse_scale(scale)
        check_conditioner(network, self.scale)
        self.features = len(network.order)
        self.context_features = network.context_weights[0].shape[0] if network.context_weights else 0
        self.form = parse_form(form)
        self.register_integers("order", network.order)
        self.layers = nn.ModuleList(modules)
        self._activations, self._wiring = network.activations, network.wiring
        self._contexts = [i for i, m in enumerate(modules) if getattr(m, "context_weight", None) is not None]
        self._context_biases = bool(network.context_biases)

    def conditioner(self) -> Conditioner:
        """The network as the op takes it."""
        # from the dictionaries: attribute access on modules costs half a microsecond each, and small flows are made of microseconds
        modules = self._modules["layers"]._modules.values()
        stores = [m._parameters or m._buffers for m in modules]  # a unitwise layer may have no parameters
        contexts, context_biases = [], []
        try:
            weights, biases = [s["weight"] for s in stores], [s["bias"] for s in stores]
            if self.context_features:
                contexts = [stores[i]["context_weight"] for i in self._contexts]
                context_biases = [stores[i]["context_bias"] for i in self._contexts] if self._context_biases else []
        except KeyError:  # a parametrization computes one of them, or a hook
            modules = list(modules)
            _make_weights(modules)
            weights, biases = [m.weight for m in modules], [m.bias for m in modules]
            contexts = [modules[i].context_weight for i in self._contexts]
            context_biases = [modules[i].context_bias for i in self._contexts] if self._context_biases else []
        visible = [m._buffers["visible"] for m in modules]
        return Conditioner(weights, biases, visible, self._activations, contexts, self._buffers["order"], self._wiring, context_biases)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, inverse=True)

    def _by_modules(self, x: Tensor, context: Tensor | None, *, inverse: bool, steps: list[Step] | None) -> tuple[Tensor, Tensor]:
        conditioner = self.conditioner()
        if steps is not None:
            whole = type(self) is MaskedAutoregressive and isinstance(self.form, Form) and isinstance(self.scale, ScaleMap)
            steps.append(Step([self], [Map(conditioner, self.scale, self.form, inverse)]) if whole else Step())
        return autoregressive(x, conditioner, context, scale=self.scale, form=self.form, inverse=inverse)

    def extra_repr(self) -> str:
        activations = [Activation(a).name.lower() for a in dict.fromkeys(self._activations[:-1])]
        return f"features={self.features}, context_features={self.context_features}, activation={'/'.join(activations) or None}, " + (
            f"scale={self.scale!r}, form={self.form.name.lower()}"
        )


_Network = tuple[list[nn.Module], list[MaskedLayer], Tensor]  # the hidden layers, and the degrees of what the output layer reads


def _plain_network(inputs: Tensor, widths: Sequence[int], context_features: int, activation: Activation, draw: Callable) -> _Network:
    below, modules = inputs, []
    for units in widths:
        above = draw(units)
        modules.append(MaskedLinear(staircase(below, above, strict=False), len(below), context_features=context_features))
        below = above
    return modules, [_layer(m, activation=activation) for m in modules], below


def _residual_network(inputs: Tensor, widths: Sequence[int], context_features: int, activation: Activation, draw: Callable) -> _Network:
    degrees = draw(widths[0])  # one for all: a sum must not see more than its unit may
    inner = staircase(degrees, degrees, strict=False)
    modules = [MaskedLinear(staircase(inputs, degrees, strict=False), len(inputs), context_features=context_features)]
    layers = [_layer(modules[0])]
    for units in widths:
        stream = len(layers)
        first = MaskedLinear(inner, units, context_features=context_features)
        second = MaskedLinear(inner, units)
        with torch.no_grad():  # a block starts near the identity, as in nflows
            for parameter in second.parameters():
                parameter.mul_(1e-3)
        read = Unitwise(units)
        modules += [read, first, second]
        layers += [_layer(read, activation=activation), _layer(first, activation=activation), _layer(second, residual=stream)]
    return modules, layers, degrees


def _make_weights(modules: Sequence[nn.Module]) -> None:
    """What torch's pruning and the older weight and spectral norms do before a module is called."""
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if hasattr(hook, "apply_mask") or hasattr(hook, "compute_weight"):
                hook(module, ())


def _layer(module: nn.Module, **wiring) -> MaskedLayer:
    context_weight = getattr(module, "context_weight", None)
    return MaskedLayer(module.weight, module.bias, module.visible, context_weight=context_weight, **wiring)


def _module(layer: MaskedLayer) -> nn.Module:
    """A module with copies of a layer's tensors as its parameters."""
    units, like = len(layer.visible), layer.visible if layer.weight is None else layer.weight
    if layer.unitwise:
        module = Unitwise(units, affine=layer.weight is not None)
    else:
        contexts = 0 if layer.context_weight is None else layer.context_weight.shape[0]
        module = MaskedLinear(layer.visible, layer.weight.shape[0], context_features=contexts, context_bias=layer.context_bias is not None)
    module = module.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(getattr(layer, name))
    return module


def parse_order(order: str | Sequence[int] | Tensor, features: int, name: str = "order") -> Tensor:
    """Indices of the features in the order in which they are generated, int64 [features]."""
    if isinstance(order, str):
        if order not in ("ascending", "descending"):
            raise ValueError(f"{name} must be 'ascending', 'descending' or a permutation; got {order!r}")
        ascending = torch.arange(features)
        return ascending if order == "ascending" else ascending.flip(0)
    given = torch.as_tensor(order)
    if given.dim() != 1 or sorted(given.tolist()) != list(range(features)):
        raise ValueError(f"{name} must be a permutation of 0..{features - 1}; got {given.tolist()}")
    return given.to(torch.int64, copy=True)
