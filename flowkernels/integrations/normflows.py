"""Layers of normflows (1.7), taken over."""

from torch import Tensor, nn

from ..layers import MaskedAutoregressive
from ..ops import ScaleMap
from ..ops.activation import Activation
from .foreign import check_same, conditioner_of
from .made import made_layers


def from_normflows(module: nn.Module) -> MaskedAutoregressive:
    """The layer that computes what a normflows flow computes, from copies of its parameters.

    z = x * (sigmoid(s + 2) + 1e-3) + shift. Both directions are those of the module: normflows' own models use its forward direction
    from noise to data, so in a `flows.Flow`, whose layers go from data to noise, it stands as `layers.Inverse(layer)`.

    Args:
        module: a `MaskedAffineAutoregressive`, or a `MADE` with two outputs a feature, as that flow has one.

    Raises:
        TypeError: module is neither of the two.
        ValueError: its masks are not autoregressive, its activation is none that the kernels know, it preprocesses its inputs, or it is
            in training mode with batch norm or dropout; the message says which module. Or it computes something else on rows of noise,
            as a subclass may.
    """
    from normflows.flows import MaskedAffineAutoregressive
    from normflows.nets.made import MADE

    made = module.autoregressive_net if isinstance(module, MaskedAffineAutoregressive) else module
    if not isinstance(made, MADE):
        raise TypeError(f"module must be a normflows MaskedAffineAutoregressive or MADE; got {type(module).__name__}")
    features, outputs = made.initial_layer.in_features, made.final_layer.out_features
    if outputs != 2 * features:
        raise ValueError(f"the MADE must have output_multiplier 2, scale and shift of each feature; got {outputs // features}")
    if not isinstance(made.preprocessing, nn.Identity):
        raise ValueError(f"preprocessing must be None; got {made.preprocessing}. Put it into a layer of its own before this one")
    layers = made_layers(made, first=Activation.IDENTITY, first_context=Activation.IDENTITY, gate=True)
    scale = ScaleMap.sigmoid(bias=2.0, floor=1e-3)
    layer = MaskedAutoregressive.of(conditioner_of(layers, scale_first=True), scale=scale).train(module.training)

    def map_of_made(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raw_scale, shift = made(x, context).unflatten(1, (-1, 2)).unbind(2)
        sigma = (raw_scale + 2).sigmoid() + 1e-3
        return x * sigma + shift, sigma.log().sum(1)

    check_same(layer, map_of_made if made is module else module, module)
    return layer
