# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernels of ``prompt_lookup``: soft prompts among text.

    prompt_lookup_fwd_kernel    out and its integers       a program a row, then a tile each
    prompt_lookup_bwd_kernel    d_prompts, d_embeddings    a tile each

The maths is in ``peft_kernels/ops/prompt_lookup.py``. The integers of a row are counted by one
program, ahead of the tiles, which take longer. Whatever the ids and the positions are, nothing is
read or written out of bounds: a row with an id that isn't there has no prompt, and a place without
a source holds zeros.
"""

import triton
import triton.language as tl

from peft_kernels.triton.common.blocks import pointers, rounded

IGNORED = tl.constexpr(-100)  # the label that losses leave out
# They differ from call to call, and no address depends on what divides them.
_ANY_VALUE = [
    "batch", "seq", "length", "steps", "sums", "positions_b", "mask_b", "labels_b",
]  # fmt: skip


# ---- places ------------------------------------------------------------------------------------


@triton.jit
def _at(row, index, stride):
    """Pointers to elements of a row; the offsets are 64-bit."""
    return row + index.to(tl.int64) * stride


@triton.jit
def _slots_before(at, row, stride, length, steps, OF_TEXT: tl.constexpr):
    """How many slots of a row stand before each place, or before each token OF_TEXT.

    Slots that follow each other, as most do, take no search. ``steps`` halve [0, length] to one.
    """
    first = tl.load(row, mask=length > 0, other=0)
    last = tl.load(_at(row, length - 1, stride), mask=length > 0, other=0)
    on_end = (length > 0) & (last - first == length - 1)
    if OF_TEXT:
        low = tl.where(at < first, 0, length)
    else:
        low = tl.minimum(tl.maximum(at - first, 0), length)
    low = tl.where(on_end, low, 0)
    high = tl.zeros_like(low) + length
    for _ in range(tl.where(on_end, 0, steps)):
        middle = (low + high) // 2
        open_ = low < high
        place = tl.load(_at(row, middle, stride), mask=open_, other=0)
        behind = place - middle <= at if OF_TEXT else place < at
        low = tl.where(open_ & behind, middle + 1, low)
        high = tl.where(open_ & ~behind, middle, high)
    return low


@triton.jit
def _sources(places, row, stride, seq, length, steps):
    """(slot, token, which have a slot, which have a token); some may have neither."""
    slot = _slots_before(places, row, stride, length, steps, False)
    found = tl.load(_at(row, slot, stride), mask=slot < length, other=-1)
    is_slot = (slot < length) & (found == places)
    token = places - slot
    is_text = ~is_slot & (token >= 0) & (token < seq)
    return slot, token, is_slot, is_text


@triton.jit
def _task_of(task_ids, b, stride, prompts, HAS_IDS: tl.constexpr):
    """Row b's prompt, -1 without one."""
    if HAS_IDS:
        task = tl.load(task_ids + b * stride)
        return tl.where((task >= 0) & (task < prompts), task, -1).to(tl.int64)
    else:
        return tl.full((), 0, tl.int64)


