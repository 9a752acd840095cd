"""The dtype that networks of torch's own products take."""

import torch
from torch import Tensor


def check_dtype(parameter: Tensor, **tensors: Tensor | None) -> None:
    """Tensors by the names of their arguments: each must have the parameter's dtype, unless autocast casts both.

    Raises:
        ValueError: one has another.
    """
    for name, t in tensors.items():
        if t is not None and t.dtype != parameter.dtype and not torch.is_autocast_enabled(t.device.type):
            raise ValueError(f"{name} must be {parameter.dtype}, like the parameters, or be cast by torch.autocast; got {t.dtype}")
