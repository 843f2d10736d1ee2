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
from peft_kernels.ops.multi_lora_linear import PAGE


class Pages(NamedTuple):
    """One matrix of a slice, A or B transposed, of every slot."""

    stacked: Tensor  # what vLLM holds: a view of rows
    rows: Tensor  # [slots * padded, columns], padded up to whole pages
    table: Tensor  # [slots, pages] int32
    ranks: Tensor  # [slots] int32: how many of a slot's rows are read
    rank: int  # the largest

    @property
    def slots(self) -> int:
        return len(self.table)

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def used(self, slot: int) -> int:
        """How many rows a slot's adapter has: to the last that isn't zero."""
        own = self.rows.view(self.slots, -1, self.width)[slot]
        found = own.any(1).nonzero()
        return int(found[-1]) + 1 if len(found) else 0


def pages_of_a(stacked: Tensor) -> Pages:
    """Of A ``[slots, 1, r, k]``, where it lies if its ranks are whole pages."""
    slots, _, rank, k = stacked.shape
    if stacked.is_contiguous() and rank % PAGE == 0:
        return Pages(stacked, stacked.view(-1, k), _table(slots, rank), _no_ranks(slots), rank)
    return _allocated(stacked)


def pages_of_b(stacked: Tensor) -> Pages:
    """Of B ``[slots, 1, n, r]``, in new storage."""
    pages = _allocated(stacked.transpose(2, 3))
    return pages._replace(stacked=pages.stacked.transpose(2, 3))


def _allocated(values: Tensor) -> Pages:
    slots, _, rank, columns = values.shape
    padded = -(-rank // PAGE) * PAGE
    rows = values.new_zeros(slots * padded, columns)
    stacked = rows.view(slots, 1, padded, columns)[:, :, :rank]
    stacked.copy_(values)
    return Pages(stacked, rows, _table(slots, rank), _no_ranks(slots), rank)


def _table(slots: int, rank: int) -> Tensor:
    pages = -(-rank // PAGE)
    return torch.arange(slots * pages, dtype=torch.int32).view(slots, pages)


def _no_ranks(slots: int) -> Tensor:
    return torch.zeros(slots, dtype=torch.int32)


# ---- products --------------------------------------------------------------------------------


def add_(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Pages], ids: Tensor, *,
    scale: float = 1.0, column: int = 0,
) -> None:  # fmt: skip
    """Adds each row's low-rank update, slice after slice of y's columns from ``column`` on.

    Semantics: ``y[i, columns of s] += scale * B_sg A_sg x[i]`` for every slice s, with
    ``g = ids[i]``. Sums are in float32, rounded once; nothing else of y is written.

    Args:
        y: ``[m, n]`` in any strides, where n may be more than the slices have.
        x: ``[m, k]``; its dtype, y's, A's and B's are each float32, float16 or bfloat16.
        a: the rows of A, by the tables and ranks of ``b``.
        b: of each slice.
        ids: ``[m]`` int32, -1 for none.

    Raises:
        ValueError: the slices are wider than y.
    """
    widths = [pages.width for pages in b]
    rest = y.shape[1] - column - sum(widths)
    if rest < 0:
        raise ValueError(
            f"y must have room for slices of {widths} columns from column {column} on; "
            f"it has {y.shape[1]}"
        )
    before, after = _nothing(x, b[0].slots, column), _nothing(x, b[0].slots, rest)
    banks = [
        *before,
        *((rows, p.rows, p.table, p.ranks) for rows, p in zip(a, b, strict=True)),
        *after,
    ]
    scales = torch.full((b[0].slots,), scale)
    _run(y, x, banks, scales, ids)


def shrunk(x: Tensor, a: Pages, ids: Tensor) -> Tensor:
    """``S[i] = A_g x[i]``, ``[m, r]`` in float32; zero where a row has no adapter."""
    no_columns = a.rows.new_empty(len(a.rows), 0)
    bank = a.rows, no_columns, a.table, a.ranks
    s = _run(x.new_empty(len(x), 0), x, [bank], torch.ones(a.slots), ids)
    return s[:, : a.rank]


def units(pages: Pages) -> Tensor:
    """The A of rows that are multiplied by B alone: each rank row takes its own input."""
    padded = len(pages.rows) // pages.slots
    return torch.eye(padded, pages.rank).repeat(pages.slots, 1)


def _nothing(x: Tensor, slots: int, columns: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A bank of rank 0 for columns that no slice has."""
    if not columns:
        return []
    no_pages = torch.empty(slots, 0, dtype=torch.int32)
    rows = x.new_empty(0, x.shape[1]), x.new_empty(0, columns)
    return [(*rows, no_pages, _no_ranks(slots))]


def _run(y: Tensor, x: Tensor, banks, scales: Tensor, ids: Tensor) -> Tensor:
    """The op, with its S. Its kernels take each matrix in a dtype of its own."""
    a, b, tables, ranks = (list(column) for column in zip(*banks, strict=True))
    op = _library.get_op("multi_lora_linear_add", _library.variant(x.dtype))
    whole = y.contiguous()
    s = op(whole, x, a, b, tables, ranks, [scales] * len(a), ids, None, None, [], [], "auto")
    if whole is not y:
        y.copy_(whole)
    return s
