# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernels of ``prefix_attention``; maths: ``peft_kernels/ops/prefix_attention.py``.

    prefix_attention_fwd_kernel      out and lse, or those of a part of the keys
    prefix_attention_combine_kernel  out and lse from those of the parts

The backward's are in ``bwd_kernels.py``.

The GROUP query heads of a KV head are rows of one tile: row r is query r // GROUP of head r % GROUP
of the group. So keys and values, the prefix's and the text's, are read once for all of them, be it
in a decode step of one query or over a long text. The prefix is read from the bank where it lies,
before the text's keys, and both go into one running softmax, whose exponentials have base 2.

Of the text only the blocks are read that the causal diagonal, the row's length and the part reach.
Those that every query of the tile sees whole skip the comparisons. Sums are float32; probabilities
and their gradients are rounded to q's dtype for the tensor cores.
"""

import triton
import triton.language as tl

from peft_kernels.triton.common.blocks import dot, let_next_begin, rounded, wait_for_first

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Stands for the lowest float32, as masks have it: finite in base-2 units too, beside a score.
LOWEST = tl.constexpr(-2.0e38)


# ---- what forward and backward share -----------------------------------------------------------


@triton.jit
def tile_at(
    base, offsets, cols, here, size, dtype: tl.constexpr, MASKED: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """[rows, cols] in ``dtype``. ``offsets`` (64-bit) of the rows, the columns side by side.

    MASKED: only the rows that are ``here``. PADDED: there are more columns than ``size``.
    """
    ptrs = base + (offsets[:, None] + cols[None, :])
    if MASKED and PADDED:
        tile = tl.load(ptrs, mask=here[:, None] & (cols < size)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(ptrs, mask=here[:, None], other=0.0)
    elif PADDED:
        tile = tl.load(ptrs, mask=(cols < size)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    if tile.dtype != dtype:
        tile = rounded(tile.to(tl.float32), dtype)
    return tile


@triton.jit
def store_tile(base, offsets, cols, here, size, tile):
    mask = here[:, None] & (cols < size)[None, :]
    ptrs = base + (offsets[:, None] + cols[None, :])
    tl.store(ptrs, rounded(tile, base.dtype.element_ty), mask=mask)


@triton.jit
def row_offsets(rows, GROUP: tl.constexpr, query_stride, head_stride):
    """Of the rows of a KV head's tile, from the group's first head on; 64-bit."""
    query = (rows // GROUP).to(tl.int64)
    return query * query_stride + (rows % GROUP).to(tl.int64) * head_stride


@triton.jit
def prefix_of_row(prefix_ids, b, length):
    """(the prefix's index in the bank, its length); the length is 0 for a row without one."""
    which = tl.full((), 0, tl.int64)
    if prefix_ids is not None:
        found = tl.load(prefix_ids + b)
        length = tl.where(found < 0, 0, length)
        which = tl.maximum(found, 0).to(tl.int64)
    return which, length


@triton.jit
def text_of_row(starts, ends, b, keys):
    """(first, last): the row's real text keys, ``last`` excluded."""
    first = tl.full((), 0, tl.int32)
    last = first + keys
    if starts is not None:
        first = tl.maximum(tl.load(starts + b), first)
    if ends is not None:
        last = tl.minimum(tl.load(ends + b), last)
    return first, last


@triton.jit
def visible_scores(
    s, at, limits, mask, mask_rows, here, mask_stride, KEYS_AXIS: tl.constexpr
):  # fmt: skip
    """``s`` with -inf where a row doesn't see a key, and the float mask added; base-2 units.

    ``at``: the tile's keys, along its axis KEYS_AXIS. A row sees those below its ``limits``.
    """
    key = tl.expand_dims(at, 1 - KEYS_AXIS)
    sees = key < tl.expand_dims(limits, KEYS_AXIS)
    if mask is not None:
        offsets = tl.expand_dims(mask_rows, KEYS_AXIS) + key.to(tl.int64) * mask_stride
        inside = sees & tl.expand_dims(here, KEYS_AXIS)
        if mask.dtype.element_ty == tl.uint8:
            sees = inside & (tl.load(mask + offsets, mask=inside, other=0) != 0)
        else:
            added = tl.load(mask + offsets, mask=inside, other=0.0).to(tl.float32)
            floor = tl.where(added == float("-inf"), added, LOWEST)
            s += tl.maximum(added, floor) * LOG2E
    return tl.where(sees, s, float("-inf"))


# ---- forward -----------------------------------------------------------------------------------


@triton.jit
def _attend(
    acc, top, total, q_tile, k, v, first, last, k_stride, v_stride, limits, mask, mask_rows, here,
    mask_stride, size, factor,
    MASKED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running softmax over keys ``first`` to ``last`` of k and v: acc / total is the output.

    Without MASKED every row sees all of them, and they are whole blocks.
    """
    cols = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = q_tile.dtype
    for start in range(first, last, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        k_offsets, v_offsets = at.to(tl.int64) * k_stride, at.to(tl.int64) * v_stride
        k_tile = tile_at(k, k_offsets, cols, at < last, size, dtype, MASKED, PADDED)
        s = tl.zeros((q_tile.shape[0], BLOCK_N), tl.float32)
        s = dot(q_tile, tl.trans(k_tile), s, PRECISION) * factor
        if MASKED:
            s = visible_scores(s, at, limits, mask, mask_rows, here, mask_stride, 1)
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet has -inf on top: a difference of two would be a NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v_tile = tile_at(v, v_offsets, cols, at < last, size, dtype, MASKED, PADDED)
        acc = dot(rounded(p, dtype), v_tile, acc, PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["queries", "keys", "length", "splits", "chunk"])
def prefix_attention_fwd_kernel(
    q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, out, lse,
    heads, queries, keys, length, size, splits, chunk, factor,
    q_strides, k_strides, v_strides, pk_strides, pv_strides, mask_strides,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """out [B, splits, S, Hq, D] and lse [B, splits, Hq, S] of the keys of each split.

    Split i has ``chunk`` text keys from i chunk on, and the first one the prefix too. ``heads`` are
    KV heads, ``factor`` is scale log2(e). Grid: (row blocks x splits x heads x B,), the longest
    rows under the diagonal first.
    """
    let_next_begin(PDL)
    count = queries * GROUP
    blocks = tl.cdiv(count, BLOCK_M)
    pid = tl.program_id(0)
    rows = (blocks - 1 - pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = pid // blocks % splits
    head = (pid // blocks // splits % heads).to(tl.int64)
    b = (pid // blocks // splits // heads).to(tl.int64)
    here = rows < count
    cols = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = q.dtype.element_ty
    q += b * q_strides[0] + head * GROUP * q_strides[1]
    q_offsets = row_offsets(rows, GROUP, q_strides[2], q_strides[1])
    q_tile = tile_at(q, q_offsets, cols, here, size, dtype, True, PADDED)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)

    # 1. the prefix, which every query sees
    which, own_length = prefix_of_row(prefix_ids, b, length)
    own_length = tl.where(split == 0, own_length, 0)
    limits = tl.zeros((BLOCK_M,), tl.int32) + own_length
    acc, top, total = _attend(
        acc, top, total, q_tile,
        prefix_k + which * pk_strides[0] + head * pk_strides[1],
        prefix_v + which * pv_strides[0] + head * pv_strides[1],
        0, own_length, pk_strides[2], pv_strides[2], limits, None, None, None, 0, size, factor,
        True, PADDED, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    # 2. the text: whole blocks that every row sees, then the diagonal's and the end
    first, last = text_of_row(starts, ends, b, keys)
    first = tl.maximum(first, split * chunk)
    last = tl.minimum(last, split * chunk + chunk)
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
        acc, top, total = _attend(
            acc, top, total, q_tile, k, v, first, whole, k_strides[2], v_strides[2],
            None, None, None, None, 0, size, factor,
            False, PADDED, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        first = whole
    else:
        mask += b * mask_strides[0] + head * GROUP * mask_strides[1]
        mask_rows = row_offsets(rows, GROUP, mask_strides[2], mask_strides[1])
    acc, top, total = _attend(
        acc, top, total, q_tile, k, v, first, last, k_strides[2], v_strides[2],
        limits, mask, mask_rows, here, mask_strides[3], size, factor,
        True, PADDED, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    # 3. out and lse; a row that saw nothing has 0 and -inf
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    ordered = (b * splits + split) * queries * heads * GROUP
    out += (ordered + head * GROUP) * size
    out_offsets = row_offsets(rows, GROUP, heads * GROUP * size, size)
    store_tile(out, out_offsets, cols, here, size, acc)
    lse += ordered + head * GROUP * queries + row_offsets(rows, GROUP, 1, queries)
    tl.store(lse, (top + tl.log2(total)) * LN2, mask=here)


@triton.jit(do_not_specialize=["queries", "splits"])
def prefix_attention_combine_kernel(
    parts, lse_parts, out, lse, heads, queries, size, splits,
    SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """out [B, S, Hq, D] and lse [B, Hq, S] from float32 [B, splits, ...]; grid (B S Hq,).

    ``heads`` are query heads, SPLITS >= splits.
    """
    wait_for_first(PDL)
    row = tl.program_id(0).to(tl.int64)
    head, query, b = row % heads, row // heads % queries, row // heads // queries
    which, cols = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    here = which < splits
    part = b * splits + which
    lse_at = (part * heads + head) * queries + query
    weights = tl.load(lse_parts + lse_at, mask=here, other=float("-inf"))
    top = tl.max(weights, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2((weights - shift) * LOG2E)
    total = tl.sum(weights, 0)
    total = tl.where(total == 0.0, 1.0, total)
    offsets = ((part * queries + query) * heads + head) * size
    tile = tile_at(parts, offsets, cols, here, size, tl.float32, True, True)
    acc = tl.sum(tile * weights[:, None], 0) / total
    tl.store(out + row * size + cols, rounded(acc, out.dtype.element_ty), mask=cols < size)
    tl.store(lse + (b * heads + head) * queries + query, top + tl.log2(total) * LN2)
