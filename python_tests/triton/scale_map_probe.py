"""A kernel that evaluates a scale map; imported after Triton's interpreter has been turned on or off."""

import triton
import triton.language as tl

from flowkernels.ops.scale_map_triton import Map, complement, dlog_scale, scale_and_log

__all__ = ["Map", "probe"]


@triton.jit
def probe(s_ptr, out_ptr, n, MAP: tl.constexpr, DIVIDES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    s = tl.load(s_ptr + i, mask=i < n, other=0.0)
    v, log = scale_and_log(s, MAP, DIVIDES)
    tl.store(out_ptr + i, v, mask=i < n)
    tl.store(out_ptr + n + i, log, mask=i < n)
    tl.store(out_ptr + 2 * n + i, dlog_scale(s, MAP, DIVIDES), mask=i < n)
    tl.store(out_ptr + 3 * n + i, complement(s, MAP), mask=i < n)
