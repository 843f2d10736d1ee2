# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernels of ``adapter_fusion``; maths: ``peft_kernels/ops/adapter_fusion.py``.

    adapter_fusion_products_kernel     z and w from x and q; t and dy . v from dy
    adapter_fusion_weights_kernel      p and p o a by row
    adapter_fusion_weights_bwd_kernel  dpre, dw and p o a by row
    adapter_fusion_mix_kernel          y from p o a and p; dx and dq from dpre and dw
    adapter_fusion_grad_kernel         dD, dS, dM and dv, and their biases'    split over m

The columns of R are grouped by adapter: those of adapter i are ``starts[i]`` to ``starts[i + 1]``.
The kernels by row go through the adapters one by one, so that a sum over an adapter's columns is a
sum over a tile's.

Rounding is that of `_adapter_kernels`: sums are float32, z, w, t and the parameters' gradients keep
float32's precision (`wide_dot`), and in y, dx and dq the float32 operand is the sum of two numbers
of x's dtype. No kernel uses an atomic, and every sum has one order: the same input gives the same
bits.
"""

import triton
import triton.language as tl

from peft_kernels.triton.adapter.kernels import masked_load, product, vector
from peft_kernels.triton.common.activations import activation, activation_derivative
from peft_kernels.triton.common.blocks import pointers, rounded, step, wide_dot

# ---- products of rows --------------------------------------------------------------------------


@triton.jit
def _linear(
    x, weight, bias, out, rows, first_col, m, k, n, sx_m, sx_k, sw_n, sw_k,
    HAS_BIAS: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out [m, n] = x weight^T + bias, float32."""
    cols = first_col + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_ptrs = pointers(x, rows, inner, sx_m, sx_k)
    w_ptrs = pointers(weight, inner, cols, sw_k, sw_n)
    for start in range(0, k, BLOCK_K):
        here = start + inner < k
        x_tile = tl.load(x_ptrs, mask=(rows < m)[:, None] & here[None, :], other=0.0)
        w_tile = tl.load(w_ptrs, mask=here[:, None] & (cols < n)[None, :], other=0.0)
        acc = wide_dot(x_tile, w_tile, acc, TERMS, PRECISION)
        x_ptrs += step(BLOCK_K, sx_k)
        w_ptrs += step(BLOCK_K, sw_k)
    if HAS_BIAS:
        acc += vector(bias, cols, n)[None, :]
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(pointers(out, rows, cols, n, 1), acc, mask=mask)


