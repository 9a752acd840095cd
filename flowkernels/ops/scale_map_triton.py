"""Scale maps and affine forms as Triton device functions: flowkernels/ops/scale_map.py for kernels, as csrc/scale_map.h is.

Everything is float32 or float64, like its arguments. The forms need exp and log alone, so that the GPU and Triton's interpreter run
the same code; a tensor's own exp in Triton is exp2 of a product, 20 units in the last place wrong at 80.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from .._triton import interpreting
from .scale_map import ScaleKind, ScaleMap

_EXP_HALF = tl.constexpr(int(ScaleKind.EXP_HALF))
_EXP_CLAMPED = tl.constexpr(int(ScaleKind.EXP_CLAMPED))
_EXP_TANH = tl.constexpr(int(ScaleKind.EXP_TANH))
_EXP_ATAN = tl.constexpr(int(ScaleKind.EXP_ATAN))
_SOFTCLIP = tl.constexpr(int(ScaleKind.SOFTCLIP))
_SIGMOID = tl.constexpr(int(ScaleKind.SIGMOID))
_SOFTPLUS = tl.constexpr(int(ScaleKind.SOFTPLUS))
_TO_INTEGER = tl.constexpr(12583039.0)  # 1.5 * 2^23 + 127: a float32 near it has no fraction
_INTERPRETED = tl.constexpr(interpreting())
_LOG1P = tl.constexpr(
    (-0.0135251526, 0.0419222564, -0.0832259208, 0.124957435, -0.161508277, 0.199063808, -0.249903351, 0.333328635, -0.49999994)
)


class Map(NamedTuple):
    """A scale map as a compile-time argument: constants are exact in float64, and folded."""

    kind: int
    p0: float
    p1: float
    log_p1: float

    @classmethod
    def of(cls, scale: ScaleMap) -> "Map":
        p0, p1 = scale.packed
        if scale.kind == ScaleKind.SOFTCLIP:
            p0 = -1 / math.log(p0)
        if scale.kind == ScaleKind.EXP_ATAN:
            p0 *= 0.636
        return cls(int(scale.kind), p0, p1, math.log(p1) if p1 > 0 else 0.0)


@triton.jit
def _divide(a, b):
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)  # `/` is an approximation in float32


@triton.jit
def _quick_divide(a, b):
    """_divide without its branch for operands near the ends of the range; within, the same bits. It needs 2^-100 < b < 2^126."""
    if b.dtype == tl.float64:
        return a / b
    else:
        if _INTERPRETED:
            r = tl.full(b.shape, 1.0, b.dtype) / b
        else:
            r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], tl.float32, is_pure=True, pack=1)
        r = tl.fma(tl.fma(-b, r, 1.0), r, r)
        q = a * r
        return tl.fma(tl.fma(-b, q, a), r, q)


@triton.jit
def _reciprocal(v):
    return _divide(tl.full(v.shape, 1.0, v.dtype), v)


@triton.jit
def exp(x):
    """exp, within 1.3 units in the last place of an exact exp2; a GPU's adds up to 2, as it does to CUDA's own expf."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        t = tl.fma(x, 1.4426950408889634, _TO_INTEGER)  # rounded to an integer n, whose biased exponent is in the lowest bits
        t = tl.minimum(tl.maximum(t, _TO_INTEGER - 126.0), _TO_INTEGER + 127.0)  # beyond it r grows, and subnormals are rounded once
        n = t - _TO_INTEGER
        r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, x))  # x - n log 2, the first product exact
        return tl.exp2(r * 1.4426950408889634) * (t.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _log1p(u):
    """log(1 + u) for u > -1: log of the rounded sum, and what its rounding lost."""
    w = u + 1.0
    return tl.log(w) + (u - (w - 1.0)) / w


@triton.jit
def _log1p_unit(u):
    """log(1 + u) for 0 <= u <= 1; the coefficients are those of csrc/cpu/simd_math.h."""
    if u.dtype == tl.float64:
        y = _log1p(u)
    else:
        p = tl.full(u.shape, 0.00203769049, tl.float32)
        for i in tl.static_range(9):
            p = tl.fma(p, u, _LOG1P[i])
        y = tl.fma(p, u * u, u)
    return y


@triton.jit
def _tanh(x):
    """t / (t + 2) with t = exp(y) - 1, y = 2 |x|: as (u - 1) y / log(u), u = exp(y), in which the rounding of u fades (Kahan)."""
    y = tl.abs(x) * 2.0
    y = tl.where(y > 44.0, 44.0, y)
    u = exp(y)
    exact = u > 1.0
    t = tl.where(exact, (u - 1.0) * _quick_divide(y, tl.log(tl.where(exact, u, 2.0))), y)
    t = _quick_divide(t, t + 2.0)
    return tl.where(x < 0, -t, t)


@triton.jit
def _atan(x):
    """Gauss's continued fraction, a / (1 + a^2 / (3 + (2a)^2 / (5 + ...))): within tan(pi / 8) each level wins a factor of 25."""
    a = tl.abs(x)
    large = a > 2.414213562373095
    middle = (a > 0.4142135623730951) & (a <= 2.414213562373095)
    numerator = tl.where(large, -1.0, tl.where(middle, a - 1.0, a))
    a = _divide(numerator, tl.where(large, a, tl.where(middle, a + 1.0, 1.0)))
    z = a * a
    p_before = a * 0.0
    p = a
    q_before = p_before + 1.0
    q = q_before
    LEVELS: tl.constexpr = 12 if x.dtype == tl.float64 else 6
    for i in tl.static_range(1, LEVELS):
        p_next = (2 * i + 1) * p + (i * i) * z * p_before
        q_next = (2 * i + 1) * q + (i * i) * z * q_before
        p_before = p
        q_before = q
        p = p_next
        q = q_next
    zero = z * 0.0  # where() of two numbers would be float32
    a = _divide(p, q) + tl.where(large, zero + 1.5707963267948966, tl.where(middle, zero + 0.7853981633974483, zero))
    return tl.where(x < 0, -a, a)


@triton.jit
def _sigmoid(x, e):
    """sigmoid(x), given e = exp(-|x|)."""
    return _quick_divide(tl.where(x > 0, 1.0, e), e + 1.0)


@triton.jit
def _softplus(x, e):
    """log(1 + exp(x)), given e = exp(-|x|)."""
    return tl.where(x > 0, x, 0.0) + _log1p_unit(e)


@triton.jit
def log_sigma(s, MAP: tl.constexpr):
    """log sigma of the maps that are an exp."""
    if MAP.kind == _EXP_HALF:
        log = s * 0.5
    elif MAP.kind == _EXP_CLAMPED:
        log = tl.where(s < MAP.p0, MAP.p0, tl.where(s > MAP.p1, MAP.p1, s))
    elif MAP.kind == _EXP_TANH:
        log = _tanh(s * (1.0 / MAP.p1)) * MAP.p0
    elif MAP.kind == _EXP_ATAN:
        log = _atan(s) * MAP.p0
    elif MAP.kind == _SOFTCLIP:
        d = tl.abs(s) * MAP.p0 + 1.0
        log = _quick_divide(s, d) if MAP.p0 <= 0.25 else _divide(s, d)
    else:
        log = s
    return log


@triton.jit
def _softplus_factor(s, e):
    """softplus(s) where s > 0, softplus(s) / exp(s) elsewhere: neither underflows."""
    tiny = e < 1e-30
    ratio = tl.where(tiny, 1.0, _divide(_log1p_unit(e), tl.where(tiny, 1.0, e)))
    return tl.where(s > 0, _softplus(s, e), ratio)


@triton.jit
def scale_and_log(s, MAP: tl.constexpr, DIVIDES: tl.constexpr):
    """v and log v, where v is sigma(s), or 1 / sigma(s) if DIVIDES."""
    if MAP.kind == _SIGMOID:
        x = s + MAP.p0
        e = exp(-tl.abs(x))
        if MAP.p1 == 0.0:
            v = exp(-x) + 1.0 if DIVIDES else _sigmoid(x, e)
            log = -_softplus(-x, e)
        else:
            v = _sigmoid(x, e) + MAP.p1
            log = tl.where(x > 0, _log1p(MAP.p1 - _sigmoid(-x, e)), tl.log(v))  # near 1, log1p of what it differs by
            v = _reciprocal(v) if DIVIDES else v
    elif MAP.kind == _SOFTPLUS:
        e = exp(-tl.abs(s))
        v = _softplus(s, e) + MAP.p0
        log = tl.log(v) if MAP.p0 > 0.0 else tl.log(_softplus_factor(s, e)) + tl.where(s > 0, 0.0, s)
        over = v > MAP.p1
        v = tl.where(over, MAP.p1, v)
        v = _reciprocal(v) if DIVIDES else v
        log = tl.where(over, MAP.log_p1, log)
    else:
        log = log_sigma(s, MAP)
        if DIVIDES and MAP.kind == _EXP_HALF:
            log = tl.where(log < -MAP.p0, -MAP.p0, log)
        v = exp(-log if DIVIDES else log)
    return v, -log if DIVIDES else log


@triton.jit
def dlog_scale(s, MAP: tl.constexpr, DIVIDES: tl.constexpr):
    """Derivative of log v."""
    if MAP.kind == _EXP_HALF:
        d = tl.full(s.shape, 0.5, s.dtype)
        if DIVIDES:
            d = tl.where(s * -0.5 > MAP.p0, 0.0, d)
    elif MAP.kind == _EXP_TANH:
        t = _tanh(s * (1.0 / MAP.p1))
        d = (1.0 - t * t) * (MAP.p0 / MAP.p1)
    elif MAP.kind == _EXP_ATAN:
        d = _reciprocal(s * s + 1.0) * MAP.p0
    elif MAP.kind == _SOFTCLIP:
        d = tl.abs(s) * MAP.p0 + 1.0
        one = tl.full(s.shape, 1.0, s.dtype)
        d = _quick_divide(one, d) if MAP.p0 <= 0.25 else _divide(one, d)
        d = d * d
    elif MAP.kind == _SIGMOID:
        x = s + MAP.p0
        e = exp(-tl.abs(x))
        d = _sigmoid(-x, e)
        if MAP.p1 != 0.0:
            sigma = _sigmoid(x, e)
            d = _divide(d * sigma, sigma + MAP.p1)
    elif MAP.kind == _SOFTPLUS:
        e = exp(-tl.abs(s))
        sigma = _softplus(s, e) + MAP.p0
        if MAP.p0 == 0.0:
            d = _reciprocal((e + 1.0) * _softplus_factor(s, e))
        else:
            d = _divide(_sigmoid(s, e), sigma)
        d = tl.where(sigma > MAP.p1, 0.0, d)
    else:
        d = tl.full(s.shape, 1.0, s.dtype)  # exp; and exp_clamped, straight through
    return -d if DIVIDES else d


@triton.jit
def complement(s, MAP: tl.constexpr):
    """1 - sigma(s)."""
    if MAP.kind == _SIGMOID:
        x = s + MAP.p0
        c = _sigmoid(-x, exp(-tl.abs(x))) - MAP.p1
    else:
        sigma, _ = scale_and_log(s, MAP, False)
        c = 1.0 - sigma
    return c
