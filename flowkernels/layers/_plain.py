"""Whether a module may be computed without being called: what somebody changed or watches has to be called."""

from torch import nn


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the layer does what its class says, and nothing more: neither a subclass, nor hooks, nor methods of its own."""
    if type(layer) is not kind or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if layer._backward_hooks or layer._backward_pre_hooks:
        return False
    return not ("forward" in layer.__dict__ or "inverse" in layer.__dict__)
