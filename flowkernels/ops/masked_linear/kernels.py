"""Triton kernels of the masked linear map and its gradients. Imported at the first launch, never at package import.

    y[m, n]       = bias[n] + sum_{k < visible[n]} x[m, k] weight[k, n]          [M, N]
    dx[m, k]      = sum_{n: visible[n] > k} dy[m, n] weight[k, n]                [M, K]
    dweight[k, n] = sum_m x[m, k] dy[m, n]  where k < visible[n], else 0         [K, N]

A tile of a result finds in `visible` where its sum meets the staircase: blocks that the whole tile sees are multiplied as they are,
blocks on the boundary are masked by comparison, and the rest is never read. There is no mask in memory.

With n x n tiles a square staircase costs (n + 1) / (2n) of the dense product's M K N multiply-adds, and each product reads its
operands about once from L2: 2 M K N / (M K + K N + M N) / itemsize operations a byte at best, so that wide layers with a thousand
rows are bound by arithmetic and small ones by the launch.

Block sizes never change the order of a sum: contracted blocks lie at absolute positions, one chain runs through them in ascending
order, and what a mask removes is added as an exact zero. So a row of y or dx has the same bits in any batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._launch import Launch, Plans, cdiv
from ..._triton import interpreting
from .reference import masked_linear_dweight_reference

_INTERPRETED = interpreting()
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
_SCAN = tl.constexpr(1024)  # entries of `visible` that are counted at a time

# BM, BN, BK and warps of small and large tiles, the largest that spill no register on sm_80 and sm_90 (python_tests/triton/resources.json)
_TILES = {
    "half": ((64, 64, 64, 4), (128, 128, 32, 8)),
    "tf32": ((64, 64, 32, 4), (128, 128, 32, 8)),
    "float32": ((64, 64, 32, 4), (128, 128, 16, 8)),
    "float64": ((64, 64, 16, 8), (64, 64, 16, 8)),
}
_WAVE = 128  # programs that an A100 (108 multiprocessors) or an H100 (132) runs side by side


@triton.jit(do_not_specialize=["M"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, visible_ptr, y_ptr,
    M, N, K, x_stride_m, x_stride_k, w_stride_k, w_stride_n, bias_stride,
    HAS_BIAS: tl.constexpr, DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # y [BM, BN], the columns with the longest sums first
    tiles_m = tl.cdiv(M, BM)
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    n = (tl.cdiv(N, BN) - 1 - tl.program_id(0) // tiles_m) * BN + tl.arange(0, BN)
    visible = tl.minimum(tl.load(visible_ptr + n, mask=n < N, other=0), K)
    end = tl.max(visible, 0)
    whole = tl.min(tl.where(n < N, visible, K), 0) // BK * BK  # the whole tile sees the inputs before it
    x_row = x_ptr + m.to(tl.int64)[:, None] * x_stride_m
    w_column = weight_ptr + n.to(tl.int64)[None, :] * w_stride_n

    acc = tl.zeros((BM, BN), SUM)
    for k0 in range(0, whole, BK):
        k = (k0 + tl.arange(0, BK)).to(tl.int64)
        x = tl.load(x_row + k[None, :] * x_stride_k, mask=m[:, None] < M, other=0.0).to(DOT)
        w = tl.load(w_column + k[:, None] * w_stride_k, mask=n[None, :] < N, other=0.0).to(DOT)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=SUM)

    first_bad = tl.full((BM,), 2147483647, tl.int32)  # first input of each row that is not finite and that some columns do not see
    for k0 in range(whole, end, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(x_row + k.to(tl.int64)[None, :] * x_stride_k, mask=(m[:, None] < M) & (k[None, :] < K), other=0.0).to(DOT)
        w = tl.load(w_column + k.to(tl.int64)[:, None] * w_stride_k, mask=(k[:, None] < K) & (n[None, :] < N), other=0.0).to(DOT)
        w = tl.where(k[:, None] < visible[None, :], w, 0.0)
        finite = tl.abs(x) < float("inf")
        first_bad = tl.minimum(first_bad, tl.min(tl.where(finite, 2147483647, k[None, :]), 1))
        acc = tl.dot(tl.where(finite, x, 0.0), w, acc, input_precision=PRECISION, out_dtype=SUM)  # 0 * inf would reach every column

    acc = tl.where(visible[None, :] > first_bad[:, None], float("nan"), acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n * bias_stride, mask=n < N, other=0.0).to(SUM)[None, :]
    y = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit(do_not_specialize=["M"])
def _dx_kernel(
    dy_ptr, weight_ptr, visible_ptr, dx_ptr,
    M, N, K, dy_stride_m, dy_stride_n, w_stride_k, w_stride_n,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # dx [BM, BN], whose columns are inputs k; the contraction is over outputs n. The first columns have the longest sums
    tiles_m = tl.cdiv(M, BM)
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    k_first = tl.program_id(0) // tiles_m * BN
    k = k_first + tl.arange(0, BN)
    k_last = tl.minimum(k_first + BN, K) - 1
    # how many outputs see none of these inputs, and how many do not see all of them
    unseen_all = 0
    unseen_any = 0
    for n0 in range(0, N, _SCAN):
        n = n0 + tl.arange(0, _SCAN)
        visible = tl.load(visible_ptr + n, mask=n < N, other=K)
        unseen_all += tl.sum((visible <= k_first).to(tl.int32), 0)
        unseen_any += tl.sum((visible <= k_last).to(tl.int32), 0)
    begin = unseen_all // BK * BK
    whole = tl.cdiv(unseen_any, BK) * BK  # the outputs from it on see the whole tile
    dy_row = dy_ptr + m.to(tl.int64)[:, None] * dy_stride_m
    w_row = weight_ptr + k.to(tl.int64)[:, None] * w_stride_k

    acc = tl.zeros((BM, BN), SUM)
    bad_reach = tl.zeros((BM,), tl.int32)  # how many inputs are seen by the last output whose dy is not finite
    for n0 in range(begin, whole, BK):
        n = n0 + tl.arange(0, BK)
        visible = tl.load(visible_ptr + n, mask=n < N, other=0)
        dy = tl.load(dy_row + n.to(tl.int64)[None, :] * dy_stride_n, mask=(m[:, None] < M) & (n[None, :] < N), other=0.0).to(DOT)
        w = tl.load(w_row + n.to(tl.int64)[None, :] * w_stride_n, mask=(k[:, None] < K) & (n[None, :] < N), other=0.0).to(DOT)
        w = tl.where(k[:, None] < visible[None, :], w, 0.0)
        finite = tl.abs(dy) < float("inf")
        bad_reach = tl.maximum(bad_reach, tl.max(tl.where(finite, 0, visible[None, :]), 1))
        acc = tl.dot(tl.where(finite, dy, 0.0), tl.trans(w), acc, input_precision=PRECISION, out_dtype=SUM)
    for n0 in range(whole, N, BK):
        n = n0 + tl.arange(0, BK)
        dy = tl.load(dy_row + n.to(tl.int64)[None, :] * dy_stride_n, mask=(m[:, None] < M) & (n[None, :] < N), other=0.0).to(DOT)
        w = tl.load(w_row + n.to(tl.int64)[None, :] * w_stride_n, mask=(k[:, None] < K) & (n[None, :] < N), other=0.0).to(DOT)
        acc = tl.dot(dy, tl.trans(w), acc, input_precision=PRECISION, out_dtype=SUM)

    acc = tl.where(k[None, :] < bad_reach[:, None], float("nan"), acc)
    dx = dx_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=(m[:, None] < M) & (k[None, :] < K))


@triton.jit(do_not_specialize=["M", "blocks"])
def _dweight_kernel(
    x_ptr, dy_ptr, visible_ptr, out_ptr,
    M, blocks, N, K, x_stride_m, x_stride_k, dy_stride_m, dy_stride_n,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # dweight [BM, BN], whose rows are inputs k, summed over `blocks` blocks of BK rows of the batch; out is [splits, K, N]
    rows = blocks * BK
    tiles_n = tl.cdiv(N, BN)
    k_first = tl.program_id(0) // tiles_n * BM
    k = k_first + tl.arange(0, BM)
    n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    visible = tl.minimum(tl.load(visible_ptr + n, mask=n < N, other=0), K)
    outside = tl.max(visible, 0) <= k_first
    if SPLIT and outside:
        return  # _sum_splits_kernel will not read it
    begin = tl.program_id(1) * rows
    end = tl.where(outside, begin, tl.minimum(begin + rows, M))
    x_column = x_ptr + k.to(tl.int64)[:, None] * x_stride_k
    dy_column = dy_ptr + n.to(tl.int64)[None, :] * dy_stride_n

    acc = tl.zeros((BM, BN), SUM)
    for m0 in range(begin, end, BK):
        m = m0 + tl.arange(0, BK)
        x = tl.load(x_column + m.to(tl.int64)[None, :] * x_stride_m, mask=(k[:, None] < K) & (m[None, :] < end), other=0.0).to(DOT)
        dy = tl.load(dy_column + m.to(tl.int64)[:, None] * dy_stride_m, mask=(m[:, None] < end) & (n[None, :] < N), other=0.0).to(DOT)
        acc = tl.dot(x, dy, acc, input_precision=PRECISION, out_dtype=SUM)

    acc = tl.where(k[:, None] < visible[None, :], acc, 0.0)
    out = out_ptr + (tl.program_id(1).to(tl.int64) * K + k[:, None]) * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(k[:, None] < K) & (n[None, :] < N))


@triton.jit(do_not_specialize=["splits"])
def _sum_splits_kernel(parts_ptr, visible_ptr, dweight_ptr, splits, N, K, BLOCK: tl.constexpr):
    # dweight = sum of [splits, K, N] in ascending order, inside the staircase
    k = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < tl.load(visible_ptr + n, mask=n < N, other=0)
    total = tl.zeros((BLOCK,), parts_ptr.dtype.element_ty)
    row = k
    for _ in range(splits):
        total += tl.load(parts_ptr + row * N + n, mask=inside, other=0.0)
        row += K
    tl.store(dweight_ptr + k * N + n, total.to(dweight_ptr.dtype.element_ty), mask=n < N)


class _Plan(NamedTuple):
    """What a call needs. The batch only chooses between small and large tiles."""

    launch: Launch
    sum_splits: Launch
    BM: int
    BN: int

    @classmethod
    def of(cls, kernel: Callable, x: Tensor, constants: tuple[int, ...], large: bool, flags: dict[str, int]) -> "_Plan":
        meta = _meta(x, large)
        launch = Launch(kernel, *constants, **(meta | flags))
        return cls(launch, Launch(_sum_splits_kernel, *constants[:2], BLOCK=1024), meta["BM"], meta["BN"])


_forward_plans, _dx_plans, _dweight_plans = Plans(), Plans(), Plans()


def masked_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor) -> Tensor:
    (K, N), rows = weight.shape, _rows(x)
    y = x.new_empty((*x.shape[:-1], N))
    if y.numel():
        M, has_bias = rows.shape[0], bias is not None
        dtypes = (x.dtype, weight.dtype, bias.dtype if has_bias else None)
        constants = (N, K, *rows.stride(), *weight.stride(), bias.stride(0) if has_bias else 0)
        plan = _planned(_forward_plans, _forward_kernel, x, dtypes, constants, _fills_the_gpu(M, N), HAS_BIAS=has_bias)
        plan.launch((cdiv(M, plan.BM) * cdiv(N, plan.BN), 1), (rows, weight, bias, visible.contiguous(), y), M)
    return y


def masked_linear_dx_triton(dy: Tensor, weight: Tensor, visible: Tensor) -> Tensor:
    (K, N), rows = weight.shape, _rows(dy)
    dx = dy.new_empty((*dy.shape[:-1], K))
    if dx.numel():
        M = rows.shape[0]
        constants = (N, K, *rows.stride(), *weight.stride())
        plan = _planned(_dx_plans, _dx_kernel, dy, (dy.dtype, weight.dtype), constants, _fills_the_gpu(M, K))
        plan.launch((cdiv(M, plan.BM) * cdiv(K, plan.BN), 1), (rows, weight, visible.contiguous(), dx), M)
    return dx


def masked_linear_dweight_triton(x: Tensor, dy: Tensor, visible: Tensor) -> Tensor:
    x, dy = _rows(x), _rows(dy)
    (M, K), N = x.shape, dy.shape[1]
    if _dense_is_faster(M, K, N, _kind(x)):
        return masked_linear_dweight_reference(x, dy, visible)
    dweight = x.new_empty((K, N))
    if dweight.numel():
        visible, large = visible.contiguous(), min(K, N) >= 128
        BM, BN, BK, _ = _TILES[_kind(x)][large]
        tiles = cdiv(K, BM) * cdiv(N, BN)
        # about half of the tiles lie inside: two waves of programs, of at least 8 blocks of rows each
        blocks = max(8, cdiv(M * tiles, 4 * _WAVE * BK))
        splits = max(1, cdiv(M, blocks * BK))
        constants = (N, K, *x.stride(), *dy.stride())
        # float32 on three stages spills registers; predicted: a block takes longer to compute than to load
        flags = {"SPLIT": splits > 1, "num_stages": 2 if _kind(x) == "float32" else 3}
        plan = _planned(_dweight_plans, _dweight_kernel, x, (x.dtype, dy.dtype), constants, large, **flags)
        out = dweight if splits == 1 else x.new_empty((splits, K, N), dtype=torch.promote_types(x.dtype, torch.float32))
        plan.launch((tiles, splits), (x, dy, visible, out), M, blocks)
        if splits > 1:
            plan.sum_splits((K, cdiv(N, 1024)), (out, visible, dweight), splits)
    return dweight


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.flatten(0, -2)


def _planned(
    plans: Plans,
    kernel: Callable,
    x: Tensor,
    dtypes: tuple[torch.dtype | None, ...],
    constants: tuple[int, ...],
    large: bool,
    **flags: int,
) -> _Plan:
    kind = _kind(x)
    key = (dtypes, constants, _TILES[kind][large], kind, *flags.values())
    return plans.get(key) or plans.add(key, _Plan.of(kernel, x, constants, large, flags))


def _kind(x: Tensor) -> str:
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "half" if x.itemsize == 2 else str(x.dtype).removeprefix("torch.")


def _meta(x: Tensor, large: bool) -> dict[str, object]:
    """The compile-time arguments of a launch. `large` tiles reuse more of what they load; small ones are more programs."""
    kind = _kind(x)
    BM, BN, BK, warps = _TILES[kind][large]
    # the interpreter keeps bfloat16 as integers; in float32 its products are the same
    dot = tl.float32 if _INTERPRETED and x.dtype == torch.bfloat16 else _DTYPES[x.dtype]
    total = tl.float64 if kind == "float64" else tl.float32
    precision = "tf32" if kind == "tf32" else "ieee"
    return {"DOT": dot, "SUM": total, "PRECISION": precision, "BM": BM, "BN": BN, "BK": BK, "num_warps": warps, "num_stages": 3}


def _fills_the_gpu(rows: int, columns: int) -> bool:
    return cdiv(rows, 128) * cdiv(columns, 128) >= 2 * _WAVE


def _dense_is_faster(M: int, K: int, N: int, kind: str) -> bool:
    """Whether cuBLAS wins with a whole dweight that is masked afterwards. Predicted from instruction mixes, not measured on a GPU.

    The staircase costs (n + 1) / (2n) of the dense product with n tiles on its shorter side, at `rate` of cuBLAS's speed; where the
    product is small, the launches decide, and cuBLAS with its mask needs four.

    There is no such rule for y and dx: switching to cuBLAS as the batch grows would change a row's bits.
    """
    rate = {"half": 0.8, "tf32": 0.8, "float32": 0.7, "float64": 0.7}[kind]
    n = cdiv(min(K, N), 128)
    return M * K * N >= 2**33 and n + 1 > 2 * n * rate
