"""Layers of other libraries, as tests take them over."""


def nflows_layer(**settings):
    from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform

    return MaskedAffineAutoregressiveTransform(**({"features": 3, "hidden_features": 8} | settings))


def zuko_layer(**settings):
    from zuko.flows import MaskedAutoregressiveTransform

    return MaskedAutoregressiveTransform(**({"features": 4, "hidden_features": (8, 8)} | settings))
