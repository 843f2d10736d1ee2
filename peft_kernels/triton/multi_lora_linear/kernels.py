# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined, assignment"
"""The Triton kernels of ``multi_lora_linear``; the maths is in ``ops/multi_lora_linear.py``.

    multi_shrink_kernel    S = A_g dropout_g(x), or dS = scale_g B_g^T dy     skinny, split over k
    decode_shrink_kernel   S of few rows, a row and a page at a time          no product of tiles
    multi_tile_kernel      out = x w + scale_g B_g S (+ bias)                 y, and dx from dS
    multi_grad_kernel      dA_g = dS^T dropout_g(x), dB_g^T = scale_g S^T dy  in parts of the rows
    sum_parts_kernel       adds up the parts of an adapter's gradient

A tile of rows is walked run by run (``banks.py``), each at its adapter's true rank. What a run
gives is selected into its own rows, never multiplied by zero for the others, so nothing of one
adapter or row, not even a NaN, gets into another's result. A run without an adapter costs one
comparison.

Rounding is that of ``lora_linear/kernels.py``. No kernel uses an atomic.
"""

import triton
import triton.language as tl

from peft_kernels.triton.common.blocks import (
    kept_mask,
    let_next_begin,
    pointers,
    rounded,
    step,
    wide_dot,
)
from peft_kernels.triton.multi_lora_linear.banks import (
    PAGE,
    blocks_of,
    dropout_numbers,
    in_pages,
    locate,
    page_rows,
    pick,
    run,
    tile_rows,
)

# ---- S and dS ----------------------------------------------------------------------------------


