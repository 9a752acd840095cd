"""Triton kernels of the coupling, forward and backward. Imported at the first launch, never at package import.

Both are bound by memory. With N elements of e bytes, half of them transformed, forward moves 3 N e (x, shift and raw scale in, y out;
a checkerboard's full-size nets make it 4 N e), backward 4 N e to 4.5 N e (dy, kept, raw scale and, for some forms, shift in; dx, dshift,
draw out). Forward with a sigmoid compiles to about 85 instructions per transformed element; a GPU with 4 TB/s has time for about 180 in
float32 and 90 in half precision (predicted; no GPU has run it).

With the factor v, which is sigma(s), or 1 / sigma(s) where the form or its inverse DIVIDES, and a shift that then counts negative:

    AFTER   new = old v + shift            scale_shift, and the inverses of shift_scale and divide
    GATE    new = old v + (1 - v) shift    and its inverse (old - (1 - sigma) shift) v
    else    new = (old + shift) v          shift_scale, divide, and the inverse of scale_shift
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import empty_in_layout_of
from ..scale_map import Form, ScaleMap
from ..scale_map_triton import Map, complement, dlog_scale, exp, log_sigma, scale_and_log
from ..tiles_triton import FLOATS, OPTIONS, Tiling, four_dimensional, offsets, strides, sum_segments, tree_sum
from .part import Part


@triton.jit
def _factor(s, a, MAP: tl.constexpr, DIVIDES: tl.constexpr, HAS_A: tl.constexpr):
    """v and log v; with a learned a, of the map sigma(s)^a."""
    if HAS_A:
        log = log_sigma(s, MAP) * a
        log = -log if DIVIDES else log
        v = exp(log)
    else:
        v, log = scale_and_log(s, MAP, DIVIDES)
    return v, log


@triton.jit
def _complement(s, a, MAP: tl.constexpr, HAS_A: tl.constexpr):
    """1 - sigma."""
    if HAS_A:
        c = 1.0 - exp(log_sigma(s, MAP) * a)
    else:
        c = complement(s, MAP)
    return c


@triton.jit
def _is_transformed(s, W, CHECKERBOARD: tl.constexpr):
    return ((s // W + s % W) % 2 == CHECKERBOARD)[None, None, :]


@triton.jit(do_not_specialize=["B"])
def _coupling_kernel(
    x_ptr, shift_ptr, raw_ptr, a_ptr, y_ptr, log_ptr, x_strides, shift_strides, raw_strides, y_strides, a_stride,
    B, sites, W, per_segment,
    T: tl.constexpr, T_FIRST: tl.constexpr, U: tl.constexpr, U_FIRST: tl.constexpr, STEP: tl.constexpr, CHECKERBOARD: tl.constexpr,
    MAP: tl.constexpr, DIVIDES: tl.constexpr, AFTER: tl.constexpr, GATE: tl.constexpr,
    AFFINE: tl.constexpr, HAS_A: tl.constexpr, LAYOUT: tl.constexpr, FLOAT: tl.constexpr,
    BB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, LOG2_TILE: tl.constexpr,
):  # fmt: skip
    # BB samples, one segment of their T transformed and U untouched channels; log-determinants go to [batch, segments]
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    tiles_s = tl.cdiv(sites, BS)
    tiles = tl.cdiv(tl.maximum(T, U), BC) * tiles_s
    first = tl.program_id(1) * per_segment
    total = tl.zeros((BB, BC, BS), FLOAT)
    for tile in range(first, tl.minimum(first + per_segment, tiles)):
        c = tile // tiles_s * BC + tl.arange(0, BC)
        s = tile % tiles_s * BS + tl.arange(0, BS)
        inside = ((b < B)[:, None] & (c < T)[None, :])[:, :, None] & (s < sites)[None, None, :]
        x_at = offsets(x_strides, b, c * STEP + T_FIRST, s, W, LAYOUT)
        old = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(FLOAT)
        shift = tl.load(shift_ptr + offsets(shift_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        shift = -shift if DIVIDES else shift
        if AFFINE:
            raw = tl.load(raw_ptr + offsets(raw_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
            a = tl.load(a_ptr + c.to(tl.int64) * a_stride, mask=c < T, other=0.0)[None, :, None] if HAS_A else 0.0
            v, log = _factor(raw, a, MAP, DIVIDES, HAS_A)
            counts = inside & _is_transformed(s, W, CHECKERBOARD) if CHECKERBOARD >= 0 else inside
            total += tl.where(counts, log, 0.0)
            if GATE:
                shift = shift * _complement(raw, a, MAP, HAS_A)
                new = (old + shift) * v if DIVIDES else old * v + shift
            elif AFTER:
                new = old * v + shift
            else:
                new = (old + shift) * v
        else:
            new = old + shift
        if CHECKERBOARD >= 0:
            new = tl.where(_is_transformed(s, W, CHECKERBOARD), new, old)
        y_at = offsets(y_strides, b, c * STEP + T_FIRST, s, W, LAYOUT)
        tl.store(y_ptr + y_at, new.to(y_ptr.dtype.element_ty), mask=inside)
        if CHECKERBOARD < 0:
            inside = ((b < B)[:, None] & (c < U)[None, :])[:, :, None] & (s < sites)[None, None, :]
            x = tl.load(x_ptr + offsets(x_strides, b, c * STEP + U_FIRST, s, W, LAYOUT), mask=inside)
            tl.store(y_ptr + offsets(y_strides, b, c * STEP + U_FIRST, s, W, LAYOUT), x, mask=inside)
    if AFFINE:
        logabsdet = tree_sum(tl.reshape(total, (BB, BC * BS)), BB, BC * BS, LOG2_TILE)
        tl.store(log_ptr + b * tl.num_programs(1) + tl.program_id(1), logabsdet, mask=b < B)


@triton.jit(do_not_specialize=["B"])
def _coupling_backward_kernel(
    dy_ptr, dlog_ptr, kept_ptr, shift_ptr, raw_ptr, a_ptr, dx_ptr, dshift_ptr, draw_ptr, da_ptr,
    dy_strides, dlog_stride, kept_strides, shift_strides, raw_strides, dx_strides, dshift_strides, draw_strides, a_stride,
    B, sites, W, per_segment,
    T: tl.constexpr, T_FIRST: tl.constexpr, U: tl.constexpr, U_FIRST: tl.constexpr, STEP: tl.constexpr, CHECKERBOARD: tl.constexpr,
    MAP: tl.constexpr, DIVIDES: tl.constexpr, AFTER: tl.constexpr, GATE: tl.constexpr,
    FROM_OUTPUT: tl.constexpr, HAS_A: tl.constexpr, LAYOUT: tl.constexpr, FLOAT: tl.constexpr,
    BB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    # the same tiles; gradients to a learned a go to [batch tiles, site tiles, T], each summed over one tile
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    tiles_s = tl.cdiv(sites, BS)
    tiles = tl.cdiv(tl.maximum(T, U), BC) * tiles_s
    first = tl.program_id(1) * per_segment
    dlogabsdet = tl.load(dlog_ptr + b * dlog_stride, mask=b < B, other=0.0)[:, None, None]
    for tile in range(first, tl.minimum(first + per_segment, tiles)):
        c = tile // tiles_s * BC + tl.arange(0, BC)
        s = tile % tiles_s * BS + tl.arange(0, BS)
        inside = ((b < B)[:, None] & (c < T)[None, :])[:, :, None] & (s < sites)[None, None, :]
        dnew = tl.load(dy_ptr + offsets(dy_strides, b, c * STEP + T_FIRST, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        kept = tl.load(kept_ptr + offsets(kept_strides, b, c * STEP + T_FIRST, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        shift = tl.load(shift_ptr + offsets(shift_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        raw = tl.load(raw_ptr + offsets(raw_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        a = tl.load(a_ptr + c.to(tl.int64) * a_stride, mask=c < T, other=0.0)[None, :, None] if HAS_A else 1.0
        shift = -shift if DIVIDES else shift
        v, _ = _factor(raw, a, MAP, DIVIDES, HAS_A)
        dold = dnew * v
        # along: the sum that the gradient of log v has beside dlogabsdet
        if GATE:
            rest = _complement(raw, a, MAP, HAS_A)
            if DIVIDES:
                dshift = dold * rest
                along = dnew * (kept if FROM_OUTPUT else (kept + rest * shift) * v)
            else:
                dshift = dnew * rest
                along = dnew * (kept - shift if FROM_OUTPUT else (kept - shift) * v)
        elif AFTER:
            dshift = dnew
            along = dnew * (kept - shift if FROM_OUTPUT else kept * v)
        else:
            dshift = dold
            along = dnew * (kept if FROM_OUTPUT else (kept + shift) * v)
        along += dlogabsdet
        draw = dlog_scale(raw, MAP, DIVIDES) * a * along
        base = log_sigma(raw, MAP)
        da = (-base if DIVIDES else base) * along
        if GATE and DIVIDES:  # 1 - sigma varies too, and 1 / v need not be sigma: exp_half limits it
            sigma, _ = _factor(raw, a, MAP, False, HAS_A)
            through = dold * -shift * sigma
            draw += through * (dlog_scale(raw, MAP, False) * a)
            da += through * base
        dshift = -dshift if DIVIDES else dshift
        counts = inside
        if CHECKERBOARD >= 0:
            here = _is_transformed(s, W, CHECKERBOARD)
            dold = tl.where(here, dold, dnew)
            dshift = tl.where(here, dshift, 0.0)
            draw = tl.where(here, draw, 0.0)
            counts = inside & here
        dx_at = offsets(dx_strides, b, c * STEP + T_FIRST, s, W, LAYOUT)
        tl.store(dx_ptr + dx_at, dold.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(dshift_ptr + offsets(dshift_strides, b, c, s, W, LAYOUT), dshift.to(dshift_ptr.dtype.element_ty), mask=inside)
        tl.store(draw_ptr + offsets(draw_strides, b, c, s, W, LAYOUT), draw.to(draw_ptr.dtype.element_ty), mask=inside)
        if HAS_A:
            da = tl.sum(tl.sum(tl.where(counts, da, 0.0), 2), 0)
            da_row = tl.program_id(0).to(tl.int64) * tiles_s + tile % tiles_s
            tl.store(da_ptr + da_row * T + c, da, mask=c < T)
        if CHECKERBOARD < 0:
            inside = ((b < B)[:, None] & (c < U)[None, :])[:, :, None] & (s < sites)[None, None, :]
            dy = tl.load(dy_ptr + offsets(dy_strides, b, c * STEP + U_FIRST, s, W, LAYOUT), mask=inside)
            tl.store(dx_ptr + offsets(dx_strides, b, c * STEP + U_FIRST, s, W, LAYOUT), dy, mask=inside)


def coupling_triton(
    x: Tensor, shift: Tensor, raw_scale: Tensor | None, scale_parameter: Tensor | None, *options: int | float | bool
) -> tuple[Tensor, Tensor]:
    y, compute = empty_in_layout_of(x), torch.promote_types(x.dtype, torch.float32)
    tiling, sizes, meta = _launch(x, *options)
    parts = None if raw_scale is None else x.new_empty((len(x), tiling.segments), dtype=compute)
    if y.numel():
        tensors = [four_dimensional(t) for t in (x, shift, shift if raw_scale is None else raw_scale, y)]
        all_strides = [strides(t) for t in tensors]
        _coupling_kernel[tiling.grid(len(x))](
            *tensors[:3], scale_parameter, tensors[3], parts, *all_strides, _stride(scale_parameter), *sizes, **meta,
            AFFINE=raw_scale is not None, HAS_A=scale_parameter is not None, LAYOUT=tiling.layout(x, all_strides),
            LOG2_TILE=(tiling.BC * tiling.BS).bit_length() - 1,
        )  # fmt: skip
    if parts is None:
        return y, x.new_zeros(len(x), dtype=compute)
    return y, parts.squeeze(1) if tiling.segments == 1 else sum_segments(parts)


def coupling_backward_triton(
    dy: Tensor, dlogabsdet: Tensor, kept: Tensor, shift: Tensor, raw_scale: Tensor, scale_parameter: Tensor | None,
    *options: int | float | bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *options, from_output = options
    dx, dshift, draw_scale = empty_in_layout_of(dy), empty_in_layout_of(shift), empty_in_layout_of(raw_scale)
    tiling, sizes, meta = _launch(kept, *options)
    parts = None
    if scale_parameter is not None:
        rows = triton.cdiv(len(dy), tiling.BB) * triton.cdiv(dy.shape[2:].numel(), tiling.BS)
        parts = scale_parameter.new_empty((rows, shift.shape[1]))
    if dx.numel():
        tensors = [four_dimensional(t) for t in (dy, kept, shift, raw_scale, dx, dshift, draw_scale)]
        dy_s, *all_strides = [strides(t) for t in tensors]
        _coupling_backward_kernel[tiling.grid(len(dy))](
            tensors[0], dlogabsdet, *tensors[1:4], scale_parameter, *tensors[4:], parts,
            dy_s, dlogabsdet.stride(0), *all_strides, _stride(scale_parameter), *sizes, **meta,
            FROM_OUTPUT=from_output, HAS_A=parts is not None, LAYOUT=tiling.layout(dy, [dy_s, *all_strides]),
        )  # fmt: skip
    if parts is None:
        return dx, dshift, draw_scale, shift.new_empty(0)
    da = parts.sum(0) if scale_parameter.numel() == parts.shape[1] else parts.sum()
    return dx, dshift, draw_scale, da.view_as(scale_parameter)


def _launch(
    x: Tensor, part: int, kind: int, p0: float, p1: float, form: int, inverse: bool
) -> tuple[Tiling, tuple[int, ...], dict[str, object]]:
    """The tiling, the sizes and the compile-time arguments that forward and backward share."""
    part, form, channels = Part(part), Form(form), x.shape[1]
    first, stop, step = part.channels(channels)
    T = len(range(first, stop, step))
    U = 0 if part.is_checkerboard else channels - T
    tiling = Tiling.of(x, max(T, U))
    divides = (form == Form.DIVIDE) != inverse
    meta = {
        "T": T,
        "T_FIRST": first,
        "U": U,
        "U_FIRST": 0 if first else 1 if step == 2 else T,
        "STEP": step,
        "CHECKERBOARD": part - Part.CHECKERBOARD_EVEN if part.is_checkerboard else -1,
        "MAP": _map(kind, p0, p1),
        "DIVIDES": divides,
        "AFTER": inverse if form == Form.SHIFT_SCALE else not divides if form == Form.SCALE_SHIFT else inverse,
        "GATE": form == Form.GATE,
        "FLOAT": FLOATS[x.dtype],
        "BB": tiling.BB,
        "BC": tiling.BC,
        "BS": tiling.BS,
        **OPTIONS,
    }
    width = x.shape[-1] if x.dim() > 2 else 1
    return tiling, (len(x), x.shape[2:].numel(), width, tiling.per_segment), meta


@functools.cache
def _map(kind: int, p0: float, p1: float) -> Map:
    return Map.of(ScaleMap.from_packed(kind, p0, p1))


def _stride(scale_parameter: Tensor | None) -> int:
    """0 for one value that all channels share."""
    return 0 if scale_parameter is None or scale_parameter.numel() == 1 else scale_parameter.stride(0)