@triton.jit
def _tile(unit, rows, d, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The unit-th tile of [batch, rows, d]: its b, rows and columns; those of a row on end."""
    tiles = tl.cdiv(d, BLOCK_N)
    block = unit // tiles
    blocks = tl.cdiv(rows, BLOCK_M)
    within = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    return (block // blocks).to(tl.int64), within, unit % tiles * BLOCK_N + tl.arange(0, BLOCK_N)


# ---- forward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_ANY_VALUE)
def prompt_lookup_fwd_kernel(
    embeddings, prompts, task_ids, positions, mask, labels,
    out, out_mask, position_ids, out_labels, batch, seq, length, d, count, steps,
    embeddings_b, embeddings_s, embeddings_d, prompts_p, prompts_l, prompts_d,
    task_ids_b, positions_b, positions_l, mask_b, mask_s, labels_b, labels_s,
    HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LABELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROW: tl.constexpr,
):  # fmt: skip
    """out [batch, length + seq, d], and its mask, positions and labels [batch, length + seq].

    ``count`` prompts. Grid: batch programs for the integers, then batch x tiles.
    """
    pid = tl.program_id(0)
    if pid < batch:
        b = pid.to(tl.int64)
        task = _task_of(task_ids, b, task_ids_b, count, HAS_IDS)
        _fill_row(
            b, task, positions + b * positions_b, mask, labels, out_mask, position_ids, out_labels,
            seq, length, steps, positions_l, mask_b, mask_s, labels_b, labels_s,
            HAS_MASK, HAS_LABELS, BLOCK_ROW,
        )  # fmt: skip
    else:
        b, places, cols = _tile(pid - batch, length + seq, d, BLOCK_M, BLOCK_N)
        task = _task_of(task_ids, b, task_ids_b, count, HAS_IDS)
        _copy_tile(
            task, places, cols, positions + b * positions_b, embeddings + b * embeddings_b,
            prompts + task * prompts_p, out + b * (length + seq) * d, seq, length, d, steps,
            embeddings_s, embeddings_d, prompts_l, prompts_d, positions_l,
        )  # fmt: skip


@triton.jit
def _fill_row(
    b, task, row, mask, labels, out_mask, position_ids, out_labels, seq, length, steps,
    positions_l, mask_b, mask_s, labels_b, labels_s,
    HAS_MASK: tl.constexpr, HAS_LABELS: tl.constexpr, BLOCK_ROW: tl.constexpr,
):  # fmt: skip
    """The integers of row b, whose slots are at ``row``."""
    total = length + seq
    before = 0
    for start in range(0, total, BLOCK_ROW):
        places = start + tl.arange(0, BLOCK_ROW)
        inside = places < total
        _, token, is_slot, is_text = _sources(places, row, positions_l, seq, length, steps)
        is_text = is_text & inside
        real = is_text
        if HAS_MASK:
            real = tl.load(_at(mask + b * mask_b, token, mask_s), mask=is_text, other=0) != 0
        real = (real | (is_slot & inside & (task >= 0))).to(tl.int32)
        upto = before + tl.cumsum(real, 0)
        before += tl.sum(real, 0)
        to = b * total + places
        tl.store(out_mask + to, real.to(tl.int64), mask=inside)
        tl.store(position_ids + to, tl.maximum(upto - 1, 0).to(tl.int64), mask=inside)
        if HAS_LABELS:
            label = tl.load(_at(labels + b * labels_b, token, labels_s), is_text, IGNORED)
            tl.store(out_labels + to, label, mask=inside)


@triton.jit
def _copy_tile(
    task, places, cols, row, text, soft, out, seq, length, d, steps,
    text_s, text_d, soft_l, soft_d, positions_l,
):  # fmt: skip
    """A tile of one row's [length + seq, d], from the row's text and its prompt."""
    slot, token, is_slot, is_text = _sources(places, row, positions_l, seq, length, steps)
    inside = (places < length + seq)[:, None] & (cols < d)[None, :]
    tile = tl.load(
        pointers(text, token, cols, text_s, text_d), mask=inside & is_text[:, None], other=0.0
    )
    own = (is_slot & (task >= 0))[:, None]
    prompt = tl.load(pointers(soft, slot, cols, soft_l, soft_d), mask=inside & own, other=0.0)
    if prompt.dtype != tile.dtype:
        prompt = rounded(prompt, tile.dtype)
    tile = tl.where(is_slot[:, None], prompt, tile)
    tl.store(pointers(out, places, cols, d, 1), tile, mask=inside)


# ---- backward ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_ANY_VALUE)
def prompt_lookup_bwd_kernel(
    d_out, task_ids, positions, d_embeddings, d_prompts, batch, seq, length, d, steps, sums,
    d_out_b, d_out_t, d_out_d, task_ids_b, positions_b, positions_l,
    HAS_IDS: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """d_prompts [P, length, d] in float32, by the first ``sums`` programs, and d_embeddings.

    Grid: ``sums`` + the tiles of d_embeddings [batch, seq, d].
    """
    pid = tl.program_id(0)
    if pid < sums:
        task, slots, cols = _tile(pid, length, d, BLOCK_SLOTS, BLOCK_N)
        acc = _sum_rows(
            d_out, task_ids, positions, task, slots, cols, batch, length + seq, length, d,
            d_out_b, d_out_t, d_out_d, task_ids_b, positions_b, positions_l, HAS_IDS, AT_ONCE,
        )  # fmt: skip
        tl.store(
            pointers(d_prompts + task * length * d, slots, cols, d, 1), acc,
            mask=(slots < length)[:, None] & (cols < d)[None, :],
        )  # fmt: skip
    else:
        b, tokens, cols = _tile(pid - sums, seq, d, BLOCK_M, BLOCK_N)
        row = positions + b * positions_b
        places = tokens + _slots_before(tokens, row, positions_l, length, steps, True)
        mask = (tokens < seq)[:, None] & (cols < d)[None, :]
        rows = pointers(d_out + b * d_out_b, places, cols, d_out_t, d_out_d)
        tile = tl.load(rows, mask=mask)
        tl.store(pointers(d_embeddings + b * seq * d, tokens, cols, d, 1), tile, mask=mask)


@triton.jit
def _sum_rows(
    d_out, task_ids, positions, task, slots, cols, batch, total, length, d,
    d_out_b, d_out_t, d_out_d, task_ids_b, positions_b, positions_l,
    HAS_IDS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """[slots, cols]: the sum of the rows with this prompt, in the batch's order.

    The loads of AT_ONCE rows don't wait for each other.
    """
    acc = tl.zeros((slots.shape[0], cols.shape[0]), tl.float32)
    for start in range(0, batch, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            b = tl.full((), i, tl.int64) + start
            own = b < batch
            if HAS_IDS:
                own = own & (tl.load(task_ids + b * task_ids_b, mask=own, other=-1) == task)
            else:
                own = own & (task == 0)
            places = tl.load(
                _at(positions + b * positions_b, slots, positions_l),
                mask=own & (slots < length), other=-1,
            )  # fmt: skip
            inside = ((places >= 0) & (places < total))[:, None] & (cols < d)[None, :]
            rows = pointers(d_out + b * d_out_b, places, cols, d_out_t, d_out_d)
            acc += tl.load(rows, mask=inside, other=0.0).to(tl.float32)
    return acc
