"""The adapters of one vLLM layer: tensors in vLLM's shapes, over storage that the kernels read.

vLLM keeps A as ``[slots, 1, r, k]`` and B as ``[slots, 1, n, r]`` for each slice of a layer, with r
the largest rank allowed, and copies an adapter into a slot when it loads it. Rank rows on end are
what a bank of pages is, so A is one as it lies, and B is given as a view of ``[slots, r, n]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._multi_lora_prepared import PreparedBanks
from peft_kernels.ops.multi_lora_linear import PAGE


class Pages(NamedTuple):
    """One matrix of a slice, A or B transposed, of every slot."""

    stacked: Tensor  # what vLLM holds: a view of rows
    rows: Tensor  # [slots * padded, columns], padded up to whole pages
    table: Tensor  # [slots, pages] int32
    ranks: Tensor  # [slots] int32: how many of a slot's rows are read
    scales: Tensor  # [slots] float32: one
    known: list[int]  # the ranks, on the host
    units: list[Tensor]  # what is in A's place where B is multiplied alone, if it ever is
    rank: int  # the largest

    @property
    def slots(self) -> int:
        return len(self.table)

    @property
    def padded(self) -> int:
        return len(self.rows) // self.slots

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def assign(self, slot: int, rank: int) -> None:
        """Has a slot's rows read up to ``rank``, or to the largest.

        Everything that is read of the slot is written: vLLM's deepest sleep forgets what was.
        """
        first, count = slot * self.table.shape[1], self.table.shape[1]
        torch.arange(first, first + count, out=self.table[slot])
        self.known[slot] = min(rank, self.rank)
        self.ranks[slot] = self.known[slot]
        self.scales[slot] = 1
        for units in self.units:
            own = units.view(self.slots, -1, self.rank)[slot]
            torch.eye(*own.shape, out=own)


def pages_of_a(stacked: Tensor) -> Pages:
    """Of A ``[slots, 1, r, k]``, where it lies if its ranks are whole pages."""
    slots, _, rank, k = stacked.shape
    if stacked.is_contiguous() and rank % PAGE == 0:
        return _pages(stacked, stacked.view(-1, k), slots, rank)
    return _allocated(stacked)


def pages_of_b(stacked: Tensor) -> Pages:
    """Of B ``[slots, 1, n, r]``, which is given as a view of its transpose.

    That takes B's own storage if its ranks are whole pages: ``stacked`` isn't B from then on.
    """
    slots, _, n, rank = stacked.shape
    if stacked.is_contiguous() and rank % PAGE == 0:
        transposed = stacked.view(slots, 1, rank, n)
        _write(transposed, stacked.transpose(2, 3))
        pages = _pages(transposed, transposed.view(-1, n), slots, rank)
    else:
        pages = _allocated(stacked.transpose(2, 3))
    return pages._replace(stacked=pages.stacked.transpose(2, 3))


def _allocated(values: Tensor) -> Pages:
    slots, _, rank, columns = values.shape
    padded = -(-rank // PAGE) * PAGE
    rows = values.new_zeros(slots * padded, columns)
    stacked = rows.view(slots, 1, padded, columns)[:, :, :rank]
    _write(stacked, values)
    return _pages(stacked, rows, slots, rank)


def _write(to: Tensor, values: Tensor) -> None:
    """Not where all are zero, as in new slots: memory that nothing wrote takes none."""
    if values.any():
        to.copy_(values.clone(memory_format=torch.contiguous_format))


def _pages(stacked: Tensor, rows: Tensor, slots: int, rank: int) -> Pages:
    count, device = -(-rank // PAGE), rows.device
    table = torch.arange(slots * count, dtype=torch.int32, device=device).view(slots, count)
    ranks = torch.zeros(slots, dtype=torch.int32, device=device)
    scales = torch.ones(slots, dtype=torch.float32, device=device)
    return Pages(stacked, rows, table, ranks, scales, [0] * slots, [], rank)


# ---- products --------------------------------------------------------------------------------


class Slices(NamedTuple):
    """A and B of a layer's slices, one after the other, as the op takes them."""

    a: list[Tensor]
    b: list[Tensor]
    tables: list[Tensor]
    ranks: list[Tensor]
    scales: list[Tensor]
    widths: list[int]


def slices_of(a: Sequence[Tensor], b: Sequence[Pages]) -> Slices:
    """Of rows of A, each by the table and the ranks of its B."""
    return Slices(
        list(a),
        [pages.rows for pages in b],
        [pages.table for pages in b],
        [pages.ranks for pages in b],
        [pages.scales for pages in b],
        [pages.width for pages in b],
    )


def prepared(slices: Slices) -> PreparedBanks:
    """The same for a CPU's kernels."""
    return PreparedBanks(*slices[:5])


def add_(
    y: Tensor, x: Tensor, slices: PreparedBanks, ids: Tensor, *, scale: float = 1.0, column: int = 0
) -> None:
    """Adds each row's low-rank update, slice after slice of y's columns from ``column`` on.

    Semantics: ``y[i, columns of s] += scale * B_sg A_sg x[i]`` for every slice s, with
    ``g = ids[i]``. Sums are in float32, rounded once; nothing else of y is written.

    Args:
        y: ``[m, n]`` of contiguous rows, where n may be more than the slices have.
        x: ``[m, k]``; its dtype, y's, A's and B's are each float32, float16 or bfloat16.
        ids: ``[m]`` int32, -1 for none.

    Raises:
        ValueError: the slices are wider than y.
    """
    if y.shape[1] != slices.width:
        end = column + slices.width
        if end > y.shape[1]:
            raise ValueError(
                f"y must have room for slices of {slices.widths} columns from column {column} on; "
                f"it has {y.shape[1]}"
            )
        y = y[:, column:end]
    slices.add_to(y, x, ids, scale)


def shrunk(x: Tensor, a: Pages, ids: Tensor) -> Tensor:
    """``S[i] = A_g x[i]``, ``[m, r]`` in float32; zero where a row has no adapter."""
    no_y, no_b = x.new_empty(len(x), 0), a.rows.new_empty(len(a.rows), 0)
    op = _library.get_op("multi_lora_linear_add", _library.variant(x.dtype))
    banks = [a.rows], [no_b], [a.table], [a.ranks], [a.scales]
    s = op(no_y, x, *banks, ids, None, None, [], [], "auto")
    return s[:, : a.rank]


def units(pages: Pages) -> Tensor:
    """The A of rows that are multiplied by B alone: each rank row takes its own input."""
    own = torch.eye(pages.padded, pages.rank, dtype=torch.float32, device=pages.rows.device)
    return own.repeat(pages.slots, 1)
