# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernels of the backward of ``prefix_attention``.

With P the probabilities of all keys, of the prefix and of the text,

    delta = rowsum(dO o O)        dV = P^T dO        dS = P o (dO V^T - delta)
    dQ = scale dS K               dK = scale dS^T Q

    prefix_attention_delta_kernel       delta
    prefix_attention_query_grad_kernel  dQ, over the prefix and the text
    prefix_attention_text_grad_kernel   dK and dV of the text
    prefix_attention_prefix_grad_kernel dK and dV of the prefix, in parts to be summed

Tiles are those of the forward (``kernels.py``): a row is a query of one of the
heads that share the keys. P and dS are rounded to q's dtype for dQ, dK and dV, as these are; the
prefix's gradients, sums over the whole batch, keep float32's precision. No kernel uses an atomic,
and every sum has one order: the same input gives the same bits.
"""

import triton
import triton.language as tl

from peft_kernels.triton.common.blocks import WIDENED, dot, rank_dot, rounded, scales
from peft_kernels.triton.prefix_attention.kernels import (
    LOG2E,
    prefix_of_row,
    row_offsets,
    store_tile,
    text_of_row,
    tile_at,
    visible_scores,
)


@triton.jit(do_not_specialize=["count", "queries"])
def prefix_attention_delta_kernel(
    dout, out, delta, count, heads, queries, size, dout_strides,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta [B, Hq, S] float32; out [B, S, Hq, D]; grid (blocks of its rows,)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = rows < count
    cols = tl.arange(0, BLOCK_D)
    head, query, b = rows % heads, rows // heads % queries, rows // heads // queries
    offsets = b * dout_strides[0] + head * dout_strides[1] + query * dout_strides[2]
    left = tile_at(dout, offsets, cols, here, size, tl.float32, True, True)
    right = tile_at(out, rows * size, cols, here, size, tl.float32, True, True)
    at = (b * heads + head) * queries + query
    tl.store(delta + at, tl.sum(left * right, 1), mask=here)


@triton.jit
def _saved(lse, delta, offsets, here):
    """(lse in base-2 units, delta) of the rows; a row that saw nothing has inf, and so no P."""
    top = tl.load(lse + offsets, mask=here, other=float("-inf"))
    top = tl.where(top == float("-inf"), float("inf"), top * LOG2E)
    return top, tl.load(delta + offsets, mask=here, other=0.0)


@triton.jit
def _probabilities(s, top, mask):
    """exp2(s - top). Beside a float mask's lowest number the difference is rounding: P <= 1."""
    exponent = s - top
    if mask is not None:
        exponent = tl.minimum(exponent, 0.0)
    return tl.exp2(exponent)


# ---- dQ ----------------------------------------------------------------------------------------


