# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernels of the backward of ``adapter``; maths: ``peft_kernels/ops/adapter.py``.

    adapter_norm_bwd_kernel  dt of BLOCK_M rows, and their part of norm's gradients
    adapter_bwd_kernel       dz and dx of BLOCK_M rows, and their part of dz's sums over rows
    adapter_up_kernel        G = g^T act(z) and g0                 split over m
    adapter_down_kernel      dD and pre_norm's gradients from X = dz^T x

With the names of the forward (``kernels.py``), a LayerNorm on the way down gives

    dx = rstd (dz (D o w) - M - x_hat P),               M = dz . s / k                by row
                                                        P = dz . (z - t) / k
    X = (rstd dz)^T x - sum of rstd dz mean over rows,  dD = w o X + b o db_d
    dw = sum over ranks of D o X,                       db = sum over ranks of D db_d

so that neither sum over k needs dx first.

Rounding is the forward's: sums are float32, G and dD keep float32's precision, and so does dt,
which a LayerNorm's backward stores in float32. In dx, which is rounded to x's dtype, dz is the sum
of two numbers of that dtype.
"""

import triton
import triton.language as tl

from peft_kernels.triton.adapter.kernels import dropout_key, masked_load, product, sum_tile, vector
from peft_kernels.triton.common.activations import activation, activation_derivative
from peft_kernels.triton.common.blocks import (
    float_scalar,
    kept_mask,
    pointers,
    rounded,
    step,
    wide_dot,
)


@triton.jit
def _dropped(
    g, seed, threshold, rows, first_col,
    DROPOUT: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g where it is kept, without 1 / (1 - p)."""
    if DROPOUT:
        kept = kept_mask(
            dropout_key(seed, SEED_ON_DEVICE), threshold, rows, first_col, BLOCK_M, BLOCK_N
        )
        g = tl.where(kept, g, 0.0).to(g.dtype)
    return g


