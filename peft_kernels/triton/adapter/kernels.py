# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernels of the forward of ``adapter``; maths: ``peft_kernels/ops/adapter.py``.

    adapter_fold_kernel      D w and D b of pre_norm, two numbers a rank
    adapter_fwd_kernel       z, y and the statistics of BLOCK_M rows

The LayerNorm on the way down takes no pass of its own. Beside w (its weight), b (its bias) and
x_hat = (x - mean) rstd, all by row i and rank j:

    z = rstd (x (w o D)^T - mean s) + t,                s = D w,  t = D b + b_d       by rank

So x goes to the tensor cores as it is. The price: z loses the digits by which a row's mean exceeds
its deviation (in float32, 1e-5 at 100 times).

Rounding. Sums are float32, and z keeps float32's precision (`wide_dot`). In y, which is rounded to
x's dtype, act(z) is the sum of two numbers of that dtype. Products of two float32 tiles beside a
16-bit x take both as sums of bfloat16 numbers, by Triton's own means: three products of two each
("bf16x3"), or six of three each where a LayerNorm of t makes the gradients of WIDE, that is
float32, parameters depend on t. No kernel uses an atomic, and every sum has one order: the same
input gives the same bits.
"""

import triton
import triton.language as tl

from peft_kernels.triton.common.activations import activation
from peft_kernels.triton.common.blocks import (
    WIDENED,
    dot,
    float_scalar,
    kept_mask,
    pointers,
    rounded,
    scales,
    step,
    wide_dot,
)

# ---- pieces ------------------------------------------------------------------------------------


@triton.jit
def dropout_key(seed, ON_DEVICE: tl.constexpr):
    """The seed, loaded for each tile: its key schedule would take a loop 20 registers."""
    if ON_DEVICE:
        return tl.load(seed, volatile=True)
    else:
        return seed


@triton.jit
def vector(base, where, size):
    return tl.load(base + where, mask=where < size, other=0.0).to(tl.float32)


@triton.jit
def masked_load(base, rows, cols, m, n, row_stride, col_stride):
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    return tl.load(pointers(base, rows, cols, row_stride, col_stride), mask=mask, other=0.0)


@triton.jit
def product(p, q, acc, dtype: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p q; p is float32, q a parameter: float32 where WIDE, else ``dtype``."""
    if WIDE or dtype == tl.float32 or PRECISION == WIDENED:
        acc = dot(p, q.to(tl.float32), acc, PRECISION)
    else:
        if dtype == tl.float16:
            up, down = scales(p, 30)
            p = p * up
            acc = acc * up
        for _ in tl.static_range(2):
            term = rounded(p, dtype)
            acc = dot(term, q, acc, PRECISION)
            p = p - term.to(tl.float32)
        if dtype == tl.float16:
            acc = acc * down
    return acc


@triton.jit
def _merged(tile, inside, before, mean, squares):
    """The rows' mean and sum of squared deviations, of ``before`` columns and the tile's together.

    Chan, Golub, LeVeque 1979: exact however far the mean is from zero. The tile is 0 outside.
    """
    count = tl.sum(inside.to(tl.float32))
    own = tl.sum(tile, 1) / count
    off = tl.where(inside[None, :], tile - own[:, None], 0.0)
    delta = own - mean
    share = count / (before + count)
    squares += tl.sum(off * off, 1) + delta * delta * (before * share)
    return mean + delta * share, squares


