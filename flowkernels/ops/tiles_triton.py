"""What the elementwise Triton kernels share: tiles over [batch, channels, sites] in any layout, and sums in a fixed order."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import Launch, cdiv

TILE = 1024  # elements; with 4 warps, 8 a thread: two 16-byte loads of float32, one of half precision
STAGES = tl.constexpr(3)  # two tiles are copied to shared memory while one is computed: ptxas would load each tensor where it is first used
FLOATS = {torch.float16: tl.float32, torch.bfloat16: tl.float32, torch.float32: tl.float32, torch.float64: tl.float64}

# A multiply and an add are never fused: the GPU rounds as the interpreter does, which runs the tests
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class Layout(NamedTuple):
    """What a kernel may assume of all tensors' strides, as a compile-time argument."""

    flat: bool  # height and width are one dimension in memory
    channels_first: bool  # the sites of a channel lie together, not the channels of a site
    align: int  # divides every stride but the fastest; rows of 8 features would be read one at a time without it


class Tiling(NamedTuple):
    """A program handles BB samples, and of them one segment: `per_segment` tiles [BB, BC, BS] of channels and sites, one by one.

    Nothing in it depends on the batch, so that neither do the sums of a sample.
    """

    BB: int
    BC: int
    BS: int
    tiles_s: int
    per_segment: int
    segments: int
    channels_first: bool

    @classmethod
    def of(cls, x: Tensor, channels: int) -> "Tiling":
        """For `channels` channels of x [batch, channels, *sites]."""
        sites = x.shape[2:].numel()
        channels_first = sites > 1 and x.stride(1) >= min(x.stride()[2:])
        if channels_first:
            BS = min(triton.next_power_of_2(sites), TILE)
            BC = min(triton.next_power_of_2(channels), TILE // BS)
        else:
            BC = min(triton.next_power_of_2(channels), TILE)
            BS = min(triton.next_power_of_2(sites), TILE // BC)
        tiles_s = cdiv(sites, BS)
        tiles = cdiv(channels, BC) * tiles_s
        # up to 8 tiles need no second kernel for their sum; more are split finely, as a small batch has no other programs
        per_segment = tiles if tiles <= 8 else max(2, min(4, tiles // 64), cdiv(tiles, 1024))
        return cls(TILE // (BC * BS), BC, BS, tiles_s, per_segment, cdiv(tiles, per_segment), channels_first)

    def grid(self, batch: int) -> tuple[int, int]:
        """One sample's segments follow one another: programs that run side by side read one stretch of memory, not many far apart."""
        return cdiv(batch, self.BB) * self.segments, 1

    def layout(self, x: Tensor, all_strides: list[tuple[int, int, int, int]]) -> "Layout":
        flat = x.dim() < 4 or x.shape[2:-1].numel() == 1 or all(s[2] == x.shape[-1] * s[3] for s in all_strides)
        slow = (0, 1) if self.channels_first else (0, 2, 3)
        align = math.gcd(16, *(s[i] for s in all_strides for i in slow))
        return Layout(flat, self.channels_first, align)


def strides(t: Tensor) -> tuple[int, int, int, int]:
    """Strides over (batch, channel, height, width)."""
    if t.dim() == 2:
        return *t.stride(), 0, 0
    if t.dim() == 3:
        return t.stride(0), t.stride(1), 0, t.stride(2)
    return t.stride()


def four_dimensional(t: Tensor | None) -> Tensor | None:
    """Volumes as images; copied only where depth and height do not lie as one dimension."""
    return t.flatten(2, -2) if t is not None and t.dim() > 4 else t


@triton.jit
def offsets(strides, b, c, s, W, LAYOUT: tl.constexpr):
    """Where samples b, channels c and sites s lie: [BB, BC, BS], int64 before anything is multiplied."""
    ALIGN: tl.constexpr = LAYOUT.align
    b_at = tl.multiple_of(b.to(tl.int64) * strides[0], ALIGN)
    c_at = c.to(tl.int64) * strides[1]
    if LAYOUT.flat:
        s_at = s.to(tl.int64) * strides[3]
    else:
        s_at = (s // W).to(tl.int64) * strides[2] + (s % W).to(tl.int64) * strides[3]
    if LAYOUT.channels_first:
        c_at = tl.multiple_of(c_at, ALIGN)
    else:
        s_at = tl.multiple_of(s_at, ALIGN)
    return (b_at[:, None] + c_at[None, :])[:, :, None] + s_at[None, None, :]


@triton.jit
def tree_sum(v, ROWS: tl.constexpr, N: tl.constexpr, LOG2_N: tl.constexpr):
    """Sums of the rows of [ROWS, N], N a power of 2, by neighbours: a sum over all N at once depends on how the compiler lays it out."""
    for i in tl.static_range(LOG2_N):
        v = tl.sum(tl.reshape(v, (ROWS, N >> (i + 1), 2)), 2)
    return tl.reshape(v, (ROWS,))


@triton.jit(do_not_specialize=["B"])
def _sum_segments_kernel(parts_ptr, total_ptr, B, SEGMENTS, ROWS: tl.constexpr, N: tl.constexpr, LOG2_N: tl.constexpr):
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, N)
    inside = (b < B)[:, None] & (i < SEGMENTS)[None, :]
    parts = tl.load(parts_ptr + b[:, None] * SEGMENTS + i[None, :], mask=inside, other=0.0)
    tl.store(total_ptr + b, tree_sum(parts, ROWS, N, LOG2_N), mask=b < B)


class SumSegments:
    """[batch, segments] to [batch]."""

    def __init__(self, segments: int) -> None:
        n = triton.next_power_of_2(segments)
        self.rows = max(1, TILE // n)
        self.launch = Launch(_sum_segments_kernel, segments, ROWS=self.rows, N=n, LOG2_N=n.bit_length() - 1, **OPTIONS)

    def __call__(self, parts: Tensor) -> Tensor:
        batch = parts.shape[0]
        total = parts.new_empty(batch)
        self.launch((cdiv(batch, self.rows), 1), (parts, total), batch)
        return total
