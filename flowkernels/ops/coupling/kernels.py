"""Triton kernels of the coupling, forward and backward. Imported at the first launch, never at package import.

Both are bound by memory. With N elements of e bytes, half of them transformed, forward moves 3 N e (x, shift and raw scale in, y out;
a checkerboard's full-size nets make it 4 N e), backward 4 N e to 4.5 N e (dy, kept, raw scale and, for some forms, shift in; dx, dshift,
draw out). On sm_90 the loop over tiles has 43 instructions per transformed element forward with a softclip and 56 with a sigmoid, and
52 backward; all memory is read and written 16 bytes at a time where rows allow. A GPU with 4 TB/s has time for about 180 instructions in
float32 and 90 in half precision (predicted). A program has two tiles under way, 32 KB in float32, and shared memory holds 6 programs on a
multiprocessor; 4 TB/s at a latency of 700 ns need 21 KB there (predicted).

With the factor v, which is sigma(s), or 1 / sigma(s) where the form or its inverse DIVIDES, and a shift that then counts negative:

    AFTER   new = old v + shift            scale_shift, and the inverses of shift_scale and divide
    GATE    new = old v + (1 - v) shift    and its inverse (old - (1 - sigma) shift) v
    else    new = (old + shift) v          shift_scale, divide, and the inverse of scale_shift
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._launch import Launch, Plans, cdiv
from .._layout import empty_in_layout_of, memory_format_of
from ..scale_map import Form, ScaleMap
from ..scale_map_triton import Map, complement, dlog_scale, exp, log_sigma, scale_and_log
from ..tiles_triton import FLOATS, OPTIONS, STAGES, SumSegments, Tiling, four_dimensional, offsets, strides, tree_sum
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
    x_ptr, shift_ptr, raw_ptr, a_ptr, y_ptr, log_ptr,
    B, sites, W, per_segment, segments, x_strides, shift_strides, raw_strides, y_strides, a_stride,
    T: tl.constexpr, T_FIRST: tl.constexpr, U: tl.constexpr, U_FIRST: tl.constexpr, STEP: tl.constexpr, CHECKERBOARD: tl.constexpr,
    MAP: tl.constexpr, DIVIDES: tl.constexpr, AFTER: tl.constexpr, GATE: tl.constexpr,
    AFFINE: tl.constexpr, HAS_A: tl.constexpr, LAYOUT: tl.constexpr, FLOAT: tl.constexpr,
    BB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, TILES_S: tl.constexpr, LOG2_TILE: tl.constexpr,
):  # fmt: skip
    # BB samples, one segment of their T transformed and U untouched channels; log-determinants go to [batch, segments]
    b_tile, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    b = b_tile.to(tl.int64) * BB + tl.arange(0, BB)
    tiles = tl.cdiv(tl.maximum(T, U), BC) * TILES_S
    first = segment * per_segment
    total = tl.zeros((BB, BC, BS), FLOAT)
    for tile in tl.range(first, tl.minimum(first + per_segment, tiles), num_stages=STAGES):
        c = tile // TILES_S * BC + tl.arange(0, BC)
        s = tile % TILES_S * BS + tl.arange(0, BS)
        inside = ((b < B)[:, None] & (c < T)[None, :])[:, :, None] & (s < sites)[None, None, :]
        x_at = offsets(x_strides, b, c * STEP + T_FIRST, s, W, LAYOUT)
        old = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(FLOAT)
        shift = tl.load(shift_ptr + offsets(shift_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        shift = -shift if DIVIDES else shift
        if AFFINE:
            raw = tl.load(raw_ptr + offsets(raw_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        if CHECKERBOARD < 0:
            passes = ((b < B)[:, None] & (c < U)[None, :])[:, :, None] & (s < sites)[None, None, :]
            copied = tl.load(x_ptr + offsets(x_strides, b, c * STEP + U_FIRST, s, W, LAYOUT), mask=passes)
        if AFFINE:
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
            tl.store(y_ptr + offsets(y_strides, b, c * STEP + U_FIRST, s, W, LAYOUT), copied, mask=passes)
    if AFFINE:
        logabsdet = tree_sum(tl.reshape(total, (BB, BC * BS)), BB, BC * BS, LOG2_TILE)
        tl.store(log_ptr + b * segments + segment, logabsdet, mask=b < B)
    elif segment == 0:
        tl.store(log_ptr + b, tl.zeros((BB,), FLOAT), mask=b < B)


@triton.jit(do_not_specialize=["B"])
def _coupling_backward_kernel(
    dy_ptr, dlog_ptr, kept_ptr, shift_ptr, raw_ptr, a_ptr, dx_ptr, dshift_ptr, draw_ptr, da_ptr,
    B, sites, W, per_segment, segments,
    dy_strides, dlog_stride, kept_strides, shift_strides, raw_strides, dx_strides, dshift_strides, draw_strides, a_stride,
    T: tl.constexpr, T_FIRST: tl.constexpr, U: tl.constexpr, U_FIRST: tl.constexpr, STEP: tl.constexpr, CHECKERBOARD: tl.constexpr,
    MAP: tl.constexpr, DIVIDES: tl.constexpr, AFTER: tl.constexpr, GATE: tl.constexpr,
    FROM_OUTPUT: tl.constexpr, HAS_A: tl.constexpr, LAYOUT: tl.constexpr, FLOAT: tl.constexpr,
    BB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, TILES_S: tl.constexpr,
):  # fmt: skip
    # the same tiles; gradients to a learned a go to [batch tiles, site tiles, T], each summed over one tile
    b_tile, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    b = b_tile.to(tl.int64) * BB + tl.arange(0, BB)
    tiles = tl.cdiv(tl.maximum(T, U), BC) * TILES_S
    first = segment * per_segment
    dlogabsdet = tl.load(dlog_ptr + b * dlog_stride, mask=b < B, other=0.0)[:, None, None]
    for tile in tl.range(first, tl.minimum(first + per_segment, tiles), num_stages=STAGES):
        c = tile // TILES_S * BC + tl.arange(0, BC)
        s = tile % TILES_S * BS + tl.arange(0, BS)
        inside = ((b < B)[:, None] & (c < T)[None, :])[:, :, None] & (s < sites)[None, None, :]
        dnew = tl.load(dy_ptr + offsets(dy_strides, b, c * STEP + T_FIRST, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        kept = tl.load(kept_ptr + offsets(kept_strides, b, c * STEP + T_FIRST, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        shift = tl.load(shift_ptr + offsets(shift_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        raw = tl.load(raw_ptr + offsets(raw_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        a = tl.load(a_ptr + c.to(tl.int64) * a_stride, mask=c < T, other=0.0)[None, :, None] if HAS_A else 1.0
        if CHECKERBOARD < 0:
            passes = ((b < B)[:, None] & (c < U)[None, :])[:, :, None] & (s < sites)[None, None, :]
            copied = tl.load(dy_ptr + offsets(dy_strides, b, c * STEP + U_FIRST, s, W, LAYOUT), mask=passes)
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
            da_row = b_tile.to(tl.int64) * TILES_S + tile % TILES_S
            tl.store(da_ptr + da_row * T + c, da, mask=c < T)
        if CHECKERBOARD < 0:
            tl.store(dx_ptr + offsets(dx_strides, b, c * STEP + U_FIRST, s, W, LAYOUT), copied, mask=passes)


Options = tuple[int | float | bool, ...]


class _Plan(NamedTuple):
    """What a call needs and its batch does not change."""

    launch: Launch
    tiling: Tiling
    memory_formats: tuple[torch.memory_format, ...]
    compute: torch.dtype
    sum_segments: SumSegments | None


_forward_plans, _backward_plans = Plans(), Plans()


def coupling_triton(
    x: Tensor, shift: Tensor, raw_scale: Tensor | None, scale_parameter: Tensor | None, *options: int | float | bool
) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return empty_in_layout_of(x), x.new_zeros(x.shape[:1], dtype=torch.promote_types(x.dtype, torch.float32))
    key = (
        options,
        x.dtype,
        x.shape[1:],
        x.stride(),
        *_traits(shift),
        *_traits(raw_scale),
        *_traits(scale_parameter),
        _stride(scale_parameter),
    )
    plan = _forward_plans.get(key) or _forward_plans.add(key, _plan_forward(x, shift, raw_scale, scale_parameter, options))
    batch = x.shape[0]
    y = torch.empty_like(x, memory_format=plan.memory_formats[0])
    log = x.new_empty(batch if plan.sum_segments is None else (batch, plan.tiling.segments), dtype=plan.compute)
    tensors = (x, shift, raw_scale, scale_parameter, y, log)
    plan.launch(plan.tiling.grid(batch), tensors if x.dim() <= 4 else list(map(four_dimensional, tensors)), batch)
    return y, log if plan.sum_segments is None else plan.sum_segments(log)


def coupling_backward_triton(
    dy: Tensor, dlogabsdet: Tensor, kept: Tensor, shift: Tensor, raw_scale: Tensor, scale_parameter: Tensor | None,
    *options: int | float | bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not dy.numel():
        none = torch.zeros_like(scale_parameter) if scale_parameter is not None else shift.new_empty(0)
        return empty_in_layout_of(dy), empty_in_layout_of(shift), empty_in_layout_of(raw_scale), none
    key = (
        options, dy.dtype, dy.shape[1:], dy.stride(), dlogabsdet.dtype, dlogabsdet.stride(), kept.dtype, kept.stride(),
        *_traits(shift), *_traits(raw_scale), *_traits(scale_parameter), _stride(scale_parameter),
    )  # fmt: skip
    plan = _backward_plans.get(key)
    if plan is None:
        plan = _backward_plans.add(key, _plan_backward(dy, dlogabsdet, kept, shift, raw_scale, scale_parameter, options))
    batch, parts = dy.shape[0], None
    if scale_parameter is not None:
        parts = scale_parameter.new_empty((cdiv(batch, plan.tiling.BB) * plan.tiling.tiles_s, shift.shape[1]))
    dx, dshift, draw_scale = map(_empty_like, (dy, shift, raw_scale), plan.memory_formats)
    tensors = (dy, dlogabsdet, kept, shift, raw_scale, scale_parameter, dx, dshift, draw_scale, parts)
    plan.launch(plan.tiling.grid(batch), tensors if dy.dim() <= 4 else list(map(four_dimensional, tensors)), batch)
    if parts is None:
        return dx, dshift, draw_scale, shift.new_empty(0)
    da = parts.sum(0) if scale_parameter.numel() == parts.shape[1] else parts.sum()
    return dx, dshift, draw_scale, da.view_as(scale_parameter)


def _plan_forward(x: Tensor, shift: Tensor, raw_scale: Tensor | None, a: Tensor | None, options: Options) -> _Plan:
    memory_format = memory_format_of(x)
    y = _empty_like(x, memory_format, device="meta")
    tensors = [four_dimensional(t) for t in (x, shift, shift if raw_scale is None else raw_scale, y)]
    all_strides = [strides(t) for t in tensors]
    tiling, sizes, meta = _common(x, *options)
    launch = Launch(
        _coupling_kernel, *sizes, *all_strides, _stride(a), **meta,
        AFFINE=raw_scale is not None, HAS_A=a is not None, LAYOUT=tiling.layout(tensors[0], all_strides),
        LOG2_TILE=(tiling.BC * tiling.BS).bit_length() - 1,
    )  # fmt: skip
    sums = raw_scale is not None and tiling.segments > 1
    compute = torch.promote_types(x.dtype, torch.float32)
    return _Plan(launch, tiling, (memory_format,), compute, SumSegments(tiling.segments) if sums else None)


def _plan_backward(
    dy: Tensor, dlogabsdet: Tensor, kept: Tensor, shift: Tensor, raw_scale: Tensor, a: Tensor | None, options: Options
) -> _Plan:
    *options, from_output = options
    memory_formats = tuple(memory_format_of(t) for t in (dy, shift, raw_scale))
    gradients = map(partial(_empty_like, device="meta"), (dy, shift, raw_scale), memory_formats)
    tensors = [four_dimensional(t) for t in (dy, kept, shift, raw_scale, *gradients)]
    dy_strides, *others = all_strides = [strides(t) for t in tensors]
    tiling, sizes, meta = _common(kept, *options)
    launch = Launch(
        _coupling_backward_kernel, *sizes, dy_strides, dlogabsdet.stride(0), *others, _stride(a), **meta,
        FROM_OUTPUT=from_output, HAS_A=a is not None, LAYOUT=tiling.layout(tensors[0], all_strides),
    )  # fmt: skip
    return _Plan(launch, tiling, memory_formats, dlogabsdet.dtype, None)


def _common(
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
        "MAP": Map.of(ScaleMap.from_packed(kind, p0, p1)),
        "DIVIDES": divides,
        "AFTER": inverse if form == Form.SHIFT_SCALE else not divides if form == Form.SCALE_SHIFT else inverse,
        "GATE": form == Form.GATE,
        "FLOAT": FLOATS[x.dtype],
        "BB": tiling.BB,
        "BC": tiling.BC,
        "BS": tiling.BS,
        "TILES_S": tiling.tiles_s,
        **OPTIONS,
    }
    width = x.shape[-1] if x.dim() > 2 else 1
    return tiling, (x.shape[2:].numel(), width, tiling.per_segment, tiling.segments), meta


def _empty_like(t: Tensor, memory_format: torch.memory_format, **options) -> Tensor:
    return torch.empty_like(t, memory_format=memory_format, **options)


def _traits(t: Tensor | None) -> tuple[object, ...]:
    """What a plan depends on of a tensor whose shape follows from others."""
    return (None, None) if t is None else (t.dtype, t.stride())


def _stride(scale_parameter: Tensor | None) -> int:
    """0 for one value that all channels share."""
    return 0 if scale_parameter is None or scale_parameter.numel() == 1 else scale_parameter.stride(0)
