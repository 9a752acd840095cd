"""Triton kernels of the per-channel affine map, forward and backward. Imported at the first launch, never at package import.

    y = (x + before) * scale + after    scale = exp(log_scale); the inverse has exp(-log_scale), before = -bias and after = -shift

Bound by memory: with N elements of e bytes, forward moves 2 N e, backward 3 N e (dy and kept in, dx out). On sm_90 their loops over tiles
have 9 and 26 instructions per element; 4 TB/s leave time for about 58 and 87 in float32 (predicted). The sums over batch and sites
leave backward as one pair of numbers per tile and channel, and a second kernel adds them up in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._launch import Launch, Plans, cdiv
from .._layout import empty_in_layout_of, memory_format_of
from ..scale_map_triton import exp
from ..tiles_triton import FLOATS, OPTIONS, STAGES, Tiling, four_dimensional, offsets, strides, tree_sum

_BLOCK = tl.constexpr(1024)
_ROWS = tl.constexpr(32)
_MOST_PARTS = 1024


@triton.jit
def _scale(log_scale_ptr, c, C, INVERSE: tl.constexpr):
    log_scale = tl.load(log_scale_ptr + c, mask=c < C, other=0.0)
    return exp(-log_scale if INVERSE else log_scale)


@triton.jit
def _term(ptr, c, C, HAS: tl.constexpr, INVERSE: tl.constexpr, FLOAT: tl.constexpr):
    """shift or bias; the inverse's counts negative."""
    if HAS:
        t = tl.load(ptr + c, mask=c < C, other=0.0)
        t = -t if INVERSE else t
    else:
        t = tl.zeros(c.shape, FLOAT)
    return t


