# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernels that ``dora_linear`` has beside those of ``lora_linear``.

    gain_bwd_kernel      dz = gain dy and sum_m dy (y - bias)      split over m
    gain_end_kernel      dgain = that sum / gain                   z computed anew where gain is 0

The maths is in ``peft_kernels/ops/dora_linear.py``. Sums are float32, each in one order.
"""

import triton
import triton.language as tl

from peft_kernels.triton.common.blocks import dot, float_scalar, pointers, rounded, step


@triton.jit
def gain_bwd_kernel(
    dy, y, bias, gain, dz, sums, m, n, chunk, sdy_m, sdy_n,
    HAS_BIAS: tl.constexpr, NEEDS_GAIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz [m, n] = gain dy, and sums[split] = sum over split's rows of dy (y - bias).

    y and dz are [m, n], contiguous; ``sums`` is [splits, n] float32. Grid: (column blocks, splits).
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    first = split * chunk
    last = min(first + chunk, m)
    within = tl.arange(0, BLOCK_M)
    factors = tl.load(gain + cols, mask=cols < n, other=0.0)[None, :]
    shift = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = start + within
        mask = (rows < last)[:, None] & (cols < n)[None, :]
        d = tl.load(pointers(dy, rows, cols, sdy_m, sdy_n), mask=mask, other=0.0).to(tl.float32)
        tl.store(
            pointers(dz, rows, cols, n, 1), rounded(d * factors, dz.dtype.element_ty), mask=mask
        )
        if NEEDS_GAIN:
            value = tl.load(pointers(y, rows, cols, n, 1), mask=mask, other=0.0).to(tl.float32)
            acc += tl.sum(d * (value - shift[None, :]), axis=0)
    if NEEDS_GAIN:
        tl.store(sums + split.to(tl.int64) * n + cols, acc, mask=cols < n)


@triton.jit
def gain_end_kernel(
    dy, x, w, b, s, sums, gain, dgain, scale, m, n, k, r,
    sdy_m, sdy_n, sx_m, sx_k, sw_k, sw_n, sb_n, sb_r,
    SCALE_ON_DEVICE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dgain = sums / gain, or sum_m dy (x W^T + scale S B^T) where gain is 0.

    Grid: column blocks.
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    factors = tl.load(gain + cols, mask=cols < n, other=1.0)
    lost = factors == 0.0
    found = tl.load(sums + cols, mask=cols < n, other=0.0) / tl.where(lost, 1.0, factors)
    if tl.sum(lost.to(tl.int32)) > 0:
        exact = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, m, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            z = _z(
                x, w, b, s, float_scalar(scale, SCALE_ON_DEVICE), rows, cols, m, n, k, r,
                sx_m, sx_k, sw_k, sw_n, sb_n, sb_r, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            mask = (rows < m)[:, None] & (cols < n)[None, :]
            d = tl.load(pointers(dy, rows, cols, sdy_m, sdy_n), mask=mask, other=0.0)
            exact += tl.sum(d.to(tl.float32) * z, axis=0)
        found = tl.where(lost, exact, found)
    tl.store(dgain + cols, found, mask=cols < n)


@triton.jit
def _z(
    x, w, b, s, scale, rows, cols, m, n, k, r, sx_m, sx_k, sw_k, sw_n, sb_n, sb_r,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x W^T + scale S B^T of one tile."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, r, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        s_mask = (rows < m)[:, None] & (ranks < r)[None, :]
        s_tile = tl.load(pointers(s, rows, ranks, r, 1), mask=s_mask, other=0.0)
        b_mask = (ranks < r)[:, None] & (cols < n)[None, :]
        b_tile = tl.load(pointers(b, ranks, cols, sb_r, sb_n), mask=b_mask, other=0.0)
        acc = dot(s_tile * scale, b_tile.to(tl.float32), acc, "ieee")
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = pointers(x, rows, inner, sx_m, sx_k)
    w_ptrs = pointers(w, inner, cols, sw_k, sw_n)
    for start in range(0, k, BLOCK_K):
        here = start + inner < k
        x_tile = tl.load(x_ptrs, mask=(rows < m)[:, None] & here[None, :], other=0.0)
        w_tile = tl.load(w_ptrs, mask=here[:, None] & (cols < n)[None, :], other=0.0)
        acc = dot(x_tile, w_tile, acc, PRECISION)
        x_ptrs += step(BLOCK_K, sx_k)
        w_ptrs += step(BLOCK_K, sw_k)
    return acc
