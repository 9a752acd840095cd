"""The joined Glow step in plain PyTorch, and its vector-Jacobian product."""

import torch
from torch import Tensor

from ..coupling.part import Part
from ..coupling.reference import Coupling, coupling_backward_reference, coupling_reference
from ..scale_map import Form, ScaleMap


def glow_step_reference(
    x: Tensor, raw: Tensor | None, weight: Tensor | None, bias: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, log|det| of the coupling, and the first half of y's channels; x and raw are [batch, *sites, channels]."""
    h, logabsdet = _couple(x, raw, inverse)
    y = h if weight is None else h @ weight.mT - bias if inverse else (h + bias) @ weight.mT
    return y, logabsdet, y[..., : y.shape[-1] // 2].clone()


def glow_step_backward_reference(
    dy: Tensor,
    dlogabsdet: Tensor,
    dpassing: Tensor | None,
    x: Tensor,
    raw: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to x, raw, weight and bias."""
    if dpassing is not None:
        dy = dy + torch.nn.functional.pad(dpassing, (0, dpassing.shape[-1]))
    dh, dweight, dbias = dy, None, None
    if weight is not None:
        h, _ = _couple(x, raw, inverse)
        dh = dy @ weight
        sites = tuple(range(dy.dim() - 1))
        dbias = -dy.sum(sites) if inverse else dh.sum(sites)
        dweight = dy.flatten(0, -2).mT @ (h if inverse else h + bias).flatten(0, -2)
    if raw is None:
        return dh, None, dweight, dbias
    dh, x, raw = (t.movedim(-1, 1) for t in (dh, x, raw))
    dx, dshift, ds, _ = coupling_backward_reference(dh, dlogabsdet, x, raw[:, 0::2], raw[:, 1::2], None, _options(inverse), False)
    draw = torch.stack([dshift, ds], 2).flatten(1, 2)
    return dx.movedim(1, -1), draw.movedim(1, -1), dweight, dbias


def _options(inverse: bool) -> Coupling:
    return Coupling(Part.SECOND_HALF, ScaleMap.sigmoid(bias=2.0), Form.SHIFT_SCALE, inverse)


def _couple(x: Tensor, raw: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    if raw is None:
        return x, x.new_zeros(x.shape[:1])
    x, raw = x.movedim(-1, 1), raw.movedim(-1, 1)
    h, logabsdet = coupling_reference(x, raw[:, 0::2], raw[:, 1::2], None, _options(inverse))
    return h.movedim(1, -1), logabsdet
