"""Affine and additive coupling in plain PyTorch, and its vector-Jacobian product."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._differentiation import as_dtype
from ..scale_map import Form, PoweredMap, ScaleMap, apply_form, invert_form
from .part import Part


class Coupling(NamedTuple):
    """What is fixed about a coupling: its options."""

    part: Part
    scale: ScaleMap
    form: Form
    inverse: bool


def coupling_reference(
    x: Tensor, shift: Tensor, raw_scale: Tensor | None, scale_parameter: Tensor | None, options: Coupling
) -> tuple[Tensor, Tensor]:
    """The transformed part through the affine form, the rest as it is; and log|det| per sample.

    Computed in float32 for half precision; scale_parameter is [1] or [transformed channels].
    """
    part, _, form, inverse = options
    mask, old, shift, s, scale = _prepare(x, shift, raw_scale, scale_parameter, options)
    if s is None:
        return part.replace(x, _add(old, shift, form, inverse).to(x.dtype)), old.new_zeros(x.shape[:1])
    new, log = (invert_form if inverse else apply_form)(form, old, shift, s, scale)
    if mask is not None:
        log = torch.where(mask, log, 0)
    return part.replace(x, as_dtype(new, x.dtype)), log.flatten(1).sum(1)


def coupling_backward_reference(
    dy: Tensor,
    dlogabsdet: Tensor,
    kept: Tensor,
    shift: Tensor,
    raw_scale: Tensor,
    scale_parameter: Tensor | None,
    options: Coupling,
    from_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients to x, shift, raw_scale and scale_parameter, from the kept input or the kept output.

    With v the factor (sigma, or 1 / sigma where the form or the inverse divides) and m = (log v)':

        new = v old + shift        dold = v dnew    dshift =    dnew      draw = m (dnew (new - shift) + dlogabsdet)
        new = v (old + shift)      dold = v dnew    dshift =  v dnew      draw = m (dnew new + dlogabsdet)
        gate: new = v old + (1 - v) shift           dshift = (1 - v) dnew draw = m (dnew (new - shift) + dlogabsdet)

    (shift with the opposite sign for two of the four directions). With log v = +-a t(s), da = +-t(s) times what m multiplies.
    """
    part, _, form, inverse = options
    mask, kept_part, shift_, s, scale = _prepare(kept, shift, raw_scale, scale_parameter, options)
    dnew = part.transformed(dy).to(kept_part.dtype)
    if mask is not None:
        dnew = torch.where(mask, dnew, 0)
    c = dlogabsdet.to(dnew.dtype).view(-1, *[1] * (dnew.dim() - 1))
    if mask is not None:
        c = torch.where(mask, c, 0)

    divides = (form == Form.DIVIDE) != inverse
    value, dlog = (scale.reciprocal(s), scale.dlog_reciprocal(s)) if divides else (scale.sigma(s), scale.dlog_sigma(s))
    dold = dnew * value
    if form == Form.GATE:
        complement = scale.complement(s)
        if not inverse:
            dshift, along = dnew * complement, dnew * (kept_part - shift_ if from_output else value * (kept_part - shift_))
        else:
            new = kept_part if from_output else (kept_part - complement * shift_) * value
            dshift = -dold * complement
            # 1 - sigma varies too; its sigma is not 1 / v where exp_half limits
            along = dnew * new
            extra = dold * shift_ * (scale.sigma(s) * scale.dlog_sigma(s))
    elif (form == Form.SCALE_SHIFT and not inverse) or (form == Form.DIVIDE and inverse):
        dshift, along = dnew, dnew * (kept_part - shift_ if from_output else kept_part * value)
    elif form == Form.SHIFT_SCALE and inverse:
        dshift, along = -dnew, dnew * (kept_part + shift_ if from_output else kept_part * value)
    else:
        sign = 1 if form == Form.SHIFT_SCALE else -1
        dshift, along = sign * dold, dnew * (kept_part if from_output else (kept_part + sign * shift_) * value)
    draw = dlog * (along + c)
    if form == Form.GATE and inverse:
        draw = draw + extra

    dscale_parameter = None
    if scale_parameter is not None:
        base = options.scale.log_sigma(s)
        terms = (-base if divides else base) * (along + c)
        if form == Form.GATE and inverse:
            terms = terms + dold * shift_ * scale.sigma(s) * base
        per_channel = terms.sum([0, *range(2, terms.dim())])
        dscale_parameter = (per_channel if scale_parameter.numel() == len(per_channel) else per_channel.sum()).to(scale_parameter.dtype)
        dscale_parameter = dscale_parameter.view_as(scale_parameter)
    if mask is not None:
        dshift, draw = torch.where(mask, dshift, 0), torch.where(mask, draw, 0)
    return part.replace(dy, as_dtype(dold, dy.dtype)), as_dtype(dshift, shift.dtype), as_dtype(draw, raw_scale.dtype), dscale_parameter


def _prepare(x: Tensor, shift: Tensor, raw_scale: Tensor | None, scale_parameter: Tensor | None, options: Coupling):
    """The mask of a checkerboard, what is transformed, shift and raw scale, in the dtype of computation, and the scale map."""
    compute = torch.promote_types(x.dtype, torch.float32)
    part, scale, *_ = options
    old, shift = part.transformed(x).to(compute), shift.to(compute)
    s = None if raw_scale is None else raw_scale.to(compute)
    mask = part.mask(x) if part.is_checkerboard else None
    if mask is not None:  # whatever stands at untouched sites must not reach a gradient, as 0 * inf would
        shift, s = torch.where(mask, shift, 0), None if s is None else torch.where(mask, s, 0)
    if scale_parameter is not None:
        scale = PoweredMap(scale, scale_parameter.to(compute).view(1, -1, *[1] * (x.dim() - 2)))
    return mask, old, shift, s, scale


def _add(old: Tensor, shift: Tensor, form: Form, inverse: bool) -> Tensor:
    return old - shift if (form == Form.DIVIDE) != inverse else old + shift
