# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined, assignment"
"""What the kernels of ``multi_lora_linear`` are made of: banks of adapters, rows, runs.

A bank serves a slice of the columns. The tensors and sizes of several banks come as tuples, one
item a bank; no block of columns, nor of ranks, lies in two banks.

Rows are worked on in tiles of places. Place v holds row v, or, GROUPED, the v-th row when rows are
sorted by adapter. A run is neighbouring places of a tile that have one adapter.
"""

import triton
import triton.language as tl

PAGE = tl.constexpr(8)  # rank rows

# ---- banks -------------------------------------------------------------------------------------


@triton.jit
def blocks_of(widths, BLOCK: tl.constexpr):
    """How many blocks of columns all banks have together."""
    count = tl.cdiv(widths[0], BLOCK)
    for i in tl.static_range(1, len(widths)):
        count += tl.cdiv(widths[i], BLOCK)
    return count


@triton.jit
def locate(block, widths, BLOCK: tl.constexpr):
    """(bank, block within the bank, the bank's first column) of the block-th block of all banks."""
    bank = 0
    first_block = 0
    first_col = 0
    blocks = 0
    cols = 0
    for i in tl.static_range(1, len(widths)):
        blocks += tl.cdiv(widths[i - 1], BLOCK)
        cols += widths[i - 1]
        bank = tl.where(block >= blocks, i, bank)
        first_block = tl.where(block >= blocks, blocks, first_block)
        first_col = tl.where(block >= blocks, cols, first_col)
    return bank, block - first_block, first_col


@triton.jit
def pick(items, bank):
    """items[bank], where bank isn't known when the kernel is compiled."""
    item = items[0]
    for i in tl.static_range(1, len(items)):
        item = tl.where(bank == i, items[i], item)
    return item


@triton.jit
def page_rows(table, slot, ranks, rank, max_pages):
    """The rows of a bank that hold the given rank rows of an adapter; 0 beyond its rank."""
    entries = table + slot.to(tl.int64) * max_pages + ranks // PAGE
    pages = tl.load(entries, mask=ranks < rank, other=0)
    return pages.to(tl.int64) * PAGE + ranks % PAGE


@triton.jit
def in_pages(ranks, rank):
    """Whether a column of S lies in a page of the adapter: S is zero in the rest of the last one.

    A mask that is the same over a page lets S be loaded several columns at a time.
    """
    return ranks // PAGE * PAGE < rank


# ---- rows --------------------------------------------------------------------------------------


@triton.jit
def tile_rows(
    ids, order, first, m, per_id, slots, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The rows in BLOCK_M places, whether they exist, and their adapters; -1 is none."""
    places = first + tl.arange(0, BLOCK_M)
    inside = places < m
    entries = places // per_id
    rows = places
    if GROUPED:
        entries = tl.load(order + entries, mask=inside, other=0)
        rows = entries * per_id + places % per_id
    slot = tl.load(ids + entries, mask=inside, other=-1)
    return rows, inside, tl.where((slot >= 0) & (slot < slots), slot, -1)


@triton.jit
def run(slot, start, BLOCK_M: tl.constexpr):
    """The adapter at ``start`` in a tile and the end of its run."""
    where = tl.arange(0, BLOCK_M)
    mine = tl.max(tl.where(where == start, slot, -1), axis=0)
    end = tl.min(tl.where((where > start) & (slot != mine), where, BLOCK_M), axis=0)
    return mine, end


@triton.jit
def dropout_numbers(p):
    """The threshold of `kept_mask` and 1 / (1 - p) from a float64 p on the device."""
    probability = tl.load(p)
    # Numbers near 2^52 are integers: the sum is rounded to one, ties to even, as Python's round.
    words = (probability * 4294967296.0 + 4503599627370496.0) - 4503599627370496.0
    threshold = min(words, 4294967295.0).to(tl.int64).to(tl.uint32)
    return threshold, 1.0 / (1.0 - probability).to(tl.float32)
