"""The reference of ``multi_lora_linear`` in PyTorch, adapter by adapter, and its shapes.

The maths is at the head of ``multi_lora_linear.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._dropout import dropout_factor
from peft_kernels.ops._dtypes import acc_dtype
from peft_kernels.ops._lora_banks import PAGE


class _Group(NamedTuple):
    """The rows of one adapter, and its matrices in the dtype of sums."""

    slot: int
    rows: Tensor
    a: Tensor  # [r, k]
    b: Tensor  # [r, n]
    scale: Tensor
    columns: slice  # of y
    s_columns: slice  # of S
    dropout: tuple[Tensor, float] | None

    def dropped(self, x: Tensor) -> Tensor:
        return x[self.rows].to(self.a.dtype) * self.factor()

    def factor(self) -> Tensor | float:
        if self.dropout is None:
            return 1.0
        m, k, dtype = len(self.rows), self.a.shape[1], self.a.dtype
        return dropout_factor(*self.dropout, m, k, dtype).to(self.a.device)


def _rank_columns(tables: Sequence[Tensor]) -> int:
    """The width of S: the largest rank that each bank's table has room for."""
    return sum(PAGE * table.shape[1] for table in tables)


def _groups(x, a, b, tables, ranks, scales, ids, dropout_p, seeds) -> Iterator[tuple[int, _Group]]:
    """Every adapter that has rows and a rank, with the index of its bank."""
    m, acc, column, s_column = x.shape[0], acc_dtype(x), 0, 0
    row_ids = ids.flatten().repeat_interleave(m // max(ids.numel(), 1))
    present = row_ids.unique().tolist()
    for i, (table, rank_of) in enumerate(zip(tables, ranks, strict=True)):
        n = b[i].shape[1]
        for slot in present:
            rank = rank_of[slot].item() if 0 <= slot < len(rank_of) else 0
            if rank:
                q = torch.arange(rank, device=x.device)
                pages = table[slot, q // PAGE].long() * PAGE + q % PAGE
                yield (
                    i,
                    _Group(
                        slot=slot,
                        rows=(row_ids == slot).nonzero().flatten(),
                        a=a[i][pages].to(acc),
                        b=b[i][pages].to(acc),
                        scale=scales[i][slot].to(acc),
                        columns=slice(column, column + n),
                        s_columns=slice(s_column, s_column + rank),
                        dropout=(seeds[i][slot], dropout_p[i][slot].item()) if dropout_p else None,
                    ),
                )
        column, s_column = column + n, s_column + PAGE * table.shape[1]


def multi_lora_add_ref(
    y, x, a, b, tables, ranks, scales, ids, order, starts, dropout_p, seeds, plan
):
    s = x.new_zeros(x.shape[0], _rank_columns(tables), dtype=acc_dtype(x))
    for _, g in _groups(x, a, b, tables, ranks, scales, ids, dropout_p, seeds):
        s[g.rows, g.s_columns] = g.dropped(x) @ g.a.T
        total = y[g.rows, g.columns] + g.scale * (s[g.rows, g.s_columns] @ g.b)
        y[g.rows, g.columns] = total.to(y.dtype)
    return s


def multi_lora_linear_fwd_ref(x, weight, bias, *rest):
    y = F.linear(x, weight, bias)
    return y, multi_lora_add_ref(y, x, *rest)


def multi_lora_linear_bwd_ref(
    dy, x, weight, a, b, tables, ranks, scales, ids, order, starts, s, dropout_p, seeds,
    grad_rows, grad_sizes, needs_x, plan,
):  # fmt: skip
    acc = acc_dtype(x)
    dx = x.new_empty(0)
    if needs_x:
        dx = torch.zeros_like(x, dtype=acc) if weight is None else (dy @ weight).to(acc)
    da, db = _empty_gradients(a, b, grad_sizes)
    for i, g in _groups(x, a, b, tables, ranks, scales, ids, dropout_p, seeds):
        g_dy = dy[g.rows, g.columns].to(acc)
        ds = g.scale * (g_dy @ g.b.T)
        if needs_x:
            dx[g.rows] += (ds @ g.a) * g.factor()
        first = grad_rows[i][g.slot].item() if grad_rows else -1
        if first >= 0:
            own = slice(first, first + len(g.a))
            da[i][own] = (ds.T @ g.dropped(x)).to(da[i].dtype)
            db[i][own] = (g.scale * (s[g.rows, g.s_columns].T @ g_dy)).to(db[i].dtype)
    return dx.to(x.dtype), da, db


@_library.outside_autocast
def composition(x, weight, bias, trained, banks, dropout, rows, receivers, ids) -> Tensor:
    """y, or without a weight what is added to it; trained adapters are read where they receive.

    By way of the dtype of sums, so that each gradient is rounded once.
    """
    dtype, acc = x.dtype, acc_dtype(x)
    x = x.to(acc)
    sizes = sizes_of(trained, receivers)
    a, b, tables, ranks, scales = banks
    parts = [x.new_zeros(x.shape[0], matrix.shape[1], dtype=acc) for matrix in b]
    for i, g in _groups(x, a, b, tables, ranks, scales, ids, *dropout):
        own_a, own_b = _received(i, g, rows, sizes, receivers) or (g.a, g.b)
        delta = g.scale * ((g.dropped(x) @ own_a.to(acc).T) @ own_b.to(acc))
        parts[i] = parts[i].index_add(0, g.rows, delta)
    delta = torch.cat(parts, 1)
    if weight is None:
        return delta
    base = F.linear(x, weight.to(acc), None if bias is None else bias.to(acc))
    return (base + delta).to(dtype)


def _received(bank: int, group: _Group, rows, sizes, receivers) -> tuple[Tensor, Tensor] | None:
    """The tensors that receive the gradients of a group's adapter, if it is trained."""
    first = int(rows[bank][group.slot]) if rows else -1
    if first < 0:
        return None
    starts = [0, *accumulate(sizes[bank])]
    index = 2 * sum(len(size) for size in sizes[:bank]) + starts.index(first)
    return receivers[index], receivers[index + len(sizes[bank])]


def sizes_of(trained: Sequence[int], receivers: Sequence[Tensor]) -> list[list[int]]:
    """The rank of every trained adapter, bank by bank; receivers are A, ..., B, ... of each."""
    sizes, first = [], 0
    for count in trained:
        sizes.append([tensor.shape[0] for tensor in receivers[first : first + count]])
        first += 2 * count
    return sizes


# ---- shapes ----------------------------------------------------------------------------------


def _empty_gradients(a, b, grad_sizes) -> tuple[list[Tensor], list[Tensor]]:
    """dA and dB of each bank's trained adapters, zero for those without rows."""
    da = [a[i].new_zeros(size, a[i].shape[1]) for i, size in enumerate(grad_sizes)]
    db = [b[i].new_zeros(size, b[i].shape[1]) for i, size in enumerate(grad_sizes)]
    return da, db


def add_fake(y, x, a, b, tables, *rest):
    return x.new_empty(x.shape[0], _rank_columns(tables), dtype=acc_dtype(x))


def fwd_fake(x, weight, bias, *rest):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, add_fake(y, x, *rest)


def bwd_fake(dy, x, weight, a, b, *rest):
    grad_sizes, needs_x = rest[-3], rest[-2]
    return x.new_empty(x.shape if needs_x else (0,)), *_empty_gradients(a, b, grad_sizes)
