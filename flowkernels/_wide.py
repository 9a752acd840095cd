"""float64 for what deserves it, sums over many rows and matrices to be inverted, on devices that have it."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no wider one."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def wide(t: Tensor) -> Tensor:
    """t in the widest dtype of its device."""
    return t.to(wide_dtype(t.device))
