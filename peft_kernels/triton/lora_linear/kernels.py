# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernels of ``lora_linear``; the maths is in ``peft_kernels/ops/lora_linear.py``.

    shrink_kernel          S  = dropout(x) A^T                     skinny, split over k
    tile_kernel            out = a w + factor P Q (+ bias)         y with P = S, dx with P = dS
    in_loop_kernel         y and S in one loop over k              for few rows or columns
    from_dy_kernel         dS = dy B and dB = dy^T S               one read of dy
    grad_a_kernel          dA = dS^T dropout(x)                    split over m
    add_low_rank_kernel    out = base + factor P Q                 after a library GEMM, or parts

Where programs are few, tile_kernel and in_loop_kernel split k and store float32 parts, which
add_low_rank_kernel adds up in their order.

With a gain, as ``dora_linear`` has one, y is gain (x W^T + scale S B^T) + bias.

Rounding. Sums are float32. Products of two tensors in x's dtype are exact. S, dS, dA and dB keep
float32's precision (`wide_dot`); inside y and dx, whose elements are rounded to x's dtype anyway,
the two small operands are rounded to x's dtype first (`rank_dot`). No kernel uses an atomic, and
every sum has one order, so the same input gives the same bits.

Terms. A float32 operand beside x in bfloat16 is the sum of TERMS numbers of bfloat16. `wide_dot`
multiplies by one after the other. With SLOTS, a power of two that isn't less, they are beside each
other in one operand (`joined`), so that a program waits for one product. A may lie in terms
already, [TERMS, r, k] (`terms_kernel`): then a program doesn't wait at all.
"""

import triton
import triton.language as tl

from peft_kernels.triton.common.blocks import (
    added_slots,
    dot,
    float_scalar,
    joined,
    kept_mask,
    let_next_begin,
    pointers,
    rank_dot,
    rounded,
    scalar,
    slots_of,
    step,
    tile_position,
    wait_for_first,
    wide_dot,
)

# ---- the low-rank part of a tile ---------------------------------------------------------------


@triton.jit
def low_rank(
    p, q, rows, cols, m, n, r, sq_r, sq_n, factor, dtype: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """factor P Q of one tile; P is [m, r], contiguous, float32, or in PARTS to be added up."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return plus_low_rank(
        acc, p, q, rows, cols, m, n, r, sq_r, sq_n, factor, dtype, PRECISION, BLOCK_R, PARTS
    )


