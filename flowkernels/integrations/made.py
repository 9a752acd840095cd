"""The MADE of nflows, which normflows took up and changed: the same modules, other functions."""

from torch import Tensor, nn

from ..ops.activation import Activation, parse_activation
from .foreign import ForeignLayer, batch_norm_affine, check_dropout


def made_layers(made: nn.Module, *, first: Activation, first_context: Activation, gate: bool) -> list[ForeignLayer]:
    """The layers of a MADE, plain or with residual blocks.

    first: activation after the first layer. first_context: activation of the context term of that layer.
    gate: whether the context gates the end of each residual block, or is added inside it.
    """
    layers = [_linear("initial_layer", made.initial_layer, activation=first, context_activation=first_context, **_context(made))]
    for number, block in enumerate(made.blocks):
        name = f"blocks.{number}"
        check_dropout(block.dropout, f"{name}.dropout")
        if hasattr(block, "linear_layers"):
            layers += _residual_block(name, block, len(layers), gate)
        else:
            layers.append(_feedforward_block(name, block))
    return [*layers, _linear("final_layer", made.final_layer)]


def _linear(name: str, linear: nn.Module, **more) -> ForeignLayer:
    return ForeignLayer(name, linear.weight.detach(), linear.bias.detach(), linear.mask.bool(), **more)


def _context(module: nn.Module) -> dict[str, Tensor]:
    layer = getattr(module, "context_layer", None)
    return {} if layer is None else {"context_weight": layer.weight.detach(), "context_bias": layer.bias.detach()}


def _feedforward_block(name: str, block: nn.Module) -> ForeignLayer:
    """activation(W batch_norm(h) + b)"""
    layer = _linear(f"{name}.linear", block.linear, activation=parse_activation(block.activation))
    if block.batch_norm is None:
        return layer
    factor, summand = batch_norm_affine(block.batch_norm, f"{name}.batch_norm")
    return layer._replace(weight=layer.weight * factor, bias=layer.bias + (layer.weight * layer.mask) @ summand)


def _residual_block(name: str, block: nn.Module, stream: int, gate: bool) -> list[ForeignLayer]:
    """h + gated(W2 activation(batch_norm(W1 activation(batch_norm(h)) + b1 + added context)) + b2)"""
    activation, context = parse_activation(block.activation), _context(block)
    read = ForeignLayer(f"{name} reads", None, None, None, activation)
    first = _linear(f"{name}.linear_layers.0", block.linear_layers[0], activation=activation, **({} if gate else context))
    second = _linear(f"{name}.linear_layers.1", block.linear_layers[1], residual=stream)
    if gate and context:
        second = second._replace(gate=True, context_activation=Activation.SIGMOID, **context)
    if block.use_batch_norm:
        before, between = (batch_norm_affine(m, f"{name}.batch_norm_layers.{i}") for i, m in enumerate(block.batch_norm_layers))
        read = read._replace(weight=before[0], bias=before[1])
        first = _scaled(first, *between)
    return [read, first, second]


def _scaled(layer: ForeignLayer, factor: Tensor, summand: Tensor) -> ForeignLayer:
    """The layer with its outputs, before the activation, times a factor plus a summand."""
    layer = layer._replace(weight=layer.weight * factor[:, None], bias=layer.bias * factor + summand)
    if layer.context_weight is None:
        return layer
    return layer._replace(context_weight=layer.context_weight * factor[:, None], context_bias=layer.context_bias * factor)
