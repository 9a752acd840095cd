"""Layers of nflows (0.14), taken over."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import MaskedAutoregressive
from ..ops import ScaleMap
from ..ops.activation import Activation, parse_activation
from .foreign import check_same, conditioner_of
from .made import made_layers


def from_nflows(module: nn.Module) -> MaskedAutoregressive:
    """The layer that computes what an nflows transform computes, from copies of its parameters.

    z = x * (softplus(s) + 1e-3) + shift, data to noise in both libraries. The masks, plain or random, become staircases; batch norm in
    evaluation mode becomes part of the layers around it.

    Args:
        module: a `MaskedAffineAutoregressiveTransform`, or a `MADE` with two outputs a feature, as that transform has one.

    Raises:
        TypeError: module is neither of the two.
        ValueError: its masks are not autoregressive, its activation is none that the kernels know, or it is in training mode with batch
            norm or dropout; the message says which module. Or it computes something else on rows of noise, as a subclass may.
    """
    from nflows.transforms import MaskedAffineAutoregressiveTransform
    from nflows.transforms.made import MADE

    transform = module if isinstance(module, MaskedAffineAutoregressiveTransform) else None
    made = module if transform is None else transform.autoregressive_net
    if not isinstance(made, MADE):
        raise TypeError(f"module must be an nflows MaskedAffineAutoregressiveTransform or MADE; got {type(module).__name__}")
    features, outputs = made.initial_layer.in_features, made.final_layer.out_features
    if outputs != 2 * features:
        raise ValueError(f"the MADE must have output_multiplier 2, scale and shift of each feature; got {outputs // features}")
    # the context meets the first layer's sum behind the activation, which in feed-forward networks then acts on both
    activation = parse_activation(made.activation)
    first = Activation.IDENTITY if made.use_residual_blocks else activation
    layers = made_layers(made, first=first, first_context=activation, gate=False)
    floor = getattr(transform, "_epsilon", 1e-3)
    layer = MaskedAutoregressive.of(conditioner_of(layers, scale_first=True), scale=ScaleMap.softplus(floor=floor)).train(module.training)

    def map_of_made(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raw_scale, shift = made(x, context).unflatten(1, (-1, 2)).unbind(2)
        sigma = F.softplus(raw_scale) + floor
        return x * sigma + shift, sigma.log().sum(1)

    check_same(layer, map_of_made if transform is None else transform, module)
    return layer
