"""Triton kernels of the per-channel affine map, forward and backward. Imported at the first launch, never at package import.

    y = (x + before) * scale + after    scale = exp(log_scale); the inverse has exp(-log_scale), before = -bias and after = -shift

Bound by memory: with N elements of e bytes, forward moves 2 N e, backward 3 N e (dy and kept in, dx out). The sums over batch and sites
leave backward as one pair of numbers per tile and channel, and a second kernel adds them up in a fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._layout import empty_in_layout_of
from ..scale_map_triton import exp
from ..tiles_triton import FLOATS, OPTIONS, Tiling, four_dimensional, offsets, strides, tree_sum

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
    x_ptr, before_ptr, log_scale_ptr, after_ptr, y_ptr, log_ptr, x_strides, y_strides, B, sites, W, per_segment,
    C: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, INVERSE: tl.constexpr, LAYOUT: tl.constexpr, FLOAT: tl.constexpr,
    BB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    # BB samples, one segment of their channels and sites
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    tiles_s = tl.cdiv(sites, BS)
    first = tl.program_id(1) * per_segment
    for tile in range(first, tl.minimum(first + per_segment, tl.cdiv(C, BC) * tiles_s)):
        c = tile // tiles_s * BC + tl.arange(0, BC)
        s = tile % tiles_s * BS + tl.arange(0, BS)
        inside = ((b < B)[:, None] & (c < C)[None, :])[:, :, None] & (s < sites)[None, None, :]
        before = _term(before_ptr, c, C, HAS_BEFORE, INVERSE, FLOAT)[None, :, None]
        after = _term(after_ptr, c, C, HAS_AFTER, INVERSE, FLOAT)[None, :, None]
        x = tl.load(x_ptr + offsets(x_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        y = (x + before) * _scale(log_scale_ptr, c, C, INVERSE)[None, :, None] + after
        tl.store(y_ptr + offsets(y_strides, b, c, s, W, LAYOUT), y.to(y_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        total = tl.zeros((_BLOCK,), FLOAT)
        for c0 in range(0, C, _BLOCK):
            c = c0 + tl.arange(0, _BLOCK)
            total += tl.load(log_scale_ptr + c, mask=c < C, other=0.0)
        logabsdet = tree_sum(tl.reshape(total, (1, _BLOCK)), 1, _BLOCK, 10) * sites
        tl.store(log_ptr + b, tl.broadcast_to(-logabsdet if INVERSE else logabsdet, (BB,)), mask=b < B)


@triton.jit(do_not_specialize=["B", "parts"])
def _channel_affine_backward_kernel(
    dy_ptr, kept_ptr, before_ptr, log_scale_ptr, after_ptr, dx_ptr, parts_ptr, dy_strides, kept_strides, dx_strides,
    B, sites, W, per_segment, parts,
    C: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, INVERSE: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    LAYOUT: tl.constexpr, FLOAT: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    # parts [2, batch tiles * site tiles, C]: sums of dy, and of dy * (y - after) or dy * (x + before)
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    tiles_s = tl.cdiv(sites, BS)
    first = tl.program_id(1) * per_segment
    for tile in range(first, tl.minimum(first + per_segment, tl.cdiv(C, BC) * tiles_s)):
        c = tile // tiles_s * BC + tl.arange(0, BC)
        s = tile % tiles_s * BS + tl.arange(0, BS)
        inside = ((b < B)[:, None] & (c < C)[None, :])[:, :, None] & (s < sites)[None, None, :]
        dy = tl.load(dy_ptr + offsets(dy_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        kept = tl.load(kept_ptr + offsets(kept_strides, b, c, s, W, LAYOUT), mask=inside, other=0.0).to(FLOAT)
        dx = dy * _scale(log_scale_ptr, c, C, INVERSE)[None, :, None]
        tl.store(dx_ptr + offsets(dx_strides, b, c, s, W, LAYOUT), dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if FROM_OUTPUT:
            along = dy * (kept - _term(after_ptr, c, C, HAS_AFTER, INVERSE, FLOAT)[None, :, None])
        else:
            along = dy * (kept + _term(before_ptr, c, C, HAS_BEFORE, INVERSE, FLOAT)[None, :, None])
        at = (tl.program_id(0).to(tl.int64) * tiles_s + tile % tiles_s) * C + c
        tl.store(parts_ptr + at, tl.sum(tl.sum(dy, 2), 0), mask=c < C)
        tl.store(parts_ptr + at + parts.to(tl.int64) * C, tl.sum(tl.sum(along, 2), 0), mask=c < C)


@triton.jit(do_not_specialize=["B", "parts"])
def _parameters_kernel(
    parts_ptr, dlog_ptr, log_scale_ptr, dshift_ptr, dlog_scale_ptr, dbias_ptr, B, sites, dlog_stride, parts,
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


def channel_affine_triton(x: Tensor, shift: Tensor | None, log_scale: Tensor, bias: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    y, logabsdet = empty_in_layout_of(x), log_scale.new_empty(len(x))
    if y.numel():
        tiling = Tiling.of(x, x.shape[1])
        before, log_scale, after = _contiguous(shift, log_scale, bias, inverse)
        tensors = [four_dimensional(t) for t in (x, y)]
        all_strides = [strides(t) for t in tensors]
        _channel_affine_kernel[tiling.grid(len(x))](
            tensors[0], before, log_scale, after, tensors[1], logabsdet, *all_strides, *_sizes(x, tiling),
            **_meta(x, tiling, all_strides, before, after, inverse),
        )  # fmt: skip
    return y, logabsdet


def channel_affine_backward_triton(
    dy: Tensor, dlogabsdet: Tensor, kept: Tensor, shift: Tensor | None, log_scale: Tensor, bias: Tensor | None, inverse: bool,
    from_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, channels = empty_in_layout_of(dy), dy.shape[1]
    dshift, dlog_scale, dbias = log_scale.new_empty((3, channels)).unbind()
    tiling = Tiling.of(kept, channels)
    before, log_scale, after = _contiguous(shift, log_scale, bias, inverse)
    tensors = [four_dimensional(t) for t in (dy, kept, dx)]
    all_strides = [strides(t) for t in tensors]
    meta, sizes = _meta(dy, tiling, all_strides, before, after, inverse), _sizes(dy, tiling)
    rows = triton.cdiv(len(dy), tiling.BB) * triton.cdiv(sizes[1], tiling.BS)
    parts = log_scale.new_empty((2, rows, channels))
    if dx.numel():
        _channel_affine_backward_kernel[tiling.grid(len(dy))](
            *tensors[:2], before, log_scale, after, tensors[2], parts, *all_strides, *sizes, rows, FROM_OUTPUT=from_output, **meta
        )
    if rows > _MOST_PARTS:  # one program adds up a channel's, which would take longer than the map
        parts, rows = parts.sum(1, keepdim=True), 1
    block = min(32, triton.next_power_of_2(channels))
    _parameters_kernel[(triton.cdiv(channels, block),)](
        parts, dlogabsdet, log_scale, dshift, dlog_scale, dbias, len(dy), sizes[1], dlogabsdet.stride(0), rows,
        C=channels, INVERSE=inverse, FROM_OUTPUT=from_output, FLOAT=meta["FLOAT"], BC=block, **OPTIONS,
    )  # fmt: skip
    return dx, dshift, dlog_scale, dbias


def _contiguous(shift: Tensor | None, log_scale: Tensor, bias: Tensor | None, inverse: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """What is added before, the log scale, and what is added after."""
    shift, bias = (t if t is None else t.contiguous() for t in (shift, bias))
    return (bias, log_scale.contiguous(), shift) if inverse else (shift, log_scale.contiguous(), bias)


def _sizes(x: Tensor, tiling: Tiling) -> tuple[int, int, int, int]:
    return len(x), x.shape[2:].numel(), x.shape[-1] if x.dim() > 2 else 1, tiling.per_segment


def _meta(
    x: Tensor, tiling: Tiling, all_strides: list[tuple[int, int, int, int]], before: Tensor | None, after: Tensor | None, inverse: bool
) -> dict[str, object]:
    return {
        "C": x.shape[1],
        "HAS_BEFORE": before is not None,
        "HAS_AFTER": after is not None,
        "INVERSE": inverse,
        "LAYOUT": tiling.layout(x, all_strides),
        "FLOAT": FLOATS[x.dtype],
        "BB": tiling.BB,
        "BC": tiling.BC,
        "BS": tiling.BS,
        **OPTIONS,
    }
