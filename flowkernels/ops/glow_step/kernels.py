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
from torch import Tensor

from ..._launch import Launch, Plans, cdiv
from ..coupling.kernels import coupling_backward_triton, coupling_triton
from ..coupling.part import Part
from ..scale_map import Form
from ..scale_map_triton import Map
from ..tiles_triton import FLOATS, Layout, SumSegments
from .device import CHANNELS, dweight_kernel, dx_kernel, glow_step_kernel
from .reference import SCALE, laid_out, like_x

_MAP = Map.of(SCALE)
_PROGRAMS = 264  # that sum over sites: two for each multiprocessor of an H100 or H200


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
        glow_step_kernel, x.shape[2], tiles.tiles_s, *_strides(x, raw, y, passing), **meta,
        COUPLES=raw is not None, PASSES=passing is not None, M0=M0, M1=M1, LOG2_LOGS=(tiles.BS * CHANNELS.value).bit_length() - 1,
    )  # fmt: skip
    sums = raw is not None and tiles.tiles_s > 1
    return _Plan(launch, tiles, cdiv(x.shape[1], M0 + M1), SumSegments(tiles.tiles_s) if sums else None)


def _plan_dx(
    dy: Tensor, dpassing: Tensor | None, x: Tensor, raw: Tensor | None, dx: Tensor, draw: Tensor | None, inverse: bool, dlog_stride: int
) -> _Plan:
    M0, M1 = _pieces(x)
    tiles, meta = _common([dy, dpassing, x, raw, dx, draw], inverse, max(64, 4096 // (M0 + M1)), 8)
    launch = Launch(
        dx_kernel, x.shape[2], tiles.tiles_s, dlog_stride, *_strides(dy, dpassing, x, raw, dx, draw), **meta,
        COUPLES=raw is not None, PASSES=dpassing is not None, M0=M0, M1=M1,
    )  # fmt: skip
    return _Plan(launch, tiles, cdiv(x.shape[1], M0 + M1), None)


def _plan_dweight(dy: Tensor, dpassing: Tensor | None, x: Tensor, raw: Tensor | None, inverse: bool) -> _Plan:
    M = max(16, triton.next_power_of_2(min(x.shape[1], 64)))
    tiles, meta = _common([dy, dpassing, x, raw], inverse, 2048 // M, 4 if M < 64 and x.dtype == torch.float32 else 8)
    launch = Launch(
        dweight_kernel, x.shape[2], tiles.tiles_s, *_strides(dy, dpassing, x, raw), **meta,
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