@triton.jit(do_not_specialize=["B"])
def _channel_affine_kernel(
    x_ptr, before_ptr, log_scale_ptr, after_ptr, y_ptr, log_ptr, B, sites, W, per_segment, segments, x_strides, y_strides,
    C: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, INVERSE: tl.constexpr, LAYOUT: tl.constexpr, FLOAT: tl.constexpr,
    BB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, TILES_S: tl.constexpr,
):  # fmt: skip
    # BB samples, one segment of their channels and sites
    b_tile, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    b = b_tile.to(tl.int64) * BB + tl.arange(0, BB)
    first = segment * per_segment
    for tile in range(first, tl.minimum(first + per_segment, tl.cdiv(C, BC) * TILES_S)):
        c = tile // TILES_S * BC + tl.arange(0, BC)
        s = tile % TILES_S * BS + tl.arange(0, BS)
        inside = ((b < B)[:, None] & (c < C)[None, :])[:, :, None] & (s < sites)[None, None, :]
        before = _term(before_ptr, c, C, HAS_BEFORE, INVERSE, FLOAT)[None, :, None]
        after = _term(after_ptr, c, C, HAS_AFTER, INVERSE, FLOAT)[None, :, None]
        x = tl.load(x_ptr + offsets(x_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        y = (x + before) * _scale(log_scale_ptr, c, C, INVERSE)[None, :, None] + after
        tl.store(y_ptr + offsets(y_strides, b, c, s, W, LAYOUT), y.to(y_ptr.dtype.element_ty), mask=inside)
    if segment == 0:
        total = tl.zeros((_BLOCK,), FLOAT)
        for c0 in range(0, C, _BLOCK):
            c = c0 + tl.arange(0, _BLOCK)
            total += tl.load(log_scale_ptr + c, mask=c < C, other=0.0)
        logabsdet = tree_sum(tl.reshape(total, (1, _BLOCK)), 1, _BLOCK, 10) * sites
        tl.store(log_ptr + b, tl.broadcast_to(-logabsdet if INVERSE else logabsdet, (BB,)), mask=b < B)


@triton.jit(do_not_specialize=["B", "parts"])
def _channel_affine_backward_kernel(
    dy_ptr, kept_ptr, before_ptr, log_scale_ptr, after_ptr, dx_ptr, parts_ptr,
    B, parts, sites, W, per_segment, segments, dy_strides, kept_strides, dx_strides,
    C: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, INVERSE: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    LAYOUT: tl.constexpr, FLOAT: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, TILES_S: tl.constexpr,
):  # fmt: skip
    # parts [2, batch tiles * site tiles, C]: sums of dy, and of dy * (y - after) or dy * (x + before)
    b_tile, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    b = b_tile.to(tl.int64) * BB + tl.arange(0, BB)
    first = segment * per_segment
    for tile in tl.range(first, tl.minimum(first + per_segment, tl.cdiv(C, BC) * TILES_S), num_stages=STAGES):
        c = tile // TILES_S * BC + tl.arange(0, BC)
        s = tile % TILES_S * BS + tl.arange(0, BS)
        inside = ((b < B)[:, None] & (c < C)[None, :])[:, :, None] & (s < sites)[None, None, :]
        dy = tl.load(dy_ptr + offsets(dy_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        kept = tl.load(kept_ptr + offsets(kept_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        dx = dy * _scale(log_scale_ptr, c, C, INVERSE)[None, :, None]
        tl.store(dx_ptr + offsets(dx_strides, b, c, s, W, LAYOUT), dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if FROM_OUTPUT:
            along = dy * (kept - _term(after_ptr, c, C, HAS_AFTER, INVERSE, FLOAT)[None, :, None])
        else:
            along = dy * (kept + _term(before_ptr, c, C, HAS_BEFORE, INVERSE, FLOAT)[None, :, None])
        at = (b_tile.to(tl.int64) * TILES_S + tile % TILES_S) * C + c
        tl.store(parts_ptr + at, tl.sum(tl.sum(dy, 2), 0), mask=c < C)
        tl.store(parts_ptr + at + parts.to(tl.int64) * C, tl.sum(tl.sum(along, 2), 0), mask=c < C)


@triton.jit(do_not_specialize=["B", "parts"])
def _parameters_kernel(
    parts_ptr, dlog_ptr, log_scale_ptr, dshift_ptr, dlog_scale_ptr, dbias_ptr, B, parts, sites, dlog_stride,
    C: tl.constexpr, INVERSE: tl.constexpr, FROM_OUTPUT: tl.constexpr, FLOAT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # BC channels: the parts in order, _ROWS at a time
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    sum_dy = tl.zeros((_ROWS, BC), FLOAT)
    sum_along = tl.zeros((_ROWS, BC), FLOAT)
    for row in range(0, parts, _ROWS):
        i = row + tl.arange(0, _ROWS)
        inside = (i < parts)[:, None] & (c < C)[None, :]
        at = i.to(tl.int64)[:, None] * C + c[None, :]
        sum_dy += tl.load(parts_ptr + at, mask=inside, other=0.0)
        sum_along += tl.load(parts_ptr + at + parts.to(tl.int64) * C, mask=inside, other=0.0)
    sum_dlog = tl.zeros((_BLOCK,), FLOAT)
    for b0 in range(0, B, _BLOCK):
        b = b0 + tl.arange(0, _BLOCK)
        sum_dlog += tl.load(dlog_ptr + b.to(tl.int64) * dlog_stride, mask=b < B, other=0.0)
    scale = _scale(log_scale_ptr, c, C, INVERSE)
    dafter = tl.sum(sum_dy, 0)
    dbefore = dafter * scale
    along = tl.sum(sum_along, 0)
    dlog_scale = (along if FROM_OUTPUT else along * scale) + tl.sum(sum_dlog, 0) * sites
    if INVERSE:
        dbefore, dafter = -dafter, -dbefore
        dlog_scale = -dlog_scale
    tl.store(dshift_ptr + c, dbefore, mask=c < C)
    tl.store(dlog_scale_ptr + c, dlog_scale, mask=c < C)
    tl.store(dbias_ptr + c, dafter, mask=c < C)


class _Plan(NamedTuple):
    """What a call needs and its batch does not change."""

    launch: Launch
    tiling: Tiling
    memory_format: torch.memory_format
    parameters: Launch | None


_forward_plans, _backward_plans = Plans(), Plans()


def channel_affine_triton(x: Tensor, shift: Tensor | None, log_scale: Tensor, bias: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    batch = x.shape[0]
    logabsdet = log_scale.new_empty(batch)
    if not x.numel():
        return empty_in_layout_of(x), logabsdet.zero_()
    before, log_scale, after = _contiguous(shift, log_scale, bias, inverse)
    key = (inverse, x.dtype, x.shape[1:], x.stride(), _dtype(before), log_scale.dtype, _dtype(after))
    plan = _forward_plans.get(key) or _forward_plans.add(key, _plan_forward(x, before, after, inverse))
    y = torch.empty_like(x, memory_format=plan.memory_format)
    x_, y_ = (x, y) if x.dim() <= 4 else (four_dimensional(x), four_dimensional(y))
    plan.launch(plan.tiling.grid(batch), (x_, before, log_scale, after, y_, logabsdet), batch)
    return y, logabsdet


def channel_affine_backward_triton(
    dy: Tensor, dlogabsdet: Tensor, kept: Tensor, shift: Tensor | None, log_scale: Tensor, bias: Tensor | None, inverse: bool,
    from_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, channels = dy.shape[:2]
    gradients = log_scale.new_empty((3, channels))
    if not dy.numel():
        return empty_in_layout_of(dy), *gradients.zero_().unbind()
    dshift, dlog_scale, dbias = gradients.unbind()
    before, log_scale, after = _contiguous(shift, log_scale, bias, inverse)
    key = (
        inverse, from_output, dy.dtype, dy.shape[1:], dy.stride(), dlogabsdet.dtype, dlogabsdet.stride(), kept.dtype, kept.stride(),
        _dtype(before), log_scale.dtype, _dtype(after),
    )  # fmt: skip
    plan = _backward_plans.get(key)
    if plan is None:
        plan = _backward_plans.add(key, _plan_backward(dy, dlogabsdet, kept, before, after, inverse, from_output))
    dx = torch.empty_like(dy, memory_format=plan.memory_format)
    rows = cdiv(batch, plan.tiling.BB) * plan.tiling.tiles_s
    parts = log_scale.new_empty((2, rows, channels))
    dy_, kept_, dx_ = (dy, kept, dx) if dy.dim() <= 4 else map(four_dimensional, (dy, kept, dx))
    plan.launch(plan.tiling.grid(batch), (dy_, kept_, before, log_scale, after, dx_, parts), batch, rows)
    if rows > _MOST_PARTS:  # one program adds up a channel's, which would take longer than the map
        parts, rows = parts.sum(1, keepdim=True), 1
    plan.parameters(
        (cdiv(channels, _channels_at_once(channels)), 1), (parts, dlogabsdet, log_scale, dshift, dlog_scale, dbias), batch, rows
    )
    return dx, dshift, dlog_scale, dbias


def _plan_forward(x: Tensor, before: Tensor | None, after: Tensor | None, inverse: bool) -> _Plan:
    memory_format = memory_format_of(x)
    tensors = [four_dimensional(t) for t in (x, torch.empty_like(x, memory_format=memory_format, device="meta"))]
    all_strides = [strides(t) for t in tensors]
    tiling, sizes, meta = _common(x, tensors[0], all_strides, before, after, inverse)
    return _Plan(Launch(_channel_affine_kernel, *sizes, *all_strides, **meta), tiling, memory_format, None)


def _plan_backward(
    dy: Tensor, dlogabsdet: Tensor, kept: Tensor, before: Tensor | None, after: Tensor | None, inverse: bool, from_output: bool
) -> _Plan:
    memory_format = memory_format_of(dy)
    tensors = [four_dimensional(t) for t in (dy, kept, torch.empty_like(dy, memory_format=memory_format, device="meta"))]
    all_strides = [strides(t) for t in tensors]
    tiling, sizes, meta = _common(kept, tensors[0], all_strides, before, after, inverse)
    channels = meta["C"]
    parameters = Launch(
        _parameters_kernel, sizes[0], dlogabsdet.stride(0),
        C=channels, INVERSE=inverse, FROM_OUTPUT=from_output, FLOAT=meta["FLOAT"], BC=_channels_at_once(channels), **OPTIONS,
    )  # fmt: skip
    launch = Launch(_channel_affine_backward_kernel, *sizes, *all_strides, FROM_OUTPUT=from_output, **meta)
    return _Plan(launch, tiling, memory_format, parameters)


def _contiguous(shift: Tensor | None, log_scale: Tensor, bias: Tensor | None, inverse: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """What is added before, the log scale, and what is added after."""
    shift, bias = (t if t is None else t.contiguous() for t in (shift, bias))
    return (bias, log_scale.contiguous(), shift) if inverse else (shift, log_scale.contiguous(), bias)


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _channels_at_once(channels: int) -> int:
    return min(32, triton.next_power_of_2(channels))


def _common(
    tiled: Tensor, x: Tensor, all_strides: list[tuple[int, int, int, int]], before: Tensor | None, after: Tensor | None, inverse: bool
) -> tuple[Tiling, tuple[int, ...], dict[str, object]]:
    """The tiling, made for `tiled`, and the sizes and compile-time arguments that forward and backward share."""
    tiling = Tiling.of(tiled, x.shape[1])
    sizes = x.shape[2:].numel(), x.shape[-1] if x.dim() > 2 else 1, tiling.per_segment, tiling.segments
    meta = {
        "C": x.shape[1],
        "HAS_BEFORE": before is not None,
        "HAS_AFTER": after is not None,
        "INVERSE": inverse,
        "LAYOUT": tiling.layout(x, all_strides),
        "FLOAT": FLOATS[x.dtype],
        "BB": tiling.BB,
        "BC": tiling.BC,
        "BS": tiling.BS,
        "TILES_S": tiling.tiles_s,
        **OPTIONS,
    }
    return tiling, sizes, meta