@triton.jit
def multi_shrink_kernel(
    x, matrices, tables, ranks, scales, drop_p, seeds, out, ids, order, starts,
    m, per_id, slots, chunk, s_columns, sx_m, sx_k, depths, s_widths,
    SLICED: tl.constexpr, SCALED: tl.constexpr, GROUPED: tl.constexpr, DROPOUT: tl.constexpr,
    TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """S[split, i, q] = sum over split's chunk of k of dropout_g(x)[i, k] A_g[q, k].

    S:  x is x, matrices are the banks' a, each as deep as x is wide
    dS: x is dy, matrices are the banks' b, each as deep as its SLICE of dy is wide; SCALED

    ``out`` is [splits, m, s_columns] float32, zero beyond an adapter's rank. Grid: (row blocks x
    rank blocks, splits); the rank blocks of a row block are neighbours and find x in L2.
    """
    let_next_begin(PDL)
    blocks = blocks_of(s_widths, BLOCK_R)
    bank, rank_block, s_first = locate(tl.program_id(0) % blocks, s_widths, BLOCK_R)
    first_place = tl.program_id(0) // blocks * BLOCK_M
    split = tl.program_id(1)
    rows, inside, slot = tile_rows(ids, order, first_place, m, per_id, slots, GROUPED, BLOCK_M)
    where = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    qs = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    matrix = pick(matrices, bank)
    table = pick(tables, bank)
    rank_of = pick(ranks, bank)
    s_width = pick(s_widths, bank)
    depth = pick(depths, bank)
    if SLICED:
        before = tl.full((), 0, tl.int64)
        for i in tl.static_range(1, len(depths)):
            before += tl.where(bank >= i, depths[i - 1], 0)
        x += before * sx_k
    first = split * chunk
    last = min(first + chunk, depth)

    # 1. the rows whose rank reaches this block; the others' part of S is zero
    rank = tl.load(rank_of + slot, mask=slot >= 0, other=0)
    slot = tl.where(rank > rank_block * BLOCK_R, slot, -1)

    # 2. S = dropout(x) A^T, run by run, each stored in the split's own slice: no atomics
    out += split.to(tl.int64) * m * s_columns + s_first
    out_ptrs = pointers(out, rows, qs, s_columns, 1)
    start = 0
    while start < BLOCK_M:
        g, end = run(slot, start, BLOCK_M)
        own = (where >= start) & (where < end)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if g >= 0:
            rank_g = tl.load(rank_of + g)
            held = qs < rank_g
            held_rows = page_rows(table, g, qs, rank_g, s_width // PAGE)
            if DROPOUT:
                key = tl.load(pick(seeds, bank) + g)
                threshold, inv_keep = dropout_numbers(pick(drop_p, bank) + g)
                ordinals = first_place + where - tl.load(starts + g) * per_id
            x_ptrs = pointers(x, rows, first + inner, sx_m, sx_k)
            a_ptrs = pointers(matrix, first + inner, held_rows, 1, depth)
            for k in range(first, last, BLOCK_K):
                here = k + inner < last
                x_tile = tl.load(x_ptrs, mask=own[:, None] & here[None, :], other=0.0)
                a_tile = tl.load(a_ptrs, mask=here[:, None] & held[None, :], other=0.0)
                if DROPOUT:
                    kept = kept_mask(key, threshold, ordinals, k, BLOCK_M, BLOCK_K)
                    x_tile = tl.where(kept, x_tile, 0.0)
                acc = wide_dot(x_tile, a_tile, acc, TERMS, PRECISION)
                x_ptrs += step(BLOCK_K, sx_k)
                a_ptrs += BLOCK_K
            if DROPOUT:
                acc = acc * inv_keep
            if SCALED:
                acc = acc * tl.load(pick(scales, bank) + g)
            # zero beyond the rank whatever x holds
            acc = tl.where(held[None, :], acc, 0.0)
        mask = (own & inside)[:, None] & (qs < s_width)[None, :]
        tl.store(out_ptrs, acc, mask=mask)
        start = end


@triton.jit
def decode_shrink_kernel(
    x, matrices, tables, ranks, out, ids, per_id, slots, k, s_columns, sx_m, sx_k, s_widths,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """S of one row and one page of its adapter, in float32. Grid: (rows x pages of all banks,).

    With few rows, each likely with an adapter of its own, a product of tiles would be mostly
    padding; a page a program spreads even one row's adapter over the GPU.
    """
    let_next_begin(PDL)
    pages = blocks_of(s_widths, PAGE)
    bank, page, s_first = locate(tl.program_id(0) % pages, s_widths, PAGE)
    row = tl.program_id(0) // pages
    qs = page * PAGE + tl.arange(0, PAGE)
    slot = tl.load(ids + row // per_id)
    valid = (slot >= 0) & (slot < slots)
    rank = tl.load(pick(ranks, bank) + slot, mask=valid, other=0)

    # 1. S = A x, elementwise over k first
    acc = tl.zeros((PAGE, BLOCK_K), tl.float32)
    if page * PAGE < rank:
        held_rows = page_rows(pick(tables, bank), slot, qs, rank, pick(s_widths, bank) // PAGE)
        inner = tl.arange(0, BLOCK_K)
        x_ptrs = x + row.to(tl.int64) * sx_m + inner.to(tl.int64) * sx_k
        a_ptrs = pointers(pick(matrices, bank), held_rows, inner, k, 1)
        for first in range(0, k, BLOCK_K):
            here = first + inner < k
            x_tile = tl.load(x_ptrs, mask=here, other=0.0)
            a_tile = tl.load(a_ptrs, mask=(qs < rank)[:, None] & here[None, :], other=0.0)
            acc += x_tile.to(tl.float32)[None, :] * a_tile.to(tl.float32)
            x_ptrs += step(BLOCK_K, sx_k)
            a_ptrs += BLOCK_K

    # 2. and then across k; zero beyond the rank whatever x holds
    out += row.to(tl.int64) * s_columns + s_first
    tl.store(out + qs, tl.where(qs < rank, tl.sum(acc, axis=1), 0.0))


# ---- gradients ---------------------------------------------------------------------------------


@triton.jit
def _slot(index, listed, LISTED: tl.constexpr):
    if LISTED:
        return tl.load(listed + index)
    return index


@triton.jit
def multi_grad_kernel(
    s, x, out, ranks, scales, drop_p, seeds, listed, grad_rows, order, starts,
    per_id, chunk, size, cols_n, s_columns, sx_m, sx_k,
    SCALED: tl.constexpr, DROPOUT: tl.constexpr, LISTED: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[part, grad_rows[g] + q, k] = sum over part's chunk of g's rows of S[i, q] x[i, k].

    dA:   s = dS, x = x, dropped
    dB^T: s = S,  x = the bank's slice of dy, SCALED

    A part starts at g's own first row, so the sum doesn't depend on the other adapters. ``out`` is
    [parts, size, cols_n]. Grid: (slots x rank blocks, blocks of k, parts), as many as there
    could be, the slots being those LISTED or all; the programs of adapters without rows, or without
    gradient, end at once. Computed as [BLOCK_K, BLOCK_R], so that the long side is the tensor
    cores' m.
    """
    g = _slot(tl.program_id(0) // RANK_BLOCKS, listed, LISTED)
    first_rank = tl.program_id(0) % RANK_BLOCKS * BLOCK_R
    part = tl.program_id(2)
    out_row = tl.load(grad_rows + g)
    rank = tl.load(ranks + g)
    begin = tl.load(starts + g) * per_id
    first = begin + part * chunk
    last = min(first + chunk, tl.load(starts + g + 1) * per_id)
    if (out_row >= 0) & (rank > first_rank) & (first < last):
        first_col = tl.program_id(1) * BLOCK_K
        cols = first_col + tl.arange(0, BLOCK_K)
        qs = first_rank + tl.arange(0, BLOCK_R)
        within = tl.arange(0, BLOCK_M)
        if DROPOUT:
            key = tl.load(seeds + g)
            threshold, inv_keep = dropout_numbers(drop_p + g)

        # 1. x^T S; the mask is drawn again
        acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
        for start in range(first, last, BLOCK_M):
            places = start + within
            inside = places < last
            entries = tl.load(order + places // per_id, mask=inside, other=0)
            rows = entries * per_id + places % per_id
            x_mask = inside[:, None] & (cols < cols_n)[None, :]
            x_tile = tl.load(pointers(x, rows, cols, sx_m, sx_k), mask=x_mask, other=0.0)
            s_mask = inside[:, None] & in_pages(qs, rank)[None, :]
            s_tile = tl.load(pointers(s, rows, qs, s_columns, 1), mask=s_mask, other=0.0)
            if DROPOUT:
                kept = kept_mask(key, threshold, places - begin, first_col, BLOCK_M, BLOCK_K)
                x_tile = tl.where(kept, x_tile, 0.0)
            acc = wide_dot(tl.trans(x_tile), s_tile, acc, TERMS, PRECISION)
        if DROPOUT:
            acc = acc * inv_keep
        if SCALED:
            acc = acc * tl.load(scales + g)

        # 2. the part's own slice
        out += (part.to(tl.int64) * size + out_row) * cols_n
        mask = (cols < cols_n)[:, None] & (qs < rank)[None, :]
        out_ptrs = pointers(out, cols, qs, 1, cols_n)
        tl.store(out_ptrs, rounded(acc, out.dtype.element_ty), mask=mask)


@triton.jit
def sum_parts_kernel(
    parts, out, ranks, listed, grad_rows, starts, per_id, chunk, size, cols_n,
    LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up an adapter's parts, as many as it has chunks of rows, in order.

    Grid: (slots, blocks of columns), the slots as those of `multi_grad_kernel`.
    """
    g = _slot(tl.program_id(0), listed, LISTED)
    out_row = tl.load(grad_rows + g)
    rows = (tl.load(starts + g + 1) - tl.load(starts + g)) * per_id
    if (out_row >= 0) & (rows > 0):
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        rank = tl.load(ranks + g)
        for first in range(0, rank, PAGE):
            qs = first + tl.arange(0, PAGE)
            mask = (qs < rank)[:, None] & (cols < cols_n)[None, :]
            part_ptrs = pointers(parts, out_row + qs, cols, cols_n, 1)
            acc = tl.zeros((PAGE, BLOCK), tl.float32)
            for _ in range(0, tl.cdiv(rows, chunk)):
                acc += tl.load(part_ptrs, mask=mask, other=0.0)
                part_ptrs += step(1, size) * cols_n
            out_ptrs = pointers(out, out_row + qs, cols, cols_n, 1)
            tl.store(out_ptrs, rounded(acc, out.dtype.element_ty), mask=mask)
