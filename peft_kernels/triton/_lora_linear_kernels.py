# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernels of ``lora_linear``; the maths is in ``peft_kernels/ops/lora_linear.py``.

    shrink_kernel          S  = dropout(x) A^T                     skinny, split over k
    tile_kernel            out = in M + factor P Q (+ bias)        y with P = S, dx with P = dS
    in_loop_kernel         y and S in one loop over k
    from_dy_kernel         dS = dy B and dB = dy^T S               one read of dy
    grad_a_kernel          dA = dS^T dropout(x)                    split over m
    add_low_rank_kernel    out += factor P Q                       after a library GEMM
    sum_partials_kernel    adds up the splits in a fixed order

Rounding. Sums are float32. Products of two tensors in x's dtype are exact. S, dS, dA and dB keep
float32's precision (`_wide_dot`); inside y and dx, whose elements are rounded to x's dtype anyway,
the two small operands are rounded to bfloat16 first (`_rank_dot`). No kernel uses an atomic, and
every sum has one order, so the same input gives the same bits.
"""

import os

import triton
import triton.language as tl

# The interpreter has bfloat16 as raw uint16: it multiplies those integers in tl.dot, and truncates
# where a GPU rounds to nearest. Under it the helpers below widen, and round, by themselves.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


# ---- scalars, tiles, rounding ------------------------------------------------------------------


@triton.jit
def _scalar(value, ON_DEVICE: tl.constexpr):
    """An argument that is a number, or points to a 0-d tensor on the device (no host sync)."""
    if ON_DEVICE:
        return tl.load(value)
    else:
        return value


@triton.jit
def _factor(value, ON_DEVICE: tl.constexpr):
    """As `_scalar`, in float32: a float64 scale must not widen the tile it multiplies."""
    if ON_DEVICE:
        return tl.load(value).to(tl.float32)
    else:
        return value


@triton.jit
def _tile_position(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Walks GROUP_M rows of tiles down before the next column, so that both operands stay in L2."""
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def _pointers(base, rows, cols, row_stride, col_stride):
    """[rows, cols] of pointers; the offsets are 64-bit."""
    return base + (
        rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    )


@triton.jit
def _step(length: tl.constexpr, stride):
    """How far a pointer moves over ``length`` elements, in 64 bits."""
    return tl.full((), length, tl.int64) * stride


@triton.jit
def _rounded(tile, dtype: tl.constexpr):
    """``tile`` (float32) to the nearest value of ``dtype``, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = tile.to(tl.uint32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1)).to(tl.uint32)) >> 16
        bits = tl.where(tile == tile, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return tile.to(dtype)


# ---- products ----------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with float32 sums; PRECISION counts for float32 operands only."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _wide_dot(a, wide, acc, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a wide to float32's precision, where ``wide`` may be float32 and ``a`` 16 bits wide."""
    if a.dtype == wide.dtype:
        acc = _dot(a, wide, acc, PRECISION)
    elif a.dtype == tl.bfloat16:
        # wide = the sum of TERMS bfloat16 numbers, of 8 bits each: 3 hold a float32. The big tile
        # goes to the tensor cores as it is, and only the small one is multiplied again.
        rest = wide
        for _ in tl.static_range(TERMS):
            term = _rounded(rest, tl.bfloat16)
            acc = _dot(a, term, acc, PRECISION)
            rest = rest - term.to(tl.float32)
    else:
        # float16 has too few exponents for that sum (dS can pass 65504): both as float32.
        acc = _dot(a.to(tl.float32), wide, acc, PRECISION)
    return acc


