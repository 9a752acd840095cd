"""Triton kernels of the joined Glow step and its gradients. Imported at the first launch, never at package import.

    y = W (h + bias), h = [x1, (x2 + shift) * sigmoid(s + 2)]        inverse: y = W h - bias, h = [x1, x2 / sigmoid(s + 2) - shift]

A program takes a tile of sites through all of it: it loads 16 channels at a time, makes h of them, and adds their products to all
channels of y, which stay in registers. So x, the conditioner's output and y cross memory once: with N elements of e bytes 3 N e, or 2 N e
for actnorm and convolution alone, where coupling, sum and product one after the other move 7 N e, and sum and product 4 N e. Half the
channels are written twice where the next conditioner wants them for itself: N e / 2.

Backward is two kernels: dx and the conditioner's gradient, of dy, x and its output (5 N e), and the sums over sites, for which h is made
again (3 N e). Layer by layer it is about 10 N e.

Float32 is exact, and its multiply-adds, C an element, are a floor of their own: an H200 does 33 T of them a second and copies 4 TB/s, 0.5 T
elements of 8 bytes, so that 96 channels cannot come closer to a copy than 0.7. In the loops 5 of 7 instructions are multiply-adds without a
coupling and 4 of 7 with one (sm_90, 48 channels). By all that is issued, actnorm and convolution of 64 MB take 49 us at 48 channels,
where a copy takes 34 us, and with a coupling 46 us at 12 channels, where the bytes take 50 us (predicted; no GPU has run it). With tf32
allowed (torch.backends.cuda.matmul) memory is the limit.

Tiles never change a row's bits: a site's sums run over channels in ascending order, and log|det| is summed by a tree over tiles whose
sizes do not depend on the batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._launch import Launch, Plans, cdiv
from ..coupling.kernels import coupling_backward_triton, coupling_triton
from ..coupling.part import Part
from ..scale_map import Form
from ..scale_map_triton import Map, dlog_scale, scale_and_log
from ..tiles_triton import FLOATS, Layout, SumSegments, tree_sum
from .reference import SCALE, laid_out, like_x

_MAP = Map.of(SCALE)
_K = tl.constexpr(16)  # channels that are loaded at a time, and the fewest that tl.dot takes
_PROGRAMS = 264  # that sum over sites: two for each multiprocessor of an H100 or H200


@triton.jit
def _sites(B, sites, tiles_s, tile, N: tl.constexpr, BS: tl.constexpr):
    """Samples and sites of a tile's N columns, BS neighbouring sites of each of its samples; and which of them there are."""
    n = tl.arange(0, N)
    b = (tile // tiles_s).to(tl.int64) * (N // BS) + n // BS
    s = tile % tiles_s * BS + n % BS
    return b, s, (b < B) & (s < sites)


@triton.jit
def _columns(strides, b, s, LAYOUT: tl.constexpr):
    """Where the columns begin. Strides are over (batch, channel, site)."""
    ALIGN: tl.constexpr = LAYOUT.align
    s_at = s.to(tl.int64) * strides[2]
    if not LAYOUT.channels_first:
        s_at = tl.multiple_of(s_at, ALIGN)
    return (tl.multiple_of(b * strides[0], ALIGN) + s_at)[None, :]


@triton.jit
def _rows(strides, c, LAYOUT: tl.constexpr):
    ALIGN: tl.constexpr = LAYOUT.align
    c_at = c.to(tl.int64) * strides[1]
    if LAYOUT.channels_first:
        c_at = tl.multiple_of(c_at, ALIGN)
    return c_at[:, None]


@triton.jit
def _load_h(
    x_ptr, raw_ptr, bias_ptr, x_at, raw_at, x_strides, raw_strides, c, inside,
    C: tl.constexpr, COUPLES: tl.constexpr, INVERSE: tl.constexpr, MAP: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Channels c of h, with the bias that is added before the product, and log v of the coupling, zero where there is none."""
    H: tl.constexpr = C // 2
    here = (c < C)[:, None] & inside[None, :]
    h = tl.load(x_ptr + x_at + _rows(x_strides, c, LAYOUT), mask=here, other=0.0)
    log = tl.zeros(h.shape, h.dtype)
    if COUPLES:
        coupled = (c >= H)[:, None] & here
        shift = tl.load(raw_ptr + raw_at + _rows(raw_strides, 2 * (c - H), LAYOUT), mask=coupled, other=0.0)
        s = tl.load(raw_ptr + raw_at + _rows(raw_strides, 2 * (c - H) + 1, LAYOUT), mask=coupled, other=0.0)
        v, log = scale_and_log(s, MAP, INVERSE)
        h = tl.where(coupled, h * v - shift if INVERSE else (h + shift) * v, h)
        log = tl.where(coupled, log, 0.0)
    if not INVERSE:
        h += tl.load(bias_ptr + c, mask=c < C, other=0.0)[:, None]
    return h, log


@triton.jit
def _add_product(acc, weight_ptr, m, c, h, C: tl.constexpr, PRECISION: tl.constexpr):
    w = tl.load(weight_ptr + m[:, None] * C + c[None, :], mask=(m < C)[:, None] & (c < C)[None, :], other=0.0)
    return tl.dot(w, h, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _store_y(
    acc, m, y_ptr, passing_ptr, bias_ptr, y_at, passing_at, y_strides, passing_strides, inside,
    C: tl.constexpr, INVERSE: tl.constexpr, PASSES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    if INVERSE:
        acc -= tl.load(bias_ptr + m, mask=m < C, other=0.0)[:, None]
    tl.store(y_ptr + y_at + _rows(y_strides, m, LAYOUT), acc, mask=(m < C)[:, None] & inside[None, :])
    if PASSES:
        tl.store(passing_ptr + passing_at + _rows(passing_strides, m, LAYOUT), acc, mask=(m < C // 2)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["B"])
def _glow_step_kernel(
    x_ptr, raw_ptr, weight_ptr, bias_ptr, y_ptr, passing_ptr, log_ptr,
    B, sites, tiles_s, x_strides, raw_strides, y_strides, passing_strides,
    C: tl.constexpr, COUPLES: tl.constexpr, INVERSE: tl.constexpr, PASSES: tl.constexpr, MAP: tl.constexpr,
    LAYOUT: tl.constexpr, FLOAT: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, BS: tl.constexpr,
    M0: tl.constexpr, M1: tl.constexpr, LOG2_LOGS: tl.constexpr,
):  # fmt: skip
    # y [M0 + M1 channels, N sites]
    tile, first = tl.program_id(0), tl.program_id(1) * (M0 + M1)
    b, s, inside = _sites(B, sites, tiles_s, tile, N, BS)
    x_at, raw_at = _columns(x_strides, b, s, LAYOUT), _columns(raw_strides, b, s, LAYOUT)
    m0, m1 = first + tl.arange(0, M0), first + M0 + tl.arange(0, M1 if M1 else 1)
    acc0, acc1 = tl.zeros((M0, N), FLOAT), tl.zeros((M1 if M1 else 1, N), FLOAT)
    total = tl.zeros((_K, N), FLOAT)
    PASSING: tl.constexpr = C // 2 // _K * _K  # the channels before it pass the coupling
    for c0 in range(0, PASSING, _K):
        c = c0 + tl.arange(0, _K)
        h, _ = _load_h(x_ptr, raw_ptr, bias_ptr, x_at, raw_at, x_strides, raw_strides, c, inside, C, False, INVERSE, MAP, LAYOUT)
        acc0 = _add_product(acc0, weight_ptr, m0, c, h, C, PRECISION)
        if M1:
            acc1 = _add_product(acc1, weight_ptr, m1, c, h, C, PRECISION)
    for c0 in range(PASSING, C, _K):
        c = c0 + tl.arange(0, _K)
        h, log = _load_h(x_ptr, raw_ptr, bias_ptr, x_at, raw_at, x_strides, raw_strides, c, inside, C, COUPLES, INVERSE, MAP, LAYOUT)
        total += log
        acc0 = _add_product(acc0, weight_ptr, m0, c, h, C, PRECISION)
        if M1:
            acc1 = _add_product(acc1, weight_ptr, m1, c, h, C, PRECISION)
    y_at, passing_at = _columns(y_strides, b, s, LAYOUT), _columns(passing_strides, b, s, LAYOUT)
    _store_y(acc0, m0, y_ptr, passing_ptr, bias_ptr, y_at, passing_at, y_strides, passing_strides, inside, C, INVERSE, PASSES, LAYOUT)
    if M1:
        _store_y(acc1, m1, y_ptr, passing_ptr, bias_ptr, y_at, passing_at, y_strides, passing_strides, inside, C, INVERSE, PASSES, LAYOUT)
    if COUPLES:
        BB: tl.constexpr = N // BS
        logabsdet = tree_sum(tl.reshape(tl.trans(total), (BB, BS * _K)), BB, BS * _K, LOG2_LOGS)
        sample = (tile // tiles_s).to(tl.int64) * BB + tl.arange(0, BB)
        tl.store(log_ptr + sample * tiles_s + tile % tiles_s, logabsdet, mask=(sample < B) & (first == 0))


@triton.jit
def _load_dy(
    dy_ptr, dpassing_ptr, dy_at, dpassing_at, dy_strides, dpassing_strides, o, inside,
    C: tl.constexpr, PASSES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Channels o of dy, with what the next conditioner sends to the first half."""
    dy = tl.load(dy_ptr + dy_at + _rows(dy_strides, o, LAYOUT), mask=(o < C)[:, None] & inside[None, :], other=0.0)
    if PASSES:
        here = (o < C // 2)[:, None] & inside[None, :]
        dy += tl.load(dpassing_ptr + dpassing_at + _rows(dpassing_strides, o, LAYOUT), mask=here, other=0.0)
    return dy


@triton.jit
def _add_transposed_product(acc, weight_ptr, c, o, dy, C: tl.constexpr, PRECISION: tl.constexpr):
    w = tl.load(weight_ptr + o[None, :] * C + c[:, None], mask=(o < C)[None, :] & (c < C)[:, None], other=0.0)
    return tl.dot(w, dy, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _store_dx(
    dh, c, dlog_ptr, x_ptr, raw_ptr, dx_ptr, draw_ptr, b, s, inside, dlog_stride, x_strides, raw_strides, dx_strides, draw_strides,
    C: tl.constexpr, COUPLES: tl.constexpr, INVERSE: tl.constexpr, MAP: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Channels c of dh go back through the coupling."""
    here = (c < C)[:, None] & inside[None, :]
    if COUPLES:
        i = c - C // 2
        coupled = (i >= 0)[:, None] & here
        raw_at = raw_ptr + _columns(raw_strides, b, s, LAYOUT)
        old = tl.load(x_ptr + _columns(x_strides, b, s, LAYOUT) + _rows(x_strides, c, LAYOUT), mask=coupled, other=0.0)
        raw = tl.load(raw_at + _rows(raw_strides, 2 * i + 1, LAYOUT), mask=coupled, other=0.0)
        dlogabsdet = tl.load(dlog_ptr + b * dlog_stride, mask=inside, other=0.0)[None, :]
        v, _ = scale_and_log(raw, MAP, INVERSE)
        dold = dh * v
        if INVERSE:
            dshift = -dh
            along = dold * old
        else:
            dshift = dold
            along = dold * (old + tl.load(raw_at + _rows(raw_strides, 2 * i, LAYOUT), mask=coupled, other=0.0))
        draw = dlog_scale(raw, MAP, INVERSE) * (along + dlogabsdet)
        draw_at = draw_ptr + _columns(draw_strides, b, s, LAYOUT)
        tl.store(draw_at + _rows(draw_strides, 2 * i, LAYOUT), dshift, mask=coupled)
        tl.store(draw_at + _rows(draw_strides, 2 * i + 1, LAYOUT), draw, mask=coupled)
        dh = tl.where(coupled, dold, dh)
    tl.store(dx_ptr + _columns(dx_strides, b, s, LAYOUT) + _rows(dx_strides, c, LAYOUT), dh, mask=here)


@triton.jit(do_not_specialize=["B"])
def _dx_kernel(
    dy_ptr, dpassing_ptr, dlog_ptr, x_ptr, raw_ptr, weight_ptr, dx_ptr, draw_ptr,
    B, sites, tiles_s, dlog_stride, dy_strides, dpassing_strides, x_strides, raw_strides, dx_strides, draw_strides,
    C: tl.constexpr, COUPLES: tl.constexpr, INVERSE: tl.constexpr, PASSES: tl.constexpr, MAP: tl.constexpr, LAYOUT: tl.constexpr,
    FLOAT: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, BS: tl.constexpr, M0: tl.constexpr, M1: tl.constexpr,
):  # fmt: skip
    # dh = W^T dy [M0 + M1 channels, N sites], which the coupling takes in registers
    first = tl.program_id(1) * (M0 + M1)
    b, s, inside = _sites(B, sites, tiles_s, tl.program_id(0), N, BS)
    dy_at, dpassing_at = _columns(dy_strides, b, s, LAYOUT), _columns(dpassing_strides, b, s, LAYOUT)
    c0, c1 = first + tl.arange(0, M0), first + M0 + tl.arange(0, M1 if M1 else 1)
    dh0, dh1 = tl.zeros((M0, N), FLOAT), tl.zeros((M1 if M1 else 1, N), FLOAT)
    for o0 in range(0, C, _K):
        o = o0 + tl.arange(0, _K)
        dy = _load_dy(dy_ptr, dpassing_ptr, dy_at, dpassing_at, dy_strides, dpassing_strides, o, inside, C, PASSES, LAYOUT)
        dh0 = _add_transposed_product(dh0, weight_ptr, c0, o, dy, C, PRECISION)
        if M1:
            dh1 = _add_transposed_product(dh1, weight_ptr, c1, o, dy, C, PRECISION)
    _store_dx(
        dh0, c0, dlog_ptr, x_ptr, raw_ptr, dx_ptr, draw_ptr, b, s, inside, dlog_stride, x_strides, raw_strides, dx_strides, draw_strides,
        C, COUPLES, INVERSE, MAP, LAYOUT,
    )  # fmt: skip
    if M1:
        _store_dx(
            dh1, c1, dlog_ptr, x_ptr, raw_ptr, dx_ptr, draw_ptr, b, s, inside, dlog_stride, x_strides, raw_strides, dx_strides,
            draw_strides, C, COUPLES, INVERSE, MAP, LAYOUT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "tiles", "per_part"])
def _dweight_kernel(
    dy_ptr, dpassing_ptr, x_ptr, raw_ptr, bias_ptr, dweight_ptr, sum_ptr,
    B, tiles, per_part, sites, tiles_s, dy_strides, dpassing_strides, x_strides, raw_strides,
    C: tl.constexpr, COUPLES: tl.constexpr, INVERSE: tl.constexpr, PASSES: tl.constexpr, MAP: tl.constexpr, LAYOUT: tl.constexpr,
    FLOAT: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, BS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    # dweight [parts, C, C]: M outputs and M channels of h, summed over some tiles; sums of dy [parts, C]
    BLOCKS: tl.constexpr = (C + M - 1) // M
    part, block_o, block_c = tl.program_id(0), tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
    o, c = block_o * M + tl.arange(0, M), block_c * M + tl.arange(0, M)
    dweight, total = tl.zeros((M, M), FLOAT), tl.zeros((M,), FLOAT)
    for tile in range(part * per_part, tl.minimum((part + 1) * per_part, tiles)):
        b, s, inside = _sites(B, sites, tiles_s, tile, N, BS)
        x_at, raw_at = _columns(x_strides, b, s, LAYOUT), _columns(raw_strides, b, s, LAYOUT)
        dy_at, dpassing_at = _columns(dy_strides, b, s, LAYOUT), _columns(dpassing_strides, b, s, LAYOUT)
        dy = _load_dy(dy_ptr, dpassing_ptr, dy_at, dpassing_at, dy_strides, dpassing_strides, o, inside, C, PASSES, LAYOUT)
        h, _ = _load_h(x_ptr, raw_ptr, bias_ptr, x_at, raw_at, x_strides, raw_strides, c, inside, C, COUPLES, INVERSE, MAP, LAYOUT)
        # a tile's sum begins anew: one chain over all sites would round more
        dweight += tl.dot(dy, tl.trans(h), input_precision=PRECISION, out_dtype=FLOAT)
        total += tl.sum(dy, 1)
    at = dweight_ptr + (part.to(tl.int64) * C + o[:, None]) * C + c[None, :]
    tl.store(at, dweight, mask=(o < C)[:, None] & (c < C)[None, :])
    tl.store(sum_ptr + part.to(tl.int64) * C + o, total, mask=(o < C) & (block_c == 0))


class _Tiles(NamedTuple):
    """A tile is N sites: BS neighbouring ones of each of N / BS samples, in `tiles_s` tiles a sample."""

    N: int
    BS: int
    tiles_s: int

    @classmethod
    def of(cls, sites: int, N: int) -> "_Tiles":
        BS = min(triton.next_power_of_2(sites), N)
        return cls(N, BS, cdiv(sites, BS))

    def count(self, batch: int) -> int:
        return cdiv(batch, self.N // self.BS) * self.tiles_s


class _Plan(NamedTuple):
    """A launch over tiles, `blocks` programs for each, or for each of some parts of them."""

    launch: Launch
    tiles: _Tiles
    blocks: int
    sum_segments: SumSegments | None


_forward_plans, _dx_plans, _dweight_plans = Plans(), Plans(), Plans()


def glow_step_triton(
    x: Tensor, raw: Tensor | None, weight: Tensor | None, bias: Tensor | None, inverse: bool, passes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.shape[0], x.shape[-1]
    if weight is None:
        y, logabsdet = _couple(x, raw, inverse)
        return y, logabsdet, like_x(x, channels // 2).copy_(y[..., : channels // 2]) if passes else x.new_empty(0)
    y, passing = like_x(x, channels), like_x(x, channels // 2) if passes else x.new_empty(0)
    if not x.numel():
        return y, x.new_zeros(batch), passing
    rows = [_flat(t) for t in (x, raw, y, passing if passes else None)]
    plan = _planned(_forward_plans, _plan_forward, rows, inverse)
    if raw is None:
        log = x.new_zeros(batch)
    else:
        log = x.new_empty(batch if plan.sum_segments is None else (batch, plan.tiles.tiles_s))
    plan.launch((plan.tiles.count(batch), plan.blocks), (*rows[:2], weight.contiguous(), bias.contiguous(), *rows[2:], log), batch)
    return y, log if plan.sum_segments is None else plan.sum_segments(log), passing


def glow_step_backward_triton(
    dy: Tensor,
    dlogabsdet: Tensor,
    dpassing: Tensor | None,
    x: Tensor,
    raw: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels = x.shape[0], x.shape[-1]
    if weight is None:
        if dpassing is not None:
            dy = dy + torch.nn.functional.pad(dpassing, (0, channels // 2))
        return *_couple_backward(dy, dlogabsdet, x, raw, inverse), x.new_empty(0, 0), x.new_empty(0)
    weight, bias = weight.contiguous(), bias.contiguous()
    dx, draw = like_x(x, channels), x.new_empty(0) if raw is None else like_x(raw, channels)
    if not x.numel():
        return dx, draw, torch.zeros_like(weight), torch.zeros_like(bias)
    given = [_flat(t) for t in (dy, dpassing, x, raw)]
    made = [_flat(dx), None if raw is None else _flat(draw)]
    plan = _planned(_dx_plans, _plan_dx, [*given, *made], inverse, dlogabsdet.stride(0))
    plan.launch((plan.tiles.count(batch), plan.blocks), (*given[:2], dlogabsdet, *given[2:], weight, *made), batch)
    plan = _planned(_dweight_plans, _plan_dweight, given, inverse)
    tiles = plan.tiles.count(batch)
    per_part = cdiv(tiles, max(1, _PROGRAMS // plan.blocks))
    parts = cdiv(tiles, per_part)
    dweight, sums = x.new_empty(parts, channels, channels), x.new_empty(parts, channels)
    plan.launch((parts, plan.blocks), (*given, bias, dweight, sums), batch, tiles, per_part)
    dweight, sums = (dweight[0], sums[0]) if parts == 1 else (dweight.sum(0), sums.sum(0))
    return dx, draw, dweight, -sums if inverse else (weight * sums[:, None]).sum(0)  # forward, the bias is a part of h


def _planned(plans: Plans, make: Callable[..., _Plan], rows: list[Tensor | None], *options: int) -> _Plan:
    """rows: [batch, channels, sites] or None."""
    x = rows[0]
    key = (x.dtype, _precision(x), x.shape[1:], *options, *(None if t is None else t.stride() for t in rows))
    return plans.get(key) or plans.add(key, make(*rows, *options))


def _plan_forward(x: Tensor, raw: Tensor | None, y: Tensor, passing: Tensor | None, inverse: bool) -> _Plan:
    M0, M1 = _pieces(x)
    tiles, meta = _common([x, raw, y, passing], inverse, max(64, 4096 // (M0 + M1)), 4 if M0 + M1 < 64 else 8)
    launch = Launch(
        _glow_step_kernel, x.shape[2], tiles.tiles_s, *_strides(x, raw, y, passing), **meta,
        COUPLES=raw is not None, PASSES=passing is not None, M0=M0, M1=M1, LOG2_LOGS=(tiles.BS * _K.value).bit_length() - 1,
    )  # fmt: skip
    sums = raw is not None and tiles.tiles_s > 1
    return _Plan(launch, tiles, cdiv(x.shape[1], M0 + M1), SumSegments(tiles.tiles_s) if sums else None)


def _plan_dx(
    dy: Tensor, dpassing: Tensor | None, x: Tensor, raw: Tensor | None, dx: Tensor, draw: Tensor | None, inverse: bool, dlog_stride: int
) -> _Plan:
    M0, M1 = _pieces(x)
    tiles, meta = _common([dy, dpassing, x, raw, dx, draw], inverse, max(64, 4096 // (M0 + M1)), 8)
    launch = Launch(
        _dx_kernel, x.shape[2], tiles.tiles_s, dlog_stride, *_strides(dy, dpassing, x, raw, dx, draw), **meta,
        COUPLES=raw is not None, PASSES=dpassing is not None, M0=M0, M1=M1,
    )  # fmt: skip
    return _Plan(launch, tiles, cdiv(x.shape[1], M0 + M1), None)


def _plan_dweight(dy: Tensor, dpassing: Tensor | None, x: Tensor, raw: Tensor | None, inverse: bool) -> _Plan:
    M = max(16, triton.next_power_of_2(min(x.shape[1], 64)))
    tiles, meta = _common([dy, dpassing, x, raw], inverse, 2048 // M, 4 if M < 64 and x.dtype == torch.float32 else 8)
    launch = Launch(
        _dweight_kernel, x.shape[2], tiles.tiles_s, *_strides(dy, dpassing, x, raw), **meta,
        COUPLES=raw is not None, PASSES=dpassing is not None, M=M,
    )  # fmt: skip
    return _Plan(launch, tiles, cdiv(x.shape[1], M) ** 2, None)


def _pieces(x: Tensor) -> tuple[int, int]:
    """Channels that a program computes, as powers of 2: 48 = 32 + 16 need no 64. With more than 128, several programs make h."""
    channels = x.shape[1] if x.shape[1] <= 128 else 96
    first = min(64, max(16, triton.next_power_of_2(channels + 1) // 2))
    return first, max(16, triton.next_power_of_2(channels - first)) if channels > first else 0


def _common(rows: list[Tensor | None], inverse: bool, N: int, warps: int) -> tuple[_Tiles, dict[str, object]]:
    """The tiles, and the compile-time arguments that all kernels share. N and warps: the most sites that spill no register."""
    x, present = rows[0], [t for t in rows if t is not None]
    channels_first = x.shape[2] > 1 and x.stride(1) >= x.stride(2)
    slow = (0, 1) if channels_first else (0, 2)
    layout = Layout(True, channels_first, math.gcd(16, *(t.stride(d) for t in present for d in slow)))
    tiles = _Tiles.of(x.shape[2], 1 << (N // (x.itemsize // 4)).bit_length() - 1)
    return tiles, {
        "C": x.shape[1],
        "INVERSE": inverse,
        "MAP": _MAP,
        "LAYOUT": layout,
        "FLOAT": FLOATS[x.dtype],
        "PRECISION": _precision(x),
        "N": tiles.N,
        "BS": tiles.BS,
        "num_warps": warps,
        "num_stages": 2,
    }


def _strides(*rows: Tensor | None) -> list[tuple[int, int, int]]:
    return [(0, 0, 0) if t is None else t.stride() for t in rows]


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _flat(t: Tensor | None) -> Tensor | None:
    """[batch, *sites, channels] as [batch, channels, sites]; a copy where the sites are no one dimension in memory."""
    if t is None:
        return None
    t = t.movedim(-1, 1)
    return t[:, :, None] if t.dim() == 2 else t.flatten(2)


def _couple(x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    given, x, raw = x, _flat(x)[..., None], _flat(raw)[..., None]
    y, logabsdet = coupling_triton(x, raw[:, 0::2], raw[:, 1::2], None, *_packed(inverse))
    return laid_out(given, _unflat(y, given.shape)), logabsdet


def _couple_backward(dy: Tensor, dlogabsdet: Tensor, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    draw = like_x(raw, raw.shape[-1])
    dy, images, raw = (_flat(t)[..., None] for t in (dy, x, raw))
    dx, dshift, ds, _ = coupling_backward_triton(dy, dlogabsdet, images, raw[:, 0::2], raw[:, 1::2], None, *_packed(inverse), False)
    for i, d in enumerate((dshift, ds)):
        draw[..., i::2] = _unflat(d, (*x.shape[:-1], x.shape[-1] // 2))
    return laid_out(x, _unflat(dx, x.shape)), draw  # dx lies as dy


def _unflat(t: Tensor, shape: Sequence[int]) -> Tensor:
    """[batch, channels, sites, 1] as [batch, *sites, channels]."""
    return t.movedim(1, -1).reshape(shape)


def _packed(inverse: bool) -> tuple:
    return int(Part.SECOND_HALF), int(SCALE.kind), *SCALE.packed, int(Form.SHIFT_SCALE), inverse