@triton.jit
def _down(
    x, down, down_bias, pre_weight, fold, pre_eps, rows, ranks, m, k, r, sx_m, sx_k, sd_r, sd_k,
    HAS_DOWN_BIAS: tl.constexpr, PRE_NORM: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """z of the rows and ranks, and x's mean and reciprocal deviation by row with PRE_NORM."""
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    x_ptrs = pointers(x, rows, inner, sx_m, sx_k)
    d_ptrs = pointers(down, inner, ranks, sd_k, sd_r)
    for start in range(0, k, BLOCK_K):
        here = start + inner < k
        x_tile = tl.load(x_ptrs, mask=(rows < m)[:, None] & here[None, :], other=0.0)
        d_tile = tl.load(d_ptrs, mask=here[:, None] & (ranks < r)[None, :], other=0.0)
        if PRE_NORM:
            d_tile = d_tile.to(tl.float32) * vector(pre_weight, start + inner, k)[:, None]
            mean, squares = _merged(x_tile.to(tl.float32), here, start * 1.0, mean, squares)
        acc = wide_dot(x_tile, d_tile, acc, TERMS, PRECISION)
        x_ptrs += step(BLOCK_K, sx_k)
        d_ptrs += step(BLOCK_K, sd_k)
    rstd = squares
    if PRE_NORM:
        rstd = tl.rsqrt(squares / k + pre_eps)
        acc = rstd[:, None] * (acc - mean[:, None] * vector(fold, ranks, r)[None, :])
        acc += vector(fold + r, ranks, r)[None, :]
    elif HAS_DOWN_BIAS:
        acc += vector(down_bias, ranks, r)[None, :]
    return acc, mean, rstd


@triton.jit
def _factor(
    scale, inv_keep, cols, n,
    DROPOUT: tl.constexpr, CHANNELS: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """scale, with dropout's 1 / (1 - p): a number, or [1, BLOCK_N] of a scale by channel."""
    if not DROPOUT:
        inv_keep = 1.0
    if CHANNELS:
        return vector(scale, cols, n)[None, :] * inv_keep
    else:
        return float_scalar(scale, SCALE_ON_DEVICE) * inv_keep


@triton.jit
def sum_tile(
    a, z, up, up_bias, x, residual, scale, seed, threshold, inv_keep, rows, first_col, m, n, r,
    sx_m, sx_k, sr_m, sr_n, su_n, su_r, dtype: tl.constexpr,
    ACTIVATION: tl.constexpr, ADDS_X: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SEED_ON_DEVICE: tl.constexpr,
    CHANNELS: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr, ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """t of one tile, 0 outside. ``a`` is act(z) where r is ONE_BLOCK; else z is loaded."""
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    # 1. u = act(z) U^T + b_u
    if ONE_BLOCK:
        ranks = tl.arange(0, BLOCK_R)
        u_mask = (ranks < r)[:, None] & (cols < n)[None, :]
        u_tile = tl.load(pointers(up, ranks, cols, su_r, su_n), mask=u_mask, other=0.0)
        acc = product(a, u_tile, acc, dtype, WIDE, PRECISION)
    else:
        for first in tl.range(0, r, BLOCK_R, num_stages=1):
            ranks = first + tl.arange(0, BLOCK_R)
            z_mask = (rows < m)[:, None] & (ranks < r)[None, :]
            z_tile = tl.load(pointers(z, rows, ranks, r, 1), mask=z_mask, other=0.0)
            u_mask = (ranks < r)[:, None] & (cols < n)[None, :]
            u_tile = tl.load(pointers(up, ranks, cols, su_r, su_n), mask=u_mask, other=0.0)
            acc = product(activation(z_tile, ACTIVATION), u_tile, acc, dtype, WIDE, PRECISION)
    if HAS_UP_BIAS:
        acc += vector(up_bias, cols, n)[None, :]

    # 2. residual + scale dropout(u)
    acc = acc * _factor(scale, inv_keep, cols, n, DROPOUT, CHANNELS, SCALE_ON_DEVICE)
    if DROPOUT:
        kept = kept_mask(
            dropout_key(seed, SEED_ON_DEVICE), threshold, rows, first_col, BLOCK_M, BLOCK_N
        )
        acc = tl.where(kept & (cols < n)[None, :], acc, 0.0)
    if ADDS_X:
        acc += tl.load(pointers(x, rows, cols, sx_m, sx_k), mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        r_ptrs = pointers(residual, rows, cols, sr_m, sr_n)
        acc += tl.load(r_ptrs, mask=mask, other=0.0).to(tl.float32)
    return acc


# ---- forward -----------------------------------------------------------------------------------


@triton.jit
def adapter_fold_kernel(
    down, pre_weight, pre_bias, down_bias, fold, k, r, sd_r, sd_k,
    HAS_PRE_BIAS: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fold[0] = s = D w and fold[1] = t = D b + b_d; grid (r,)."""
    rank = tl.program_id(0)
    inner = tl.arange(0, BLOCK_K)
    weighted = tl.zeros((BLOCK_K,), tl.float32)
    biased = tl.zeros((BLOCK_K,), tl.float32)
    row = down + rank.to(tl.int64) * sd_r
    for start in range(0, k, BLOCK_K):
        where = start + inner
        here = where < k
        d_tile = tl.load(row + where.to(tl.int64) * sd_k, mask=here, other=0.0).to(tl.float32)
        weighted += d_tile * vector(pre_weight, where, k)
        if HAS_PRE_BIAS:
            biased += d_tile * vector(pre_bias, where, k)
    total = tl.sum(biased)
    if HAS_DOWN_BIAS:
        total += tl.load(down_bias + rank).to(tl.float32)
    tl.store(fold + rank, tl.sum(weighted))
    tl.store(fold + r + rank, total)


@triton.jit(do_not_specialize=["seed", "threshold"])
def adapter_fwd_kernel(
    x, residual, down, down_bias, up, up_bias, scale, pre_weight, fold, pre_eps, norm_weight,
    norm_bias, eps, y, z, statistics, seed, threshold, inv_keep, m, k, r, n,
    sx_m, sx_k, sr_m, sr_n, sd_r, sd_k, su_n, su_r,
    ACTIVATION: tl.constexpr, ADDS_X: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, PRE_NORM: tl.constexpr,
    NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    CHANNELS: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr,
    ONE_BLOCK: tl.constexpr, WIDE: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """z, y and the statistics of BLOCK_M rows; grid (row blocks,).

    A LayerNorm of t takes t twice: once for its mean and deviation, once to store it normalised.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    dtype: tl.constexpr = y.dtype.element_ty
    columns: tl.constexpr = 2 * (PRE_NORM + NORM)
    own_statistics = statistics + rows.to(tl.int64) * columns

    # 1. z = h D^T + b_d, for the backward, and act(z)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = tl.zeros((BLOCK_M,), tl.float32)
    if ONE_BLOCK:
        z_tile, mean, rstd = _down(
            x, down, down_bias, pre_weight, fold, pre_eps, rows, ranks, m, k, r,
            sx_m, sx_k, sd_r, sd_k,
            HAS_DOWN_BIAS, PRE_NORM, TERMS, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        z_mask = (rows < m)[:, None] & (ranks < r)[None, :]
        tl.store(pointers(z, rows, ranks, r, 1), z_tile, mask=z_mask)
        a = activation(z_tile, ACTIVATION)
    else:
        a = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for first in tl.range(0, r, BLOCK_R, num_stages=1):
            z_tile, mean, rstd = _down(
                x, down, down_bias, pre_weight, fold, pre_eps, rows, first + ranks, m, k, r,
                sx_m, sx_k, sd_r, sd_k,
                HAS_DOWN_BIAS, PRE_NORM, TERMS, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            z_mask = (rows < m)[:, None] & (first + ranks < r)[None, :]
            tl.store(pointers(z, rows, first + ranks, r, 1), z_tile, mask=z_mask)
        # other threads load what these stored
        tl.debug_barrier()
    if PRE_NORM:
        tl.store(own_statistics, mean, mask=rows < m)
        tl.store(own_statistics + 1, rstd, mask=rows < m)

    # 2. the mean and deviation of t
    if NORM:
        mean = tl.zeros((BLOCK_M,), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, n, BLOCK_N):
            t = sum_tile(
                a, z, up, up_bias, x, residual, scale, seed, threshold, inv_keep, rows, start,
                m, n, r, sx_m, sx_k, sr_m, sr_n, su_n, su_r, dtype,
                ACTIVATION, ADDS_X, HAS_RESIDUAL, HAS_UP_BIAS, DROPOUT, SEED_ON_DEVICE, CHANNELS,
                SCALE_ON_DEVICE, ONE_BLOCK, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
            inside = start + tl.arange(0, BLOCK_N) < n
            mean, squares = _merged(t, inside, start * 1.0, mean, squares)
        rstd = tl.rsqrt(squares / n + eps)
        tl.store(own_statistics + 2 * PRE_NORM, mean, mask=rows < m)
        tl.store(own_statistics + 2 * PRE_NORM + 1, rstd, mask=rows < m)

    # 3. y, rounded and stored once
    for start in range(0, n, BLOCK_N):
        t = sum_tile(
            a, z, up, up_bias, x, residual, scale, seed, threshold, inv_keep, rows, start,
            m, n, r, sx_m, sx_k, sr_m, sr_n, su_n, su_r, dtype,
            ACTIVATION, ADDS_X, HAS_RESIDUAL, HAS_UP_BIAS, DROPOUT, SEED_ON_DEVICE, CHANNELS,
            SCALE_ON_DEVICE, ONE_BLOCK, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        cols = start + tl.arange(0, BLOCK_N)
        if NORM:
            t = (t - mean[:, None]) * rstd[:, None] * vector(norm_weight, cols, n)[None, :]
            if HAS_NORM_BIAS:
                t += vector(norm_bias, cols, n)[None, :]
        mask = (rows < m)[:, None] & (cols < n)[None, :]
        tl.store(pointers(y, rows, cols, n, 1), rounded(t, dtype), mask=mask)