@triton.jit
def _rank_dot(p, q, acc, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p q for a tile that ends in ``dtype``; p is float32, q float32 or ``dtype``."""
    if dtype == tl.bfloat16:
        # One rounding of each operand, unbiased, at the tensor cores' full rate.
        if q.dtype == tl.float32:
            q = _rounded(q, tl.bfloat16)
        acc = _dot(_rounded(p, tl.bfloat16), q, acc, PRECISION)
    else:
        # float16 could overflow where the float32 sum does not.
        acc = _dot(p, q.to(tl.float32), acc, PRECISION)
    return acc


@triton.jit
def _low_rank(
    p, q, rows, cols, m, n, r, sq_r, sq_n, factor, dtype: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """factor P Q of one tile; P is [m, r], contiguous, float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One stage: r is mostly one block, and stages would take shared memory from the base's loop.
    for first in tl.range(0, r, BLOCK_R, num_stages=1):
        ranks = first + tl.arange(0, BLOCK_R)
        p_mask = (rows < m)[:, None] & (ranks < r)[None, :]
        p_tile = tl.load(_pointers(p, rows, ranks, r, 1), mask=p_mask, other=0.0)
        q_mask = (ranks < r)[:, None] & (cols < n)[None, :]
        q_tile = tl.load(_pointers(q, ranks, cols, sq_r, sq_n), mask=q_mask, other=0.0)
        acc = _rank_dot(p_tile * factor, q_tile, acc, dtype, PRECISION)
    return acc


# ---- dropout -----------------------------------------------------------------------------------


@triton.jit
def _kept(seed, threshold, rows, first_col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] of booleans, the words of ``peft_kernels/ops/_dropout.py``.

    One Philox call gives the words of four neighbouring columns; first_col is a multiple of 4.
    """
    groups = first_col // 4 + tl.arange(0, BLOCK_N // 4)
    w0, w1, w2, w3 = tl.philox(seed, groups[None, :], rows[:, None], 0, 0)
    # Compared before they are joined: a tile of booleans takes fewer registers than one of words.
    even = tl.join(w0 >= threshold, w2 >= threshold)
    odd = tl.join(w1 >= threshold, w3 >= threshold)
    # join puts its operands on a new last axis, so the order in memory is w0 w1 w2 w3.
    return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_N))


# ---- forward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "threshold"])
def shrink_kernel(
    x, a, out, seed, threshold, inv_keep, m, k, r, chunk, sx_m, sx_k, sa_r, sa_k,
    DROPOUT: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """S[split, i, c] = sum over split's chunk of k of dropout(x)[i, k] A[c, k].

    ``out`` is [splits, m, r] float32. Grid: (row blocks x rank blocks, splits); the rank blocks of
    a row block are neighbours, so that the second one finds x in L2.
    """
    rank_blocks = tl.cdiv(r, BLOCK_R)
    rows = tl.program_id(0) // rank_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    first = split * chunk
    last = min(first + chunk, k)
    inner = tl.arange(0, BLOCK_K)
    if DROPOUT:
        key = _scalar(seed, SEED_ON_DEVICE)

    # 1. S = dropout(x) A^T over this split's columns
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    x_ptrs = _pointers(x, rows, first + inner, sx_m, sx_k)
    a_ptrs = _pointers(a, first + inner, ranks, sa_k, sa_r)
    for start in range(first, last, BLOCK_K):
        here = start + inner < last
        x_tile = tl.load(x_ptrs, mask=(rows < m)[:, None] & here[None, :], other=0.0)
        a_tile = tl.load(a_ptrs, mask=here[:, None] & (ranks < r)[None, :], other=0.0)
        if DROPOUT:
            kept = _kept(key, threshold, rows, start, BLOCK_M, BLOCK_K)
            x_tile = tl.where(kept, x_tile, 0.0)
        acc = _wide_dot(x_tile, a_tile, acc, 3, PRECISION)
        x_ptrs += _step(BLOCK_K, sx_k)
        a_ptrs += _step(BLOCK_K, sa_k)
    if DROPOUT:
        acc = acc * inv_keep

    # 2. the split's own slice: no atomics
    out += split.to(tl.int64) * m * r
    mask = (rows < m)[:, None] & (ranks < r)[None, :]
    tl.store(_pointers(out, rows, ranks, r, 1), acc, mask=mask)


@triton.jit(do_not_specialize=["seed", "threshold"])
def tile_kernel(
    a, w, bias, p, q, out, factor, seed, threshold, m, n, depth, r,
    sa_m, sa_k, sw_k, sw_n, sq_r, sq_n,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, FACTOR_ON_DEVICE: tl.constexpr,
    SEED_ON_DEVICE: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = a w + mask o (factor P Q) + bias, one store; a [m, depth], w [depth, n].

    y:  a = x,  w = W^T, P = S,  Q = B^T, factor = scale, no mask
    dx: a = dy, w = W,   P = dS, Q = A,   factor = 1 / (1 - p), the mask of dropout
    """
    pid_m, pid_n = _tile_position(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = out.dtype.element_ty

    # 1. factor P Q, first: the mask applies to it alone, and the base then adds to the same tile
    scale = _factor(factor, FACTOR_ON_DEVICE)
    acc = _low_rank(
        p, q, rows, cols, m, n, r, sq_r, sq_n, scale, dtype, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
    )
    if DROPOUT:
        key = _scalar(seed, SEED_ON_DEVICE)
        acc = tl.where(_kept(key, threshold, rows, pid_n * BLOCK_N, BLOCK_M, BLOCK_N), acc, 0.0)

    # 2. a w, products of x's dtype summed in float32
    a_ptrs = _pointers(a, rows, inner, sa_m, sa_k)
    w_ptrs = _pointers(w, inner, cols, sw_k, sw_n)
    for start in range(0, depth, BLOCK_K):
        here = start + inner < depth
        a_tile = tl.load(a_ptrs, mask=(rows < m)[:, None] & here[None, :], other=0.0)
        w_tile = tl.load(w_ptrs, mask=here[:, None] & (cols < n)[None, :], other=0.0)
        acc = _dot(a_tile, w_tile, acc, PRECISION)
        a_ptrs += _step(BLOCK_K, sa_k)
        w_ptrs += _step(BLOCK_K, sw_k)

    # 3. bias, and the only rounding and store
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(_pointers(out, rows, cols, n, 1), _rounded(acc, dtype), mask=mask)


@triton.jit(do_not_specialize=["seed", "threshold"])
def in_loop_kernel(
    x, w, bias, a, b, y, s, scale, seed, threshold, inv_keep, m, n, k, r,
    sx_m, sx_k, sw_k, sw_n, sa_r, sa_k, sb_n, sb_r,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
    SEED_ON_DEVICE: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = x W^T + scale S B^T + bias and S = dropout(x) A^T in one loop over k; r <= BLOCK_R.

    x is read for the base and serves S as well. Every program of a row of tiles computes the same
    S; the one of the first columns stores it.
    """
    pid_m, pid_n = _tile_position(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    inner = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = y.dtype.element_ty
    if DROPOUT:
        key = _scalar(seed, SEED_ON_DEVICE)

    # 1. x W^T and S = dropout(x) A^T
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    x_ptrs = _pointers(x, rows, inner, sx_m, sx_k)
    w_ptrs = _pointers(w, inner, cols, sw_k, sw_n)
    a_ptrs = _pointers(a, inner, ranks, sa_k, sa_r)
    for start in range(0, k, BLOCK_K):
        here = start + inner < k
        x_tile = tl.load(x_ptrs, mask=(rows < m)[:, None] & here[None, :], other=0.0)
        w_tile = tl.load(w_ptrs, mask=here[:, None] & (cols < n)[None, :], other=0.0)
        a_tile = tl.load(a_ptrs, mask=here[:, None] & (ranks < r)[None, :], other=0.0)
        acc = _dot(x_tile, w_tile, acc, PRECISION)
        if DROPOUT:
            kept = _kept(key, threshold, rows, start, BLOCK_M, BLOCK_K)
            x_tile = tl.where(kept, x_tile, 0.0)
        s_acc = _wide_dot(x_tile, a_tile, s_acc, 3, PRECISION)
        x_ptrs += _step(BLOCK_K, sx_k)
        w_ptrs += _step(BLOCK_K, sw_k)
        a_ptrs += _step(BLOCK_K, sa_k)
    if DROPOUT:
        s_acc = s_acc * inv_keep

    # 2. S, for the backward
    if pid_n == 0:
        s_mask = (rows < m)[:, None] & (ranks < r)[None, :]
        tl.store(_pointers(s, rows, ranks, r, 1), s_acc, mask=s_mask)

    # 3. + scale S B^T + bias, and the only rounding and store of y
    b_mask = (ranks < r)[:, None] & (cols < n)[None, :]
    b_tile = tl.load(_pointers(b, ranks, cols, sb_r, sb_n), mask=b_mask, other=0.0)
    acc = _rank_dot(s_acc * _factor(scale, SCALE_ON_DEVICE), b_tile, acc, dtype, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(_pointers(y, rows, cols, n, 1), _rounded(acc, dtype), mask=mask)


# ---- backward ----------------------------------------------------------------------------------


@triton.jit
def from_dy_kernel(
    dy, b, s, ds, db, m, n, r, chunk, sdy_m, sdy_n, sb_n, sb_r,
    NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dS = dy B and dB = dy^T S from one read of dy, both without scale.

    A program owns BLOCK_N columns and ``chunk`` rows. ``ds`` is [column blocks, m, r], ``db`` is
    [row chunks, n, r], float32; `sum_partials_kernel` adds them up. Grid: (column blocks x rank
    blocks, row chunks).
    """
    rank_blocks = tl.cdiv(r, BLOCK_R)
    column_block = tl.program_id(0) // rank_blocks
    cols = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    first = split * chunk
    last = min(first + chunk, m)
    within = tl.arange(0, BLOCK_M)
    columns_mask = (cols < n)[:, None] & (ranks < r)[None, :]
    if NEEDS_DS:
        b_tile = tl.load(_pointers(b, cols, ranks, sb_n, sb_r), mask=columns_mask, other=0.0)
        ds += column_block.to(tl.int64) * m * r
    if NEEDS_DB:
        acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)

    dy_ptrs = _pointers(dy, first + within, cols, sdy_m, sdy_n)
    for start in range(first, last, BLOCK_M):
        rows = start + within
        rows_mask = (rows < last)[:, None] & (ranks < r)[None, :]
        dy_tile = tl.load(dy_ptrs, mask=(rows < last)[:, None] & (cols < n)[None, :], other=0.0)
        # 1. dS = dy B: this block of columns' part
        if NEEDS_DS:
            part = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            part = _wide_dot(dy_tile, b_tile, part, 3, PRECISION)
            tl.store(_pointers(ds, rows, ranks, r, 1), part, mask=rows_mask)
        # 2. dB = dy^T S
        if NEEDS_DB:
            s_tile = tl.load(_pointers(s, rows, ranks, r, 1), mask=rows_mask, other=0.0)
            acc = _wide_dot(tl.trans(dy_tile), s_tile, acc, TERMS, PRECISION)
        dy_ptrs += _step(BLOCK_M, sdy_m)

    # 3. this chunk of rows' part of dB
    if NEEDS_DB:
        db += split.to(tl.int64) * n * r
        tl.store(_pointers(db, cols, ranks, r, 1), acc, mask=columns_mask)


@triton.jit(do_not_specialize=["seed", "threshold"])
def grad_a_kernel(
    x, ds, da, seed, threshold, inv_keep, m, k, r, chunk, sx_m, sx_k,
    DROPOUT: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dA[split, c, k] = sum over split's chunk of rows of dS[i, c] dropout(x)[i, k].

    ``da`` is [splits, r, k] float32. Computed as [BLOCK_K, BLOCK_R], so that the long side is the
    tensor cores' m. Grid: (blocks of k x rank blocks, splits).
    """
    rank_blocks = tl.cdiv(r, BLOCK_R)
    first_col = tl.program_id(0) // rank_blocks * BLOCK_K
    cols = first_col + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    first = split * chunk
    last = min(first + chunk, m)
    within = tl.arange(0, BLOCK_M)
    if DROPOUT:
        key = _scalar(seed, SEED_ON_DEVICE)

    # 1. dA^T = dropout(x)^T dS; the mask is drawn again
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    x_ptrs = _pointers(x, first + within, cols, sx_m, sx_k)
    ds_ptrs = _pointers(ds, first + within, ranks, r, 1)
    for start in range(first, last, BLOCK_M):
        rows = start + within
        x_tile = tl.load(x_ptrs, mask=(rows < last)[:, None] & (cols < k)[None, :], other=0.0)
        ds_mask = (rows < last)[:, None] & (ranks < r)[None, :]
        ds_tile = tl.load(ds_ptrs, mask=ds_mask, other=0.0)
        if DROPOUT:
            kept = _kept(key, threshold, rows, first_col, BLOCK_M, BLOCK_K)
            x_tile = tl.where(kept, x_tile, 0.0)
        acc = _wide_dot(tl.trans(x_tile), ds_tile, acc, TERMS, PRECISION)
        x_ptrs += _step(BLOCK_M, sx_m)
        ds_ptrs += _step(BLOCK_M, r)
    if DROPOUT:
        acc = acc * inv_keep

    # 2. the split's own slice
    da += split.to(tl.int64) * r * k
    mask = (cols < k)[:, None] & (ranks < r)[None, :]
    tl.store(_pointers(da, cols, ranks, 1, k), acc, mask=mask)


# ---- beside a library GEMM, and sums -----------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "threshold"])
def add_low_rank_kernel(
    p, q, out, factor, seed, threshold, m, n, r, sq_r, sq_n,
    DROPOUT: tl.constexpr, FACTOR_ON_DEVICE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out += mask o (factor P Q) in place; out [m, n], contiguous, holds the GEMM's result."""
    pid_m, pid_n = _tile_position(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = out.dtype.element_ty

    # 1. factor P Q
    scale = _factor(factor, FACTOR_ON_DEVICE)
    acc = _low_rank(
        p, q, rows, cols, m, n, r, sq_r, sq_n, scale, dtype, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
    )
    if DROPOUT:
        key = _scalar(seed, SEED_ON_DEVICE)
        acc = tl.where(_kept(key, threshold, rows, pid_n * BLOCK_N, BLOCK_M, BLOCK_N), acc, 0.0)

    # 2. read, add, write
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    out_ptrs = _pointers(out, rows, cols, n, 1)
    acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, _rounded(acc, dtype), mask=mask)


@triton.jit
def sum_partials_kernel(
    parts, out, factor, count, size,
    FACTOR_ON_DEVICE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = factor sum_j parts[j, i]; parts [count, size] float32, PARTS of them at a time."""
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = tl.arange(0, PARTS)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, PARTS):
        mask = (first + which < count)[:, None] & (where < size)[None, :]
        acc += tl.sum(tl.load(_pointers(parts, first + which, where, size, 1), mask, 0.0), axis=0)
    acc = acc * _factor(factor, FACTOR_ON_DEVICE)
    tl.store(out + where, _rounded(acc, out.dtype.element_ty), mask=where < size)