@triton.jit(do_not_specialize=["seed", "threshold"])
def adapter_norm_bwd_kernel(
    dy, x, residual, up, up_bias, scale, norm_weight, z, statistics, dt, d_residual, norm_sums,
    seed, threshold, inv_keep, m, n, r, sdy_m, sdy_n, sx_m, sx_k, sr_m, sr_n, su_n, su_r,
    ACTIVATION: tl.constexpr, ADDS_X: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, PRE_NORM: tl.constexpr, DROPOUT: tl.constexpr,
    CHANNELS: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr,
    NEEDS_RESIDUAL: tl.constexpr, NEEDS_NORM: tl.constexpr,
    ONE_BLOCK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dt = LN'(dy; t) of BLOCK_M rows, with t computed again; grid (row blocks,).

    ``dt`` [m, n] is float32, ``d_residual`` the same in x's dtype. ``norm_sums`` [blocks, 2, n] is
    the block's part of norm's gradients.
    """
    pid = tl.program_id(0)
    rows = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = x.dtype.element_ty
    own_statistics = statistics + rows.to(tl.int64) * (2 * PRE_NORM + 2) + 2 * PRE_NORM
    mean = tl.load(own_statistics, mask=rows < m, other=0.0)
    rstd = tl.load(own_statistics + 1, mask=rows < m, other=0.0)
    a = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if ONE_BLOCK:
        a = activation(masked_load(z, rows, tl.arange(0, BLOCK_R), m, r, r, 1), ACTIVATION)

    # 1. what LN' needs of a whole row: the means of d = dy o weight and of d t_hat
    mean_d = tl.zeros((BLOCK_M,), tl.float32)
    projection = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, n, BLOCK_N):
        t = sum_tile(
            a, z, up, up_bias, x, residual, scale, seed, threshold, inv_keep, rows, start,
            m, n, r, sx_m, sx_k, sr_m, sr_n, su_n, su_r, dtype,
            ACTIVATION, ADDS_X, HAS_RESIDUAL, HAS_UP_BIAS, DROPOUT, SEED_ON_DEVICE, CHANNELS,
            SCALE_ON_DEVICE, ONE_BLOCK, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        cols = start + tl.arange(0, BLOCK_N)
        t_hat = (t - mean[:, None]) * rstd[:, None]
        wide_dy = masked_load(dy, rows, cols, m, n, sdy_m, sdy_n).to(tl.float32)
        if NEEDS_NORM:
            own_sums = norm_sums + pid.to(tl.int64) * 2 * n + cols
            tl.store(own_sums, tl.sum(wide_dy * t_hat, 0), mask=cols < n)
            tl.store(own_sums + n, tl.sum(wide_dy, 0), mask=cols < n)
        d = wide_dy * vector(norm_weight, cols, n)[None, :]
        mean_d += tl.sum(d, 1)
        projection += tl.sum(d * t_hat, 1)
    mean_d = mean_d / n
    projection = projection / n

    # 2. dt
    for start in range(0, n, BLOCK_N):
        t = sum_tile(
            a, z, up, up_bias, x, residual, scale, seed, threshold, inv_keep, rows, start,
            m, n, r, sx_m, sx_k, sr_m, sr_n, su_n, su_r, dtype,
            ACTIVATION, ADDS_X, HAS_RESIDUAL, HAS_UP_BIAS, DROPOUT, SEED_ON_DEVICE, CHANNELS,
            SCALE_ON_DEVICE, ONE_BLOCK, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        cols = start + tl.arange(0, BLOCK_N)
        t_hat = (t - mean[:, None]) * rstd[:, None]
        wide_dy = masked_load(dy, rows, cols, m, n, sdy_m, sdy_n).to(tl.float32)
        d = wide_dy * vector(norm_weight, cols, n)[None, :]
        dt_tile = rstd[:, None] * (d - mean_d[:, None] - t_hat * projection[:, None])
        mask = (rows < m)[:, None] & (cols < n)[None, :]
        tl.store(pointers(dt, rows, cols, n, 1), dt_tile, mask=mask)
        if NEEDS_RESIDUAL:
            tl.store(pointers(d_residual, rows, cols, n, 1), rounded(dt_tile, dtype), mask=mask)


@triton.jit
def _dz(
    g, z, up, scale, x_mean, x_rstd, fold, dz, dz_sums, seed, threshold, inv_keep, rows, ranks,
    m, n, r, sg_m, sg_n, su_n, su_r, dtype: tl.constexpr,
    ACTIVATION: tl.constexpr, PRE_NORM: tl.constexpr, DROPOUT: tl.constexpr,
    CHANNELS: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr,
    WIDE: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dz (rstd dz with PRE_NORM), dz . s and dz . (z - t), which are 0 without PRE_NORM.

    dz and its sums over the rows are stored.
    """
    # 1. (scale o g) U, of which one number for all is left for the end
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, n, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g_tile = masked_load(g, rows, cols, m, n, sg_m, sg_n)
        g_tile = _dropped(
            g_tile, seed, threshold, rows, start, DROPOUT, SEED_ON_DEVICE, BLOCK_M, BLOCK_N
        )
        u_tile = masked_load(up, cols, ranks, n, r, su_n, su_r)
        if g_tile.dtype == dtype:
            if CHANNELS:
                u_tile = u_tile.to(tl.float32) * vector(scale, cols, n)[:, None]
            acc = wide_dot(g_tile, u_tile, acc, TERMS, PRECISION)
        else:
            if CHANNELS:
                g_tile = g_tile * vector(scale, cols, n)[None, :]
            acc = product(g_tile, u_tile, acc, dtype, WIDE, PRECISION)
    if DROPOUT:
        acc = acc * inv_keep
    if not CHANNELS:
        acc = acc * float_scalar(scale, SCALE_ON_DEVICE)

    # 2. dz and its sums
    z_tile = masked_load(z, rows, ranks, m, r, r, 1)
    acc = acc * activation_derivative(z_tile, ACTIVATION)
    tl.store(dz_sums + ranks, tl.sum(acc, 0), mask=ranks < r)
    along_s = tl.zeros((BLOCK_M,), tl.float32)
    along_z = tl.zeros((BLOCK_M,), tl.float32)
    if PRE_NORM:
        acc = acc * x_rstd[:, None]
        tl.store(dz_sums + r + ranks, tl.sum(acc * x_mean[:, None], 0), mask=ranks < r)
        along_s = tl.sum(acc * vector(fold, ranks, r)[None, :], 1)
        along_z = tl.sum(acc * (z_tile - vector(fold + r, ranks, r)[None, :]), 1)
    mask = (rows < m)[:, None] & (ranks < r)[None, :]
    tl.store(pointers(dz, rows, ranks, r, 1), acc, mask=mask)
    return acc, along_s, along_z


@triton.jit(do_not_specialize=["seed", "threshold"])
def adapter_bwd_kernel(
    g, x, down, up, scale, pre_weight, fold, z, statistics, dz, dx, dz_sums,
    seed, threshold, inv_keep, m, k, r, n, sg_m, sg_n, sx_m, sx_k, sd_r, sd_k, su_n, su_r,
    ACTIVATION: tl.constexpr, ADDS_X: tl.constexpr, PRE_NORM: tl.constexpr, NORM: tl.constexpr,
    DROPOUT: tl.constexpr, CHANNELS: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
    SEED_ON_DEVICE: tl.constexpr, NEEDS_X: tl.constexpr, ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dz (rstd dz with PRE_NORM) and dx of BLOCK_M rows; grid (row blocks,).

    ``g`` [m, n] is dt before dropout, in x's dtype or float32. ``dz_sums`` [blocks, 2, r]: the sums
    over the block's rows of dz and of rstd dz mean.
    """
    pid = tl.program_id(0)
    rows = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    dtype: tl.constexpr = x.dtype.element_ty
    dz_sums += pid.to(tl.int64) * 2 * r
    x_mean = tl.zeros((BLOCK_M,), tl.float32)
    x_rstd = tl.zeros((BLOCK_M,), tl.float32)
    if PRE_NORM:
        own_statistics = statistics + rows.to(tl.int64) * (2 * NORM + 2)
        x_mean = tl.load(own_statistics, mask=rows < m, other=0.0)
        x_rstd = tl.load(own_statistics + 1, mask=rows < m, other=0.0)

    # 1. dz, and the sums over k of dx's LN'
    if ONE_BLOCK:
        dz_tile, mean_d, projection = _dz(
            g, z, up, scale, x_mean, x_rstd, fold, dz, dz_sums, seed, threshold, inv_keep, rows,
            ranks, m, n, r, sg_m, sg_n, su_n, su_r, dtype,
            ACTIVATION, PRE_NORM, DROPOUT, CHANNELS, SCALE_ON_DEVICE, SEED_ON_DEVICE,
            WIDE, TERMS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    else:
        dz_tile = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        mean_d = tl.zeros((BLOCK_M,), tl.float32)
        projection = tl.zeros((BLOCK_M,), tl.float32)
        for first in tl.range(0, r, BLOCK_R, num_stages=1):
            _, along_s, along_z = _dz(
                g, z, up, scale, x_mean, x_rstd, fold, dz, dz_sums, seed, threshold, inv_keep, rows,
                first + ranks, m, n, r, sg_m, sg_n, su_n, su_r, dtype,
                ACTIVATION, PRE_NORM, DROPOUT, CHANNELS, SCALE_ON_DEVICE, SEED_ON_DEVICE,
                WIDE, TERMS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
            mean_d += along_s
            projection += along_z
        # other threads load what these stored
        tl.debug_barrier()

    # 2. dx = dz D or LN'(dz D; x), + dt
    if NEEDS_X:
        mean_d = mean_d / k
        projection = projection / k
        for start in range(0, k, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            if ONE_BLOCK:
                d_tile = masked_load(down, ranks, cols, r, k, sd_r, sd_k)
                acc = product(dz_tile, d_tile, acc, dtype, WIDE, PRECISION)
            else:
                for first in tl.range(0, r, BLOCK_R, num_stages=1):
                    own_dz = masked_load(dz, rows, first + ranks, m, r, r, 1)
                    d_tile = masked_load(down, first + ranks, cols, r, k, sd_r, sd_k)
                    acc = product(own_dz, d_tile, acc, dtype, WIDE, PRECISION)
            if PRE_NORM:
                x_tile = masked_load(x, rows, cols, m, k, sx_m, sx_k).to(tl.float32)
                x_hat = (x_tile - x_mean[:, None]) * x_rstd[:, None]
                acc = acc * vector(pre_weight, cols, k)[None, :]
                acc = acc - mean_d[:, None] - x_hat * projection[:, None]
            if ADDS_X:
                acc += masked_load(g, rows, cols, m, n, sg_m, sg_n).to(tl.float32)
            mask = (rows < m)[:, None] & (cols < k)[None, :]
            tl.store(pointers(dx, rows, cols, k, 1), rounded(acc, dtype), mask=mask)


@triton.jit(do_not_specialize=["seed", "threshold"])
def adapter_up_kernel(
    g, z, up_grad, up_sum, seed, threshold, inv_keep, m, n, r, chunk, sg_m, sg_n,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, SEED_ON_DEVICE: tl.constexpr,
    TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """G[split, j, c] and g0[split, j], summed over the split's chunk of rows.

    ``g`` is dt before dropout, in x's dtype or float32. Grid: (blocks of n x rank blocks, splits).
    """
    rank_blocks = tl.cdiv(r, BLOCK_R)
    which = tl.program_id(0) % rank_blocks
    first_col = tl.program_id(0) // rank_blocks * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    ranks = which * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    first = split * chunk
    last = min(first + chunk, m)
    within = tl.arange(0, BLOCK_M)

    # 1. g^T act(z); the mask is drawn again
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    g_ptrs = pointers(g, first + within, cols, sg_m, sg_n)
    z_ptrs = pointers(z, first + within, ranks, r, 1)
    for start in range(first, last, BLOCK_M):
        rows = start + within
        g_tile = tl.load(g_ptrs, mask=(rows < last)[:, None] & (cols < n)[None, :], other=0.0)
        z_mask = (rows < last)[:, None] & (ranks < r)[None, :]
        z_tile = tl.load(z_ptrs, mask=z_mask, other=0.0)
        g_tile = _dropped(
            g_tile, seed, threshold, rows, first_col, DROPOUT, SEED_ON_DEVICE, BLOCK_M, BLOCK_N
        )
        a = activation(z_tile, ACTIVATION)
        acc = wide_dot(tl.trans(g_tile), a, acc, TERMS, PRECISION)
        total += tl.sum(g_tile.to(tl.float32), 0)
        g_ptrs += step(BLOCK_M, sg_m)
        z_ptrs += step(BLOCK_M, r)
    if DROPOUT:
        acc = acc * inv_keep
        total = total * inv_keep

    # 2. the split's own slice
    up_grad += split.to(tl.int64) * n * r
    mask = (cols < n)[:, None] & (ranks < r)[None, :]
    tl.store(pointers(up_grad, cols, ranks, r, 1), acc, mask=mask)
    up_sum += split.to(tl.int64) * n
    tl.store(up_sum + cols, total, mask=(cols < n) & (which == 0))


@triton.jit
def adapter_down_kernel(
    parts, dz_sums, down, pre_weight, pre_bias, d_down, d_pre_norm, splits, k, r, sd_r, sd_k,
    HAS_PRE_BIAS: tl.constexpr, NEEDS_DOWN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dD = w o X + b o db_d, dw and db from the ``parts`` [splits, r, k] of (rstd dz)^T x.

    ``dz_sums`` [2, r]: the sums over rows of dz and of rstd dz mean. Grid: (blocks of k,).
    """
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    weight = vector(pre_weight, cols, k)[None, :]
    d_weight = tl.zeros((BLOCK_K,), tl.float32)
    d_bias = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, r, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        mask = (ranks < r)[:, None] & (cols < k)[None, :]
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for split in range(0, splits):
            part = pointers(parts + step(1, split) * r * k, ranks, cols, k, 1)
            acc += tl.load(part, mask=mask, other=0.0)
        d_down_bias = vector(dz_sums, ranks, r)[:, None]
        acc = acc - vector(dz_sums + r, ranks, r)[:, None]
        d_tile = tl.load(pointers(down, ranks, cols, sd_r, sd_k), mask=mask, other=0.0)
        d_weight += tl.sum(d_tile.to(tl.float32) * acc, 0)
        d_bias += tl.sum(d_tile.to(tl.float32) * d_down_bias, 0)
        if NEEDS_DOWN:
            acc = acc * weight
            if HAS_PRE_BIAS:
                acc += vector(pre_bias, cols, k)[None, :] * d_down_bias
            tl.store(pointers(d_down, ranks, cols, k, 1), acc, mask=mask)
    tl.store(d_pre_norm + cols, d_weight, mask=cols < k)
    tl.store(d_pre_norm + k + cols, d_bias, mask=cols < k)
