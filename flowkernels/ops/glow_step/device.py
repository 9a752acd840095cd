"""The joined Glow step on a GPU: what a program does. kernels.py has the reckoning and the launches."""

import triton
import triton.language as tl

from ..scale_map_triton import dlog_scale, scale_and_log
from ..tiles_triton import tree_sum

CHANNELS = tl.constexpr(16)  # that are loaded at a time, and the fewest that tl.dot takes


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
def glow_step_kernel(
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
    total = tl.zeros((CHANNELS, N), FLOAT)
    PASSING: tl.constexpr = C // 2 // CHANNELS * CHANNELS  # the channels before it pass the coupling
    for c0 in range(0, PASSING, CHANNELS):
        c = c0 + tl.arange(0, CHANNELS)
        h, _ = _load_h(x_ptr, raw_ptr, bias_ptr, x_at, raw_at, x_strides, raw_strides, c, inside, C, False, INVERSE, MAP, LAYOUT)
        acc0 = _add_product(acc0, weight_ptr, m0, c, h, C, PRECISION)
        if M1:
            acc1 = _add_product(acc1, weight_ptr, m1, c, h, C, PRECISION)
    for c0 in range(PASSING, C, CHANNELS):
        c = c0 + tl.arange(0, CHANNELS)
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
        logabsdet = tree_sum(tl.reshape(tl.trans(total), (BB, BS * CHANNELS)), BB, BS * CHANNELS, LOG2_LOGS)
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
def dx_kernel(
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
    for o0 in range(0, C, CHANNELS):
        o = o0 + tl.arange(0, CHANNELS)
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
def dweight_kernel(
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