@triton.jit
def _query_grad(
    dq, q_tile, dout_tile, top, delta, k, v, first, last, k_stride, v_stride, limits, mask,
    mask_rows, here, mask_stride, size, factor,
    MASKED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq + dS K of the keys ``first`` to ``last``."""
    cols = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = q_tile.dtype
    for start in range(first, last, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        k_offsets, v_offsets = at.to(tl.int64) * k_stride, at.to(tl.int64) * v_stride
        k_tile = tile_at(k, k_offsets, cols, at < last, size, dtype, MASKED, PADDED)
        zeros = tl.zeros((q_tile.shape[0], BLOCK_N), tl.float32)
        s = dot(q_tile, tl.trans(k_tile), zeros, PRECISION) * factor
        if MASKED:
            s = visible_scores(s, at, limits, mask, mask_rows, here, mask_stride, 1)
        p = _probabilities(s, top[:, None], mask)
        v_tile = tile_at(v, v_offsets, cols, at < last, size, dtype, MASKED, PADDED)
        dp = dot(dout_tile, tl.trans(v_tile), zeros, PRECISION)
        dq = rank_dot(p * (dp - delta[:, None]), k_tile, dq, dtype, PRECISION)
    return dq


@triton.jit(do_not_specialize=["queries", "keys", "length"])
def prefix_attention_query_grad_kernel(
    dout, q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, lse, delta, dq,
    heads, queries, keys, length, size, scale, factor,
    dout_strides, q_strides, k_strides, v_strides, pk_strides, pv_strides, mask_strides,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq [B, S, Hq, D]; grid (row blocks x heads x B,), as of the forward without splits."""
    count = queries * GROUP
    blocks = tl.cdiv(count, BLOCK_M)
    pid = tl.program_id(0)
    rows = (blocks - 1 - pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = (pid // blocks % heads).to(tl.int64)
    b = (pid // blocks // heads).to(tl.int64)
    here = rows < count
    cols = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = q.dtype.element_ty
    q += b * q_strides[0] + head * GROUP * q_strides[1]
    offsets = row_offsets(rows, GROUP, q_strides[2], q_strides[1])
    q_tile = tile_at(q, offsets, cols, here, size, dtype, True, PADDED)
    dout += b * dout_strides[0] + head * GROUP * dout_strides[1]
    offsets = row_offsets(rows, GROUP, dout_strides[2], dout_strides[1])
    dout_tile = tile_at(dout, offsets, cols, here, size, dtype, True, PADDED)
    ordered = b * queries * heads * GROUP
    saved = ordered + head * GROUP * queries + row_offsets(rows, GROUP, 1, queries)
    top, own_delta = _saved(lse, delta, saved, here)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    # 1. the prefix
    which, own_length = prefix_of_row(prefix_ids, b, length)
    limits = tl.zeros((BLOCK_M,), tl.int32) + own_length
    acc = _query_grad(
        acc, q_tile, dout_tile, top, own_delta,
        prefix_k + which * pk_strides[0] + head * pk_strides[1],
        prefix_v + which * pv_strides[0] + head * pv_strides[1],
        0, own_length, pk_strides[2], pv_strides[2], limits, None, None, None, 0, size, factor,
        True, PADDED, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    # 2. the text
    first, last = text_of_row(starts, ends, b, keys)
    limits = tl.zeros((BLOCK_M,), tl.int32) + last
    seen_by_all = last
    if CAUSAL:
        behind = keys - queries + 1
        limits = tl.minimum(limits, behind + rows // GROUP)
        seen_by_all = tl.minimum(last, behind + tl.min(rows, 0) // GROUP)
        last = tl.minimum(last, behind + tl.minimum(tl.max(rows, 0), count - 1) // GROUP)
    k += b * k_strides[0] + head * k_strides[1]
    v += b * v_strides[0] + head * v_strides[1]
    mask_rows = rows
    if mask is None:
        whole = first + tl.maximum(seen_by_all - first, 0) // BLOCK_N * BLOCK_N
        acc = _query_grad(
            acc, q_tile, dout_tile, top, own_delta, k, v, first, whole,
            k_strides[2], v_strides[2], None, None, None, None, 0, size, factor,
            False, PADDED, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        first = whole
    else:
        mask += b * mask_strides[0] + head * GROUP * mask_strides[1]
        mask_rows = row_offsets(rows, GROUP, mask_strides[2], mask_strides[1])
    acc = _query_grad(
        acc, q_tile, dout_tile, top, own_delta, k, v, first, last, k_strides[2], v_strides[2],
        limits, mask, mask_rows, here, mask_strides[3], size, factor,
        True, PADDED, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq += (ordered + head * GROUP) * size
    offsets = row_offsets(rows, GROUP, heads * GROUP * size, size)
    store_tile(dq, offsets, cols, here, size, acc * scale)


# ---- dK and dV ---------------------------------------------------------------------------------


@triton.jit
def _product(p, tile, acc, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p tile for a float32 p, the sum of TERMS numbers of the tile's dtype."""
    dtype: tl.constexpr = tile.dtype
    if TERMS == 1 or dtype == tl.float32 or PRECISION == WIDENED:
        acc = rank_dot(p, tile, acc, dtype, PRECISION)
    else:
        if dtype == tl.float16:
            up, down = scales(p, 60)
            p = p * up
            acc = acc * up
        for _ in tl.static_range(TERMS):
            term = rounded(p, dtype)
            acc = dot(term, tile, acc, PRECISION)
            p = p - term.to(tl.float32)
        if dtype == tl.float16:
            acc = acc * down
    return acc


@triton.jit
def _key_grads(
    dk, dv, k_tile, v_tile, at, q, dout, lse, delta, first, last, queries, keys, ends_at,
    q_strides, dout_strides, mask, mask_strides, size, factor,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk + dS^T Q and dv + P^T dO of the rows ``first`` to ``last``, tiles being [keys, rows].

    All pointers are those of a batch row's group of heads. With MASKED a row sees the keys ``at``
    that are below ``ends_at``, with CAUSAL up to its own.
    """
    cols = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = k_tile.dtype
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        here = rows < last
        q_offsets = row_offsets(rows, GROUP, q_strides[2], q_strides[1])
        q_tile = tile_at(q, q_offsets, cols, here, size, dtype, True, PADDED)
        zeros = tl.zeros((k_tile.shape[0], BLOCK_M), tl.float32)
        s = dot(k_tile, tl.trans(q_tile), zeros, PRECISION) * factor
        top, own_delta = _saved(lse, delta, row_offsets(rows, GROUP, 1, queries), here)
        if MASKED:
            limits = tl.zeros((BLOCK_M,), tl.int32) + ends_at
            if CAUSAL:
                limits = tl.minimum(limits, keys - queries + 1 + rows // GROUP)
            mask_rows = rows
            if mask is not None:
                mask_rows = row_offsets(rows, GROUP, mask_strides[2], mask_strides[1])
            s = visible_scores(s, at, limits, mask, mask_rows, here, mask_strides[3], 0)
        p = _probabilities(s, top[None, :], mask)
        dout_offsets = row_offsets(rows, GROUP, dout_strides[2], dout_strides[1])
        dout_tile = tile_at(dout, dout_offsets, cols, here, size, dtype, True, PADDED)
        dv = _product(p, dout_tile, dv, TERMS, PRECISION)
        dp = dot(v_tile, tl.trans(dout_tile), zeros, PRECISION)
        dk = _product(p * (dp - own_delta[None, :]), q_tile, dk, TERMS, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["queries", "keys"])
def prefix_attention_text_grad_kernel(
    dout, q, k, v, mask, starts, ends, lse, delta, dk, dv,
    heads, queries, keys, size, scale, factor,
    dout_strides, q_strides, k_strides, v_strides, mask_strides,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, T, Hkv, D]; grid (key blocks x heads x B,). Keys of the padding get zeros."""
    blocks = tl.cdiv(keys, BLOCK_N)
    pid = tl.program_id(0)
    key = pid % blocks * BLOCK_N
    at = key + tl.arange(0, BLOCK_N)
    head = (pid // blocks % heads).to(tl.int64)
    b = (pid // blocks // heads).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = q.dtype.element_ty
    first_key, last_key = text_of_row(starts, ends, b, keys)
    here = (at >= first_key) & (at < last_key)
    seen_at = tl.where(here, at, keys)  # no row sees the others
    k += b * k_strides[0] + head * k_strides[1]
    v += b * v_strides[0] + head * v_strides[1]
    k_tile = tile_at(k, at.to(tl.int64) * k_strides[2], cols, here, size, dtype, True, PADDED)
    v_tile = tile_at(v, at.to(tl.int64) * v_strides[2], cols, here, size, dtype, True, PADDED)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    q += b * q_strides[0] + head * GROUP * q_strides[1]
    dout += b * dout_strides[0] + head * GROUP * dout_strides[1]
    saved = (b * heads + head) * GROUP * queries
    lse += saved
    delta += saved

    # The rows from `first` on see the block's first key, those from `whole` on all of its keys.
    count = queries * GROUP
    first = count * 0
    whole = first
    if CAUSAL:
        behind = keys - queries
        first = tl.maximum(key - behind, 0) * GROUP
        whole = tl.maximum(key + BLOCK_N - 1 - behind, 0) * GROUP
    first = tl.where((key < last_key) & (key + BLOCK_N > first_key), first, count)
    partly = (key < first_key) | (key + BLOCK_N > last_key)
    if mask is not None:
        mask += b * mask_strides[0] + head * GROUP * mask_strides[1]
        whole = count
    else:
        whole = first + tl.cdiv(tl.maximum(whole - first, 0), BLOCK_M) * BLOCK_M
        whole = tl.where(partly, count, tl.minimum(whole, count))
    acc_k, acc_v = _key_grads(
        acc_k, acc_v, k_tile, v_tile, seen_at, q, dout, lse, delta, first, whole, queries, keys,
        last_key, q_strides, dout_strides, mask, mask_strides, size, factor,
        CAUSAL, GROUP, True, PADDED, 1, PRECISION, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    if mask is None:
        acc_k, acc_v = _key_grads(
            acc_k, acc_v, k_tile, v_tile, at, q, dout, lse, delta, tl.maximum(first, whole), count,
            queries, keys, last_key, q_strides, dout_strides, None, mask_strides, size, factor,
            CAUSAL, GROUP, False, PADDED, 1, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    offsets = ((b * keys + at) * heads + head) * size
    inside = at < keys
    acc_k = tl.where(here[:, None], acc_k * scale, 0.0)
    store_tile(dk, offsets, cols, inside, size, acc_k)
    store_tile(dv, offsets, cols, inside, size, tl.where(here[:, None], acc_v, 0.0))


@triton.jit(do_not_specialize=["batch", "queries", "length", "batch_chunk", "row_chunk"])
def prefix_attention_prefix_grad_kernel(
    dout, q, prefix_k, prefix_v, prefix_ids, lse, delta, dk, dv,
    batch, heads, prefixes, queries, length, size, batch_chunk, row_chunk, scale, factor,
    dout_strides, q_strides, pk_strides, pv_strides,
    GROUP: tl.constexpr, PADDED: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv [batch chunks, row chunks, P, Hkv, L, D], the parts of the prefixes' gradients.

    A part has the rows of ``batch_chunk`` batch rows and of ``row_chunk`` rows of a tile's kind in
    each; those whose prefix is another are passed over. Grid: (key blocks x heads x P, row chunks,
    batch chunks).
    """
    blocks = tl.cdiv(length, BLOCK_N)
    pid = tl.program_id(0)
    at = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    head = (pid // blocks % heads).to(tl.int64)
    which = pid // blocks // heads
    here = at < length
    cols = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = q.dtype.element_ty
    prefix_k += which.to(tl.int64) * pk_strides[0] + head * pk_strides[1]
    prefix_v += which.to(tl.int64) * pv_strides[0] + head * pv_strides[1]
    k_offsets, v_offsets = at.to(tl.int64) * pk_strides[2], at.to(tl.int64) * pv_strides[2]
    k_tile = tile_at(prefix_k, k_offsets, cols, here, size, dtype, True, PADDED)
    v_tile = tile_at(prefix_v, v_offsets, cols, here, size, dtype, True, PADDED)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    first = tl.program_id(1) * row_chunk
    last = tl.minimum(first + row_chunk, queries * GROUP)
    first_b = tl.program_id(2) * batch_chunk
    for row in range(first_b, tl.minimum(first_b + batch_chunk, batch)):
        own_last = last
        if prefix_ids is not None:
            own_last = tl.where(tl.load(prefix_ids + row) == which, last, 0)
        b = tl.full((), row, tl.int64)
        saved = (b * heads + head) * GROUP * queries
        acc_k, acc_v = _key_grads(
            acc_k, acc_v, k_tile, v_tile, at,
            q + b * q_strides[0] + head * GROUP * q_strides[1],
            dout + b * dout_strides[0] + head * GROUP * dout_strides[1],
            lse + saved, delta + saved, first, own_last, queries, length, length,
            q_strides, dout_strides, None, (0, 0, 0, 0), size, factor,
            False, GROUP, True, PADDED, TERMS, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    part = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    offsets = (((part * prefixes + which) * heads + head) * length + at) * size
    store_tile(dk, offsets, cols, here, size, acc_k * scale)
    store_tile(dv, offsets, cols, here, size, acc_v)
