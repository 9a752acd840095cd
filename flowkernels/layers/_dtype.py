"""The dtype that networks of torch's own products take."""

import torch
from torch import Tensor

from .._torch import any_autocast


def check_dtype(parameter: Tensor, **tensors: Tensor | None) -> None:
    """Tensors by the names of their arguments: each must have the parameter's dtype, unless autocast casts both.

    Raises:
        ValueError: one has another.
    """
    for name, t in tensors.items():
        if t is not None and t.dtype != parameter.dtype and not _casts(t, parameter):
            raise ValueError(f"{name} must be {parameter.dtype}, like the parameters, or be cast by torch.autocast; got {t.dtype}")


def _casts(*tensors: Tensor) -> bool:
    """Whether autocast gives them one dtype: float64 it leaves as it is."""
    device = tensors[0].device.type
    if not any_autocast() or device == "meta" or torch.float64 in [t.dtype for t in tensors]:
        return False
    return torch.is_autocast_enabled(device)