@triton.jit
def plus_low_rank(
    acc, p, q, rows, cols, m, n, r, sq_r, sq_n, factor, dtype: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """acc + factor P Q."""
    # One stage: r is mostly one block, and stages would take shared memory from the base's loop.
    for first in tl.range(0, r, BLOCK_R, num_stages=1):
        ranks = first + tl.arange(0, BLOCK_R)
        p_tile = sum_of_parts(p, rows, ranks, m, r, PARTS)
        q_mask = (ranks < r)[:, None] & (cols < n)[None, :]
        q_tile = tl.load(pointers(q, ranks, cols, sq_r, sq_n), mask=q_mask, other=0.0)
        acc = rank_dot(p_tile * factor, q_tile, acc, dtype, PRECISION)
    return acc


@triton.jit
def sum_of_parts(parts, rows, cols, m, n, PARTS: tl.constexpr):
    """parts[0] + parts[1] + ... of one tile, in float32; parts [PARTS, m, n], contiguous."""
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    where = pointers(parts, rows, cols, n, 1)
    acc = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        acc += tl.load(where + step(part, m) * n, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def ended(acc, gain, bias, cols, n, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr):
    """gain acc + bias, of a tile's columns; gain [n] is float32."""
    if HAS_GAIN:
        acc *= tl.load(gain + cols, mask=cols < n, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    return acc


# ---- forward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "threshold"])
def shrink_kernel(
    x, a, out, seed, threshold, inv_keep, m, k, r, chunk, sx_m, sx_k, sa_t, sa_r, sa_k,
    DROPOUT: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, TERMS: tl.constexpr,
    SLOTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """S[split, i, c] = sum over split's chunk of k of dropout(x)[i, k] A[c, k].

    ``out`` is [splits, m, r] float32. Grid: (row blocks x rank blocks, splits); the rank blocks of
    a row block are neighbours, so that the second one finds x in L2.
    """
    let_next_begin(PDL)
    rank_blocks = tl.cdiv(r, BLOCK_R)
    rows = tl.program_id(0) // rank_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first_rank = tl.program_id(0) % rank_blocks * BLOCK_R
    ranks = first_rank + tl.arange(0, BLOCK_R)
    A_SLOTS: tl.constexpr = SLOTS if a.dtype.element_ty == x.dtype.element_ty else 1
    a_ranks, term = slots_of(first_rank, BLOCK_R, A_SLOTS)
    a_there = (a_ranks < r) & (term < TERMS)
    split = tl.program_id(1)
    first = split * chunk
    last = min(first + chunk, k)
    inner = tl.arange(0, BLOCK_K)
    if DROPOUT:
        key = scalar(seed, SEED_ON_DEVICE)

    # 1. S = dropout(x) A^T over this split's columns
    acc = tl.zeros((BLOCK_M, SLOTS * BLOCK_R), tl.float32)
    x_ptrs = pointers(x, rows, first + inner, sx_m, sx_k)
    a_ptrs = pointers(a, first + inner, a_ranks, sa_k, sa_r) + term.to(tl.int64)[None, :] * sa_t
    for start in range(first, last, BLOCK_K):
        here = start + inner < last
        x_tile = tl.load(x_ptrs, mask=(rows < m)[:, None] & here[None, :], other=0.0)
        a_tile = tl.load(a_ptrs, mask=here[:, None] & a_there[None, :], other=0.0)
        if DROPOUT:
            kept = kept_mask(key, threshold, rows, start, BLOCK_M, BLOCK_K)
            x_tile = tl.where(kept, x_tile, 0.0)
        acc = wide_dot(x_tile, joined(a_tile, x_tile.dtype, SLOTS), acc, TERMS, PRECISION)
        x_ptrs += step(BLOCK_K, sx_k)
        a_ptrs += step(BLOCK_K, sa_k)
    acc = added_slots(acc, SLOTS)
    if DROPOUT:
        acc = acc * inv_keep

    # 2. the split's own slice: no atomics
    out += split.to(tl.int64) * m * r
    mask = (rows < m)[:, None] & (ranks < r)[None, :]
    tl.store(pointers(out, rows, ranks, r, 1), acc, mask=mask)


@triton.jit(do_not_specialize=["seed", "threshold"])
def tile_kernel(
    a, w, bias, gain, p, q, out, factor, seed, threshold, m, n, depth, r, chunk,
    sa_m, sa_k, sw_k, sw_n, sq_r, sq_n,
    HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, DROPOUT: tl.constexpr,
    FACTOR_ON_DEVICE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """out = gain (a w + mask o (factor P Q)) + bias, one store; a [m, depth], w [depth, n].

    y:  a = x,  w = W^T, P = S,  Q = B^T, factor = scale, no mask
    dx: a = dy, w = W,   P = dS, Q = A,   factor = 1 / (1 - p), the mask of dropout

    Grid: (tiles, splits). With SPLIT, out[split] = a w over ``chunk`` of depth alone; ``out`` is
    [splits, m, n] float32, and what else y or dx has is left to add_low_rank_kernel.

    With PDL, which a mask doesn't go with, P is read last: the base's product needs no wait for it.
    """
    tl.static_assert(
        SPLIT or not (PDL and DROPOUT), "a mask applies to P Q before the base adds to it"
    )
    let_next_begin(PDL and SPLIT)
    pid_m, pid_n = tile_position(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    first = split * chunk
    last = min(first + chunk, depth)
    dtype: tl.constexpr = out.dtype.element_ty

    # 1. factor P Q, first: the mask applies to it alone, and the base then adds to the same tile
    scale = float_scalar(factor, FACTOR_ON_DEVICE)
    if SPLIT or PDL:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        acc = low_rank(
            p, q, rows, cols, m, n, r, sq_r, sq_n, scale, dtype, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        if DROPOUT:
            key = scalar(seed, SEED_ON_DEVICE)
            kept = kept_mask(key, threshold, rows, pid_n * BLOCK_N, BLOCK_M, BLOCK_N)
            acc = tl.where(kept, acc, 0.0)

    # 2. a w, products of x's dtype summed in float32
    a_ptrs = pointers(a, rows, first + inner, sa_m, sa_k)
    w_ptrs = pointers(w, first + inner, cols, sw_k, sw_n)
    for start in range(first, last, BLOCK_K):
        here = start + inner < last
        a_tile = tl.load(a_ptrs, mask=(rows < m)[:, None] & here[None, :], other=0.0)
        w_tile = tl.load(w_ptrs, mask=here[:, None] & (cols < n)[None, :], other=0.0)
        acc = dot(a_tile, w_tile, acc, PRECISION)
        a_ptrs += step(BLOCK_K, sa_k)
        w_ptrs += step(BLOCK_K, sw_k)

    # 3. gain and bias, and the only rounding and store
    wait_for_first(PDL)
    if SPLIT:
        out += split.to(tl.int64) * m * n
    else:
        if PDL:
            acc = plus_low_rank(
                acc, p, q, rows, cols, m, n, r, sq_r, sq_n, scale, dtype, PRECISION, BLOCK_R
            )
        acc = ended(acc, gain, bias, cols, n, HAS_GAIN, HAS_BIAS)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(pointers(out, rows, cols, n, 1), rounded(acc, dtype), mask=mask)


@triton.jit(do_not_specialize=["seed", "threshold"])
def in_loop_kernel(
    x, w, bias, gain, a, b, y, s, scale, seed, threshold, inv_keep, m, n, k, r, chunk,
    sx_m, sx_k, sw_k, sw_n, sa_t, sa_r, sa_k, sb_n, sb_r,
    HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, DROPOUT: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, TERMS: tl.constexpr,
    SLOTS: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y = gain (x W^T + scale S B^T) + bias, S = dropout(x) A^T, one loop over k; r <= BLOCK_R.

    x is read for the base and serves S as well. Every program of a row of tiles computes the same
    S; the one of the first columns stores it.

    Grid: (tiles, splits). With SPLIT, y[split] and s[split] are the sums over ``chunk`` of k alone;
    both are float32, and what else y has is left to add_low_rank_kernel.
    """
    let_next_begin(PDL)
    pid_m, pid_n = tile_position(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    A_SLOTS: tl.constexpr = SLOTS if a.dtype.element_ty == x.dtype.element_ty else 1
    a_ranks, term = slots_of(0, BLOCK_R, A_SLOTS)
    a_there = (a_ranks < r) & (term < TERMS)
    inner = tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    first = split * chunk
    last = min(first + chunk, k)
    dtype: tl.constexpr = y.dtype.element_ty
    if DROPOUT:
        key = scalar(seed, SEED_ON_DEVICE)

    # 1. x W^T and S = dropout(x) A^T
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s_acc = tl.zeros((BLOCK_M, SLOTS * BLOCK_R), tl.float32)
    x_ptrs = pointers(x, rows, first + inner, sx_m, sx_k)
    w_ptrs = pointers(w, first + inner, cols, sw_k, sw_n)
    a_ptrs = pointers(a, first + inner, a_ranks, sa_k, sa_r) + term.to(tl.int64)[None, :] * sa_t
    for start in range(first, last, BLOCK_K):
        here = start + inner < last
        x_tile = tl.load(x_ptrs, mask=(rows < m)[:, None] & here[None, :], other=0.0)
        w_tile = tl.load(w_ptrs, mask=here[:, None] & (cols < n)[None, :], other=0.0)
        a_tile = tl.load(a_ptrs, mask=here[:, None] & a_there[None, :], other=0.0)
        acc = dot(x_tile, w_tile, acc, PRECISION)
        if DROPOUT:
            kept = kept_mask(key, threshold, rows, start, BLOCK_M, BLOCK_K)
            x_tile = tl.where(kept, x_tile, 0.0)
        s_acc = wide_dot(x_tile, joined(a_tile, x_tile.dtype, SLOTS), s_acc, TERMS, PRECISION)
        x_ptrs += step(BLOCK_K, sx_k)
        w_ptrs += step(BLOCK_K, sw_k)
        a_ptrs += step(BLOCK_K, sa_k)
    s_acc = added_slots(s_acc, SLOTS)
    if DROPOUT:
        s_acc = s_acc * inv_keep

    # 2. S, for the backward, or the split's own slices
    if SPLIT:
        y += split.to(tl.int64) * m * n
        s += split.to(tl.int64) * m * r
    if pid_n == 0:
        s_mask = (rows < m)[:, None] & (ranks < r)[None, :]
        tl.store(pointers(s, rows, ranks, r, 1), s_acc, mask=s_mask)

    # 3. + scale S B^T, gain and bias, and the only rounding and store of y
    if not SPLIT:
        b_mask = (ranks < r)[:, None] & (cols < n)[None, :]
        b_tile = tl.load(pointers(b, ranks, cols, sb_r, sb_n), mask=b_mask, other=0.0)
        acc = rank_dot(s_acc * float_scalar(scale, SCALE_ON_DEVICE), b_tile, acc, dtype, PRECISION)
        acc = ended(acc, gain, bias, cols, n, HAS_GAIN, HAS_BIAS)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(pointers(y, rows, cols, n, 1), rounded(acc, dtype), mask=mask)


# ---- backward ----------------------------------------------------------------------------------


@triton.jit
def from_dy_kernel(
    dy, b, s, ds, db, m, n, r, group, chunk, sdy_m, sdy_n, sb_n, sb_r,
    NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, TERMS: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dS = dy B and dB = dy^T S from one read of dy, both without scale.

    A program owns ``group`` blocks of columns and ``chunk`` rows of dy. ``ds`` is [groups, m, r],
    ``db`` is [chunks, n, r], float32; `sum_partials` adds them up. Grid: (groups x rank
    blocks, chunks).
    """
    rank_blocks = tl.cdiv(r, BLOCK_R)
    which = tl.program_id(0) // rank_blocks
    ranks = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    first = split * chunk
    last = min(first + chunk, m)
    within = tl.arange(0, BLOCK_M)
    first_block = which * group
    last_block = min(first_block + group, tl.cdiv(n, BLOCK_N))
    B_SLOTS: tl.constexpr = 1 if b.dtype.element_ty == dy.dtype.element_ty else SLOTS
    ds += which.to(tl.int64) * m * r
    db += split.to(tl.int64) * n * r

    for block in range(first_block, last_block):
        cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
        columns_mask = (cols < n)[:, None] & (ranks < r)[None, :]
        if NEEDS_DS:
            b_tile = tl.load(pointers(b, cols, ranks, sb_n, sb_r), mask=columns_mask, other=0.0)
            b_tile = joined(b_tile, dy.dtype.element_ty, B_SLOTS)
        acc = tl.zeros((BLOCK_N, SLOTS * BLOCK_R), tl.float32)
        dy_ptrs = pointers(dy, first + within, cols, sdy_m, sdy_n)
        for start in range(first, last, BLOCK_M):
            rows = start + within
            mask = (rows < last)[:, None] & (ranks < r)[None, :]
            dy_mask = (rows < last)[:, None] & (cols < n)[None, :]
            dy_tile = tl.load(dy_ptrs, mask=dy_mask, other=0.0)
            # 1. dS += dy B, in the program's own slice: small enough to stay in the cache
            if NEEDS_DS:
                ds_ptrs = pointers(ds, rows, ranks, r, 1)
                part = tl.load(ds_ptrs, mask=mask & (block > first_block), other=0.0)
                if B_SLOTS == 1:
                    part = wide_dot(dy_tile, b_tile, part, TERMS, PRECISION)
                else:
                    new = tl.zeros((BLOCK_M, B_SLOTS * BLOCK_R), tl.float32)
                    part += added_slots(dot(dy_tile, b_tile, new, PRECISION), B_SLOTS)
                tl.store(ds_ptrs, part, mask=mask)
            # 2. dB += dy^T S
            if NEEDS_DB:
                s_tile = tl.load(pointers(s, rows, ranks, r, 1), mask=mask, other=0.0)
                s_tile = joined(s_tile, dy_tile.dtype, SLOTS)
                acc = wide_dot(tl.trans(dy_tile), s_tile, acc, TERMS, PRECISION)
            dy_ptrs += step(BLOCK_M, sdy_m)
        # 3. this chunk of rows' part of dB
        if NEEDS_DB:
            tl.store(pointers(db, cols, ranks, r, 1), added_slots(acc, SLOTS), mask=columns_mask)
        # the next block of columns loads what other threads stored to dS
        tl.debug_barrier()


@triton.jit(do_not_specialize=["seed", "threshold"])
def grad_a_kernel(
    x, ds, da, seed, threshold, inv_keep, m, k, r, chunk, sx_m, sx_k,
    DROPOUT: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, TERMS: tl.constexpr,
    SLOTS: tl.constexpr, PRECISION: tl.constexpr,
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
        key = scalar(seed, SEED_ON_DEVICE)

    # 1. dA^T = dropout(x)^T dS; the mask is drawn again
    acc = tl.zeros((BLOCK_K, SLOTS * BLOCK_R), tl.float32)
    x_ptrs = pointers(x, first + within, cols, sx_m, sx_k)
    ds_ptrs = pointers(ds, first + within, ranks, r, 1)
    for start in range(first, last, BLOCK_M):
        rows = start + within
        x_tile = tl.load(x_ptrs, mask=(rows < last)[:, None] & (cols < k)[None, :], other=0.0)
        ds_mask = (rows < last)[:, None] & (ranks < r)[None, :]
        ds_tile = tl.load(ds_ptrs, mask=ds_mask, other=0.0)
        if DROPOUT:
            kept = kept_mask(key, threshold, rows, first_col, BLOCK_M, BLOCK_K)
            x_tile = tl.where(kept, x_tile, 0.0)
        ds_tile = joined(ds_tile, x_tile.dtype, SLOTS)
        acc = wide_dot(tl.trans(x_tile), ds_tile, acc, TERMS, PRECISION)
        x_ptrs += step(BLOCK_M, sx_m)
        ds_ptrs += step(BLOCK_M, r)
    acc = added_slots(acc, SLOTS)
    if DROPOUT:
        acc = acc * inv_keep

    # 2. the split's own slice
    da += split.to(tl.int64) * r * k
    mask = (cols < k)[:, None] & (ranks < r)[None, :]
    tl.store(pointers(da, cols, ranks, 1, k), acc, mask=mask)


# ---- beside a library GEMM, and sums -----------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "threshold"])
def add_low_rank_kernel(
    base, bias, gain, p, q, s, out, factor, seed, threshold, m, n, r, sq_r, sq_n,
    HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, DROPOUT: tl.constexpr,
    FACTOR_ON_DEVICE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, P_PARTS: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """out = gain (base + mask o (factor P Q)) + bias; base [PARTS, m, n] to be added up.

    After a library's GEMM base is out itself, and without a gain the library adds the bias. P may
    be in P_PARTS as well; then their sum goes to ``s``.
    """
    pid_m, pid_n = tile_position(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = out.dtype.element_ty
    scale = float_scalar(factor, FACTOR_ON_DEVICE)
    # A library made the base before P. Scaling float16's P Q takes the registers that base is in.
    BASE_FIRST: tl.constexpr = PDL and PARTS == 1 and not DROPOUT and dtype != tl.float16

    # 1. base and factor P Q
    if BASE_FIRST:
        acc = sum_of_parts(base, rows, cols, m, n, PARTS)
        wait_for_first(PDL)
        acc = plus_low_rank(
            acc, p, q, rows, cols, m, n, r, sq_r, sq_n, scale, dtype, PRECISION, BLOCK_R, P_PARTS
        )
    else:
        wait_for_first(PDL)
        acc = low_rank(
            p, q, rows, cols, m, n, r, sq_r, sq_n, scale, dtype, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_R, P_PARTS,
        )  # fmt: skip
        if DROPOUT:
            key = scalar(seed, SEED_ON_DEVICE)
            kept = kept_mask(key, threshold, rows, pid_n * BLOCK_N, BLOCK_M, BLOCK_N)
            acc = tl.where(kept, acc, 0.0)
        acc += sum_of_parts(base, rows, cols, m, n, PARTS)

    # 2. end, write
    acc = ended(acc, gain, bias, cols, n, HAS_GAIN, HAS_BIAS)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(pointers(out, rows, cols, n, 1), rounded(acc, dtype), mask=mask)

    # 3. S, for the backward
    if P_PARTS > 1 and pid_n == 0:
        for first in range(0, r, BLOCK_R):
            ranks = first + tl.arange(0, BLOCK_R)
            total = sum_of_parts(p, rows, ranks, m, r, P_PARTS)
            s_mask = (rows < m)[:, None] & (ranks < r)[None, :]
            tl.store(pointers(s, rows, ranks, r, 1), total, mask=s_mask)
