"""Masked linear map and its two gradients in plain PyTorch. `visible` ascends: column j of the weight sees the first visible[j] inputs."""

import torch
from torch import Tensor

from ..._torch import dispatch_mode, is_wrapped
from .._autocast import autocast_off
from .._differentiation import as_dtype


def staircase_mask(visible: Tensor, inputs: int) -> Tensor:
    """mask[k, j] = 1 where output j sees input k; [inputs, outputs]."""
    return torch.arange(inputs, device=visible.device)[:, None] < visible


@autocast_off
def masked_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor) -> Tensor:
    """y[:, j] = bias[j] + sum_{k < visible[j]} x[:, k] * weight[k, j]; half precision is computed in float32 and rounded once."""
    inputs, dtype = weight.shape[0], x.dtype
    if dtype.itemsize == 2:
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    finite = torch.isfinite(x)
    y = torch.where(finite, x, 0) @ torch.where(staircase_mask(visible, inputs), weight, 0)
    if bias is not None:
        y = y + bias
    # a dense product would let an unseen infinity in as 0 * inf = NaN; here it reaches only the outputs that see it
    if inputs:
        first_bad = torch.where(finite.all(-1), inputs, finite.to(torch.int32).argmin(-1))
        y = torch.where(visible > first_bad[..., None], torch.nan, y)
    return as_dtype(y, dtype)


@autocast_off
def masked_linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor) -> Tensor:
    """The same by one dense product, for x without infinities and NaN: of a row that holds one, all outputs may be NaN. Torch's graph of it
    is a third of the reference's."""
    if not sees_all(visible, weight.shape[0]):
        weight = torch.where(staircase_mask(visible, weight.shape[0]), weight, 0)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def sees_all(visible: Tensor, inputs: int) -> bool:
    """Whether the first output, and so each, sees all inputs; False where asking would make a GPU wait, or somebody records the ops."""
    if torch.compiler.is_compiling() or type(visible) is not Tensor or is_wrapped(visible) or dispatch_mode() is not None:
        return False
    if not (visible.is_cpu and len(visible)):
        return False
    return visible[0].item() == inputs


@autocast_off
def masked_linear_dx_reference(dy: Tensor, weight: Tensor, visible: Tensor) -> Tensor:
    """dx[:, k] = sum_{j: visible[j] > k} dy[:, j] * weight[k, j]."""
    inputs, outputs = weight.shape
    finite = torch.isfinite(dy)
    dx = torch.where(finite, dy, 0) @ torch.where(staircase_mask(visible, inputs), weight, 0).T
    if outputs:
        last_bad = outputs - 1 - finite.flip(-1).to(torch.int32).argmin(-1)
        reach = torch.where(finite.all(-1), 0, visible.to(torch.int64)[last_bad])
        dx = torch.where(torch.arange(inputs, device=dy.device) < reach[..., None], torch.nan, dx)
    return dx


@autocast_off
def masked_linear_dweight_reference(x: Tensor, dy: Tensor, visible: Tensor) -> Tensor:
    """dweight[k, j] = sum_b x[b, k] * dy[b, j] inside the staircase, 0 outside."""
    dweight = x.flatten(0, -2).T @ dy.flatten(0, -2)
    return torch.where(staircase_mask(visible, x.shape[-1]), dweight, 0)
