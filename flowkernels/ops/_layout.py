"""The memory layout of what elementwise ops return: channels-last where their model is, and contiguous otherwise."""

import torch
from torch import Tensor


def memory_format_of(like: Tensor) -> torch.memory_format:
    """Channels-last for images (and volumes) whose channels lie closer together than their sites, slices among them."""
    if like.dim() in (4, 5) and not like.is_contiguous() and like.shape[1] > 1:
        channel, *sites = like.stride()[1:]
        strides = [stride for stride, size in zip(sites, like.shape[2:], strict=True) if size > 1]
        if strides and 0 < channel < min(strides):
            return torch.channels_last if like.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def empty_in_layout_of(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=memory_format_of(like))


def in_layout_of(like: Tensor, t: Tensor) -> Tensor:
    return t.contiguous(memory_format=memory_format_of(like))
