# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined, assignment"
"""The kernels of ``multi_lora_linear`` that write y and dx, from S and dS.

    multi_tile_kernel      out = x w + delta (+ bias)    base and delta in one tile
    multi_delta_kernel     out += delta, or out = delta  after a library GEMM, or without a base
    decode_tile_kernel     y = x w + delta (+ bias), or y += delta, for few rows

The delta of a row of adapter g is scale_g B_g S, in dx A_g^T dS under dropout's mask.

A tile of rows is walked run by run (``banks.py``), each at its adapter's true rank. What a run
gives is selected into its own rows, never multiplied by zero for the others, so nothing of one
adapter or row, not even a NaN, gets into another's result. A run without an adapter costs one
comparison.
"""

import triton
import triton.language as tl

from peft_kernels.triton.common.blocks import (
    dot,
    kept_mask,
    pointers,
    rank_dot,
    rounded,
    step,
    tile_position,
    wait_for_first,
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

# ---- the delta ---------------------------------------------------------------------------------


@triton.jit
def _before(widths, bank):
    """Where a bank's columns begin."""
    first = 0
    for i in tl.static_range(1, len(widths)):
        first += tl.where(bank >= i, widths[i - 1], 0)
    return first


@triton.jit
def _banks_of(bank, banks, SUMS: tl.constexpr):
    """The first and the last bank (exclusive) that a tile of columns takes part in."""
    if SUMS:
        return 0, len(banks)
    else:
        return bank, bank + 1


@triton.jit
def _with_delta(slot, ranks, first_bank, last_bank):
    """``slot`` where one of these banks has a rank for it, and -1 elsewhere."""
    rank = tl.zeros_like(slot)
    for bank in range(first_bank, last_bank):
        rank = tl.maximum(rank, tl.load(pick(ranks, bank) + slot, mask=slot >= 0, other=0))
    return tl.where(rank > 0, slot, -1)


@triton.jit
def _add_delta(
    acc, g, own, rows, ordinals, cols, first_col, width, first_bank, last_bank,
    s, matrices, tables, ranks, scales, drop_p, seeds, s_widths, s_columns, dtype: tl.constexpr,
    SCALED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc, in the ``own`` rows of adapter g + what these banks together give them."""
    delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One stage: stages would take shared memory from the base's loop.
    for bank in tl.range(first_bank, last_bank, num_stages=1):
        if DROPOUT:  # each bank has a mask of its own
            delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        rank = tl.load(pick(ranks, bank) + g)
        for first in tl.range(0, rank, BLOCK_R, num_stages=1):
            qs = first + tl.arange(0, BLOCK_R)
            held = qs < rank
            s_ptrs = pointers(s + _before(s_widths, bank), rows, qs, s_columns, 1)
            s_mask = own[:, None] & in_pages(qs, rank)[None, :]
            s_tile = tl.load(s_ptrs, mask=s_mask, other=0.0)
            if SCALED:
                s_tile = s_tile * tl.load(pick(scales, bank) + g)
            max_pages = pick(s_widths, bank) // PAGE
            held_rows = page_rows(pick(tables, bank), g, qs, rank, max_pages)
            q_ptrs = pointers(pick(matrices, bank), held_rows, cols, width, 1)
            q_tile = tl.load(q_ptrs, mask=held[:, None] & (cols < width)[None, :], other=0.0)
            delta = rank_dot(s_tile, q_tile, delta, dtype, PRECISION, BY_ROW=True)
        if DROPOUT:
            threshold, inv_keep = dropout_numbers(pick(drop_p, bank) + g)
            key = tl.load(pick(seeds, bank) + g)
            kept = kept_mask(key, threshold, ordinals, first_col, BLOCK_M, BLOCK_N)
            delta = tl.where(kept, delta * inv_keep, 0.0)
            acc = tl.where(own[:, None], acc + delta, acc)
    if not DROPOUT:
        acc = tl.where(own[:, None], acc + delta, acc)
    return acc


# ---- many rows ---------------------------------------------------------------------------------


@triton.jit
def multi_tile_kernel(
    x, w, bias, out, s, matrices, tables, ranks, scales, drop_p, seeds, ids, order, starts,
    m, depth, per_id, slots, s_columns, sx_m, sx_k, sw_k, sw_n, so_m, widths, s_widths,
    HAS_BIAS: tl.constexpr, SUMS: tl.constexpr, GROUPED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """out = x w + delta + bias in one store.

    y:  x = x,  w = W^T, s = S; each bank's matrices are its b, for its slice of the columns
    dx: x = dy, w = W, s = dS; matrices are the banks' a, and it SUMS them over the same columns;
        the mask of dropout applies to the delta alone

    ``widths`` has one item where it SUMS and one a bank otherwise.
    """
    tile_m, tile_n = tile_position(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), blocks_of(widths, BLOCK_N), GROUP_M
    )
    bank, block, first_col = locate(tile_n, widths, BLOCK_N)
    first_place = tile_m * BLOCK_M
    rows, inside, slot = tile_rows(ids, order, first_place, m, per_id, slots, GROUPED, BLOCK_M)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    width = pick(widths, bank)
    inner = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = out.dtype.element_ty

    # 1. x w, products of x's dtype summed in float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_ptrs = pointers(x, rows, inner, sx_m, sx_k)
    w_ptrs = pointers(w, inner, first_col + cols, sw_k, sw_n)
    for k in range(0, depth, BLOCK_K):
        here = k + inner < depth
        x_tile = tl.load(x_ptrs, mask=inside[:, None] & here[None, :], other=0.0)
        w_tile = tl.load(w_ptrs, mask=here[:, None] & (cols < width)[None, :], other=0.0)
        acc = dot(x_tile, w_tile, acc, PRECISION)
        x_ptrs += step(BLOCK_K, sx_k)
        w_ptrs += step(BLOCK_K, sw_k)

    # 2. + the delta of each run, for rows that have an adapter with a rank here
    first_bank, last_bank = _banks_of(bank, matrices, SUMS)
    slot = _with_delta(slot, ranks, first_bank, last_bank)
    wait_for_first(PDL)
    where = tl.arange(0, BLOCK_M)
    start = 0
    while start < BLOCK_M:
        g, end = run(slot, start, BLOCK_M)
        if g >= 0:
            own = (where >= start) & (where < end)
            ordinals = where
            if DROPOUT:
                ordinals = first_place + where - tl.load(starts + g) * per_id
            acc = _add_delta(
                acc, g, own, rows, ordinals, cols, block * BLOCK_N, width, first_bank, last_bank,
                s, matrices, tables, ranks, scales, drop_p, seeds, s_widths, s_columns, dtype,
                not SUMS, DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        start = end

    # 3. bias, and the only rounding and store
    if HAS_BIAS:
        loaded = tl.load(bias + first_col + cols, mask=cols < width, other=0.0)
        acc += loaded.to(tl.float32)[None, :]
    mask = inside[:, None] & (cols < width)[None, :]
    tl.store(pointers(out, rows, first_col + cols, so_m, 1), rounded(acc, dtype), mask=mask)


@triton.jit
def multi_delta_kernel(
    out, s, matrices, tables, ranks, scales, drop_p, seeds, ids, order, starts,
    m, per_id, slots, s_columns, so_m, widths, s_widths,
    ADDS: tl.constexpr, SUMS: tl.constexpr, GROUPED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """out += delta in place, where it ADDS, or out = delta; arguments as of `multi_tile_kernel`.

    A run stores its own rows. Where it ADDS, rows without an adapter aren't touched.
    """
    tile_m, tile_n = tile_position(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), blocks_of(widths, BLOCK_N), GROUP_M
    )
    bank, block, first_col = locate(tile_n, widths, BLOCK_N)
    first_place = tile_m * BLOCK_M
    rows, inside, slot = tile_rows(ids, order, first_place, m, per_id, slots, GROUPED, BLOCK_M)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    width = pick(widths, bank)
    dtype: tl.constexpr = out.dtype.element_ty
    first_bank, last_bank = _banks_of(bank, matrices, SUMS)
    slot = _with_delta(slot, ranks, first_bank, last_bank)
    if ADDS:
        inside = slot >= 0
    wait_for_first(PDL)
    where = tl.arange(0, BLOCK_M)
    out_ptrs = pointers(out, rows, first_col + cols, so_m, 1)
    start = 0
    while start < BLOCK_M:
        g, end = run(slot, start, BLOCK_M)
        own = (where >= start) & (where < end)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if g >= 0:
            ordinals = where
            if DROPOUT:
                ordinals = first_place + where - tl.load(starts + g) * per_id
            acc = _add_delta(
                acc, g, own, rows, ordinals, cols, block * BLOCK_N, width, first_bank, last_bank,
                s, matrices, tables, ranks, scales, drop_p, seeds, s_widths, s_columns, dtype,
                not SUMS, DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        mask = (own & inside)[:, None] & (cols < width)[None, :]
        if ADDS:
            acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs, rounded(acc, dtype), mask=mask)
        start = end


# ---- few rows ----------------------------------------------------------------------------------


@triton.jit
def decode_tile_kernel(
    x, w, bias, y, s, matrices, tables, ranks, scales, ids,
    m, depth, per_id, slots, s_columns, sx_m, sx_k, sw_k, sw_n, sy_m, widths, s_widths,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y = x W^T + delta + bias or, without a base, y += delta, for few rows.

    Rows aren't walked one run after the other, which would wait for their pages as often: all rows
    of a tile take a rank row each at a time, and multiply it in float32.
    """
    blocks = blocks_of(widths, BLOCK_N)
    bank, block, first_col = locate(tl.program_id(0) % blocks, widths, BLOCK_N)
    first_row = tl.program_id(0) // blocks * BLOCK_M
    rows, inside, slot = tile_rows(ids, ids, first_row, m, per_id, slots, False, BLOCK_M)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    width = pick(widths, bank)

    # 1. x W^T
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BASE:
        inner = tl.arange(0, BLOCK_K)
        x_ptrs = pointers(x, rows, inner, sx_m, sx_k)
        w_ptrs = pointers(w, inner, first_col + cols, sw_k, sw_n)
        for start in range(0, depth, BLOCK_K):
            here = start + inner < depth
            x_tile = tl.load(x_ptrs, mask=inside[:, None] & here[None, :], other=0.0)
            w_tile = tl.load(w_ptrs, mask=here[:, None] & (cols < width)[None, :], other=0.0)
            acc = dot(x_tile, w_tile, acc, PRECISION)
            x_ptrs += step(BLOCK_K, sx_k)
            w_ptrs += step(BLOCK_K, sw_k)

    # 2. scale B S, each row with its own adapter
    table = pick(tables, bank)
    matrix = pick(matrices, bank)
    max_pages = pick(s_widths, bank) // PAGE
    rank = tl.load(pick(ranks, bank) + slot, mask=slot >= 0, other=0)
    scale = tl.load(pick(scales, bank) + slot, mask=slot >= 0, other=0.0)
    wait_for_first(PDL)
    s_ptrs = s + _before(s_widths, bank) + rows.to(tl.int64) * s_columns
    delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, tl.max(rank, axis=0), PAGE):
        held_rows = page_rows(table, slot, tl.zeros_like(slot) + first, rank, max_pages)
        for i in tl.static_range(PAGE):
            held = first + i < rank
            factor = tl.load(s_ptrs + first + i, mask=held, other=0.0) * scale
            b_mask = held[:, None] & (cols < width)[None, :]
            b_tile = tl.load(pointers(matrix, held_rows + i, cols, width, 1), b_mask, other=0.0)
            delta += factor[:, None] * b_tile.to(tl.float32)

    # 3. bias, and the only rounding and store
    acc += delta
    if HAS_BIAS:
        loaded = tl.load(bias + first_col + cols, mask=cols < width, other=0.0)
        acc += loaded.to(tl.float32)[None, :]
    y_ptrs = pointers(y, rows, first_col + cols, sy_m, 1)
    if HAS_BASE:
        mask = inside[:, None] & (cols < width)[None, :]
    else:
        mask = (rank > 0)[:, None] & (cols < width)[None, :]
        acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, rounded(acc, y.dtype.element_ty), mask=mask)