@triton.jit
def adapter_fusion_products_kernel(
    x, q, first_weight, first_bias, second_weight, second_bias, first_out, second_out,
    m, k, d, first_n, second_n, sx_m, sx_k, sq_m, sq_k, s1_n, s1_k, s2_n, s2_k,
    HAS_BIAS: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [m, k] times first_weight^T and q [m, d] times second_weight^T, as one product.

    Grid: (row blocks x column blocks of both,); the column blocks of a row block are neighbours, so
    that all but the first one find its rows in L2.
    """
    first_blocks = tl.cdiv(first_n, BLOCK_N)
    blocks = first_blocks + tl.cdiv(second_n, BLOCK_N)
    rows = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) % blocks
    if block < first_blocks:
        _linear(
            x, first_weight, first_bias, first_out, rows, block * BLOCK_N, m, k, first_n,
            sx_m, sx_k, s1_n, s1_k, HAS_BIAS, TERMS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _linear(
            q, second_weight, second_bias, second_out, rows, (block - first_blocks) * BLOCK_N,
            m, d, second_n, sq_m, sq_k, s2_n, s2_k,
            HAS_BIAS, TERMS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _low_rank(
    acc, p, q, rows, cols, m, n, r, sp_m, sq_r, sq_n, dtype: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + P Q of one tile; P is [m, r] float32 with columns side by side."""
    for first in range(0, r, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        p_tile = masked_load(p, rows, ranks, m, r, sp_m, 1)
        q_tile = masked_load(q, ranks, cols, r, n, sq_r, sq_n)
        wide: tl.constexpr = q_tile.dtype == tl.float32
        acc = product(p_tile, q_tile, acc, dtype, wide, PRECISION)
    return acc


@triton.jit
def adapter_fusion_mix_kernel(
    p1, q1, p2, q2, residual, out, m, n, r1, r2,
    sp1_m, sq1_r, sq1_n, sp2_m, sq2_r, sq2_n, sr_m, sr_n,
    HAS_SECOND: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,
):  # fmt: skip
    """out = P1 Q1 + P2 Q2 + residual, one store; grid (row blocks x column blocks,).

    y:  P1 = p o a,  Q1 = M^T,  P2 = p,   Q2 = v
    dx: P1 = dpre,   Q1 = D,    P2 = dw,  Q2 = [P, e]    where the query is x
    """
    blocks = tl.cdiv(n, BLOCK_N)
    rows = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = out.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _low_rank(
        acc, p1, q1, rows, cols, m, n, r1, sp1_m, sq1_r, sq1_n, dtype, PRECISION, BLOCK_R
    )
    if HAS_SECOND:
        acc = _low_rank(
            acc, p2, q2, rows, cols, m, n, r2, sp2_m, sq2_r, sq2_n, dtype, PRECISION, BLOCK_R2
        )
    if HAS_RESIDUAL:
        acc += masked_load(residual, rows, cols, m, n, sr_m, sr_n).to(tl.float32)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(pointers(out, rows, cols, n, 1), rounded(acc, dtype), mask=mask)


# ---- the softmax, by row -----------------------------------------------------------------------


@triton.jit
def _of_adapter(tile, which, i):
    """Column i of a [rows, adapters] tile."""
    return tl.sum(tl.where(which[None, :] == i, tile, 0.0), 1)


@triton.jit
def adapter_fusion_weights_kernel(
    z, w, starts, p, mixed, m, ranks, adapters,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, ADAPTERS: tl.constexpr,
):  # fmt: skip
    """p and ``mixed`` = p o a of BLOCK_M rows; grid (row blocks,). ADAPTERS >= adapters."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    which = tl.arange(0, ADAPTERS)
    within = tl.arange(0, BLOCK_R)
    columns = ranks + adapters

    # 1. the scores
    scores = masked_load(w + ranks, rows, which, m, adapters, columns, 1)
    for i in range(0, adapters):
        last = tl.load(starts + i + 1)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(tl.load(starts + i), last, BLOCK_R):
            z_tile = masked_load(z, rows, first + within, m, last, ranks, 1)
            w_tile = masked_load(w, rows, first + within, m, last, columns, 1)
            total += tl.sum(activation(z_tile, ACTIVATION) * w_tile, 1)
        scores += tl.where(which[None, :] == i, total[:, None], 0.0)

    # 2. p
    scores = tl.where((which < adapters)[None, :], scores, float("-inf"))
    e = tl.exp(scores - tl.max(scores, 1)[:, None])
    p_tile = e / tl.sum(e, 1)[:, None]
    p_mask = (rows < m)[:, None] & (which < adapters)[None, :]
    tl.store(pointers(p, rows, which, adapters, 1), p_tile, mask=p_mask)

    # 3. p o a
    for i in range(0, adapters):
        last = tl.load(starts + i + 1)
        own_p = _of_adapter(p_tile, which, i)
        for first in range(tl.load(starts + i), last, BLOCK_R):
            cols = first + within
            z_tile = masked_load(z, rows, cols, m, last, ranks, 1)
            mask = (rows < m)[:, None] & (cols < last)[None, :]
            mixed_tile = own_p[:, None] * activation(z_tile, ACTIVATION)
            tl.store(pointers(mixed, rows, cols, ranks, 1), mixed_tile, mask=mask)


@triton.jit
def adapter_fusion_weights_bwd_kernel(
    z, w, p, t, from_v, starts, dpre, dw, mixed, m, ranks, adapters,
    ACTIVATION: tl.constexpr, NEEDS_ROWS: tl.constexpr, NEEDS_MIX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, ADAPTERS: tl.constexpr,
):  # fmt: skip
    """dpre and dw with NEEDS_ROWS, ``mixed`` = p o a with NEEDS_MIX; grid (row blocks,).

    ``from_v`` [m, N] is dy . v.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    which = tl.arange(0, ADAPTERS)
    within = tl.arange(0, BLOCK_R)
    columns = ranks + adapters
    p_tile = masked_load(p, rows, which, m, adapters, adapters, 1)
    dp = p_tile

    # 1. tau, and dp
    if NEEDS_ROWS:
        tau = masked_load(from_v, rows, which, m, adapters, adapters, 1)
        for i in range(0, adapters):
            last = tl.load(starts + i + 1)
            total = tl.zeros((BLOCK_M,), tl.float32)
            for first in range(tl.load(starts + i), last, BLOCK_R):
                z_tile = masked_load(z, rows, first + within, m, last, ranks, 1)
                t_tile = masked_load(t, rows, first + within, m, last, ranks, 1)
                total += tl.sum(activation(z_tile, ACTIVATION) * t_tile, 1)
            tau += tl.where(which[None, :] == i, total[:, None], 0.0)
        dp = p_tile * (tau - tl.sum(p_tile * tau, 1)[:, None])
        dp_mask = (rows < m)[:, None] & (which < adapters)[None, :]
        tl.store(pointers(dw + ranks, rows, which, columns, 1), dp, mask=dp_mask)

    # 2. the rest of dw, dpre and p o a
    for i in range(0, adapters):
        last = tl.load(starts + i + 1)
        own_p = _of_adapter(p_tile, which, i)[:, None]
        own_dp = _of_adapter(dp, which, i)[:, None]
        for first in range(tl.load(starts + i), last, BLOCK_R):
            cols = first + within
            mask = (rows < m)[:, None] & (cols < last)[None, :]
            z_tile = masked_load(z, rows, cols, m, last, ranks, 1)
            a = activation(z_tile, ACTIVATION)
            if NEEDS_MIX:
                tl.store(pointers(mixed, rows, cols, ranks, 1), own_p * a, mask=mask)
            if NEEDS_ROWS:
                t_tile = masked_load(t, rows, cols, m, last, ranks, 1)
                w_tile = masked_load(w, rows, cols, m, last, columns, 1)
                slope = activation_derivative(z_tile, ACTIVATION)
                dpre_tile = slope * (own_p * t_tile + own_dp * w_tile)
                tl.store(pointers(dpre, rows, cols, ranks, 1), dpre_tile, mask=mask)
                tl.store(pointers(dw, rows, cols, columns, 1), own_dp * a, mask=mask)


# ---- gradients of the parameters ---------------------------------------------------------------


@triton.jit
def adapter_fusion_grad_kernel(
    x, g, parts, sums, m, k, r, chunk, sx_m, sx_k, sp_r, sp_k,
    NEEDS_SUMS: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The parts [splits, ...] of g^T x, of sides r and k, and those of g's sums over rows.

    ``g`` [m, r] is float32. Computed as [BLOCK_K, BLOCK_R], so that the long side is the tensor
    cores' m. Grid: (blocks of k x rank blocks, splits).
    """
    rank_blocks = tl.cdiv(r, BLOCK_R)
    which = tl.program_id(0) // rank_blocks
    cols = which * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    first = split * chunk
    last = min(first + chunk, m)
    within = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    x_ptrs = pointers(x, first + within, cols, sx_m, sx_k)
    g_ptrs = pointers(g, first + within, ranks, r, 1)
    for start in range(first, last, BLOCK_M):
        here = (start + within < last)[:, None]
        x_tile = tl.load(x_ptrs, mask=here & (cols < k)[None, :], other=0.0)
        g_tile = tl.load(g_ptrs, mask=here & (ranks < r)[None, :], other=0.0)
        acc = wide_dot(tl.trans(x_tile), g_tile, acc, TERMS, PRECISION)
        if NEEDS_SUMS:
            total += tl.sum(g_tile, 0)
        x_ptrs += step(BLOCK_M, sx_m)
        g_ptrs += step(BLOCK_M, r)
    parts += split.to(tl.int64) * r * k
    mask = (cols < k)[:, None] & (ranks < r)[None, :]
    tl.store(pointers(parts, cols, ranks, sp_k, sp_r), acc, mask=mask)
    if NEEDS_SUMS:
        tl.store(sums + split.to(tl.int64) * r + ranks, total, mask=(ranks < r) & (which == 0))
