"""The memory layout of what elementwise ops return: channels-last where their model is, and contiguous otherwise."""

import torch
from torch import Tensor


def memory_format_of(like: Tensor) -> torch.memory_format:
    """torch.channels_last or torch.channels_last_3d where `like` is that and not also contiguous; else torch.contiguous_format."""
    if not like.is_contiguous():
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
        if channels_last is not None and like.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format


def empty_in_layout_of(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=memory_format_of(like))


def in_layout_of(like: Tensor, t: Tensor) -> Tensor:
    return t.contiguous(memory_format=memory_format_of(like))
