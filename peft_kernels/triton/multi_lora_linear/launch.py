"""Launchers of the Triton kernels of ``multi_lora_linear``: which kernel, on which grid.

The maths, the schemas and the layout of a bank are in ``peft_kernels/ops/multi_lora_linear.py``,
the kernels in ``kernels.py``, the plans and tiles in ``plans.py`` and ``common/chips.py``.
No launch depends on what ids, ranks or tables hold: nothing waits for the device, and a CUDA graph
of a call serves any adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import _cuda_kernels
from peft_kernels.ops.multi_lora_linear import PAGE, sort_by_adapter
from peft_kernels.triton.common import chips
from peft_kernels.triton.common.launch import GROUP_M, chunks, launch, options, sum_partials
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.multi_lora_linear import kernels, plans
from peft_kernels.triton.multi_lora_linear import tile_kernels as tiles

MAX_BANKS = 4  # of one launch; a kernel is compiled for each number of banks
# An adapter's gradient is summed in parts of this many rows: fewer leave most of a GPU idle when
# one adapter has all rows. The parts together are at most GRAD_MAX_PARTS times the gradient.
GRAD_ROWS, GRAD_MAX_PARTS = 1024, 16
SUM_BLOCK = 128


# ---- forward -----------------------------------------------------------------------------------


def multi_lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    tables: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scales: Sequence[Tensor],
    ids: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    dropout_p: Sequence[Tensor],
    seeds: Sequence[Tensor],
    plan: str,
) -> tuple[Tensor, Tensor]:
    """y ``[m, n]`` in x's dtype and S ``[m, R]`` in float32."""
    banks = (a, b, tables, ranks, scales)
    call = _Call(x, *banks, ids, order, starts, dropout_p, seeds, plan)
    with torch.cuda.device_of(x):
        if call.is_one_launch(weight):
            native = torch.ops.peft_kernels.multi_lora_linear_decode.default
            return native(x, weight, bias, *map(list, banks), call.ids)
        if not call.fuses_base(*weight.shape):
            y = F.linear(x, weight, bias)
            return y, _add(call, y, x, banks)
        s = call.low_rank_input(x, "a")
        y = x.new_empty(call.m, weight.shape[0])
        call.output(y, s, base=(x, weight.T), bias=bias)
    return y, s


def multi_lora_linear_add(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    tables: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scales: Sequence[Tensor],
    ids: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    dropout_p: Sequence[Tensor],
    seeds: Sequence[Tensor],
    plan: str,
) -> Tensor:
    """S ``[m, R]`` in float32; the delta is added into y ``[m, n]``, which is contiguous."""
    banks = (a, b, tables, ranks, scales)
    call = _Call(x, *banks, ids, order, starts, dropout_p, seeds, plan)
    with torch.cuda.device_of(x):
        return _add(call, y, x, banks)


def _add(call: _Call, y: Tensor, x: Tensor, banks: Sequence[Sequence[Tensor]]) -> Tensor:
    """y += delta, and S."""
    if call.plan == "decode" and call.has_native_decode(x.device):
        native = torch.ops.peft_kernels.multi_lora_linear_decode_add.default
        return native(y, x, *map(list, banks), call.ids)
    s = call.low_rank_input(x, "a")
    call.output(y, s, adds=True)
    return s


# ---- backward ----------------------------------------------------------------------------------


def multi_lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    tables: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scales: Sequence[Tensor],
    ids: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    s: Tensor,
    dropout_p: Sequence[Tensor],
    seeds: Sequence[Tensor],
    grad_rows: Sequence[Tensor],
    grad_sizes: Sequence[int],
    needs_x: bool,
    plan: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx ``[m, k]``, of size 0 where not needed, and the trained adapters' dA and dB by bank."""
    banks = (a, b, tables, ranks, scales)
    call = _Call(x, *banks, ids, order, starts, dropout_p, seeds, plan, backward=True)
    dx = x.new_empty(0)
    da = [a[i].new_zeros(size, call.k) for i, size in enumerate(grad_sizes)]
    db = [b[i].new_zeros(size, b[i].shape[1]) for i, size in enumerate(grad_sizes)]
    if not needs_x and not any(grad_sizes):
        return dx, da, db
    with torch.cuda.device_of(x):
        ds = call.low_rank_input(dy, "b")
        if needs_x:
            if weight is None:
                dx = call.input_gradient(x.new_empty(x.shape), ds)
            elif call.fuses_base(call.k, weight.shape[0]):
                dx = call.input_gradient(x.new_empty(x.shape), ds, base=(dy, weight))
            else:
                dx = call.input_gradient(torch.mm(dy, weight), ds, adds=True)
        column = 0
        for i, bank in enumerate(call.banks[: len(grad_sizes)]):
            if grad_sizes[i]:
                own_dy = dy[:, column : column + bank.n]
                rows = grad_rows[i].contiguous()
                listed = call.listed(bank, rows, grad_sizes[i])
                call.gradient(da[i], bank, ds, x, rows, listed, dropped=True)
                call.gradient(db[i], bank, s, own_dy, rows, listed, dropped=False)
            column += bank.n
    return dx, da, db


# ---- what the launches of one call share -------------------------------------------------------


class _Bank:
    """One bank's tensors, and where its slices of y and of S begin."""

    def __init__(
        self,
        fields: Sequence[Tensor],
        dropout: Sequence[Tensor],
        column: int,
        s_column: int,
    ) -> None:
        self.a, self.b, self.table = fields[:3]
        self.ranks, self.scales = (field.contiguous() for field in fields[3:])
        # Without dropout the kernel takes any pointer there, and doesn't read it.
        self.p, self.seeds = (d.contiguous() for d in dropout or (self.scales, self.scales))
        self.n = self.b.shape[1]
        self.column = column
        self.s_column, self.s_width = s_column, PAGE * self.table.shape[1]


class _Call:
    """The banks, rows and tiles of one call of the op."""

    def __init__(
        self,
        x: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        tables: Sequence[Tensor],
        ranks: Sequence[Tensor],
        scales: Sequence[Tensor],
        ids: Tensor,
        order: Tensor | None,
        starts: Tensor | None,
        dropout_p: Sequence[Tensor],
        seeds: Sequence[Tensor],
        plan: str,
        backward: bool = False,
    ) -> None:
        self.m, self.k = x.shape
        self.dtype, self.dropout = x.dtype, bool(seeds)
        self.banks: list[_Bank] = []
        column = s_column = 0
        for i, fields in enumerate(zip(a, b, tables, ranks, scales, strict=True)):
            drop = (dropout_p[i], seeds[i]) if seeds else ()
            self.banks.append(_Bank(fields, drop, column, s_column))
            column, s_column = column + self.banks[-1].n, s_column + self.banks[-1].s_width
        self.s_columns = s_column
        self.slots = ranks[0].shape[0]
        self.ids = ids.contiguous().view(-1)
        self.per_id = self.m // max(self.ids.numel(), 1)
        self.plan = plans.choose(plan, self.m, self.per_id, dropout=self.dropout, backward=backward)
        self._routes = (order, starts)
        self.arch_name = chips.arch_name(x.device)
        self.precision = chips.float32_precision(x.device)
        self.block_r = chips.rank_block(max(bank.s_width for bank in self.banks))

    @functools.cached_property
    def sorted(self) -> tuple[Tensor, Tensor]:
        """The ids' entries by adapter, and where each adapter's begin."""
        order, starts = self._routes
        if order is None or starts is None:
            return sort_by_adapter(self.ids, self.slots)
        return order.contiguous(), starts.contiguous()

    def routing(self) -> tuple[Tensor, Tensor, Tensor]:
        """The kernels' ids, order and starts; the plans that take rows as they come read ids."""
        if self.plan == "grouped":
            return (self.ids, *self.sorted)
        return self.ids, self.ids, self.ids

    def fuses_base(self, n: int, depth: int) -> bool:
        if self.plan == "decode" and self.m > plans.DECODE_MAX_ROWS:
            return False
        return plans.fuses_base(self.arch_name, self.dtype, self.m, n, depth)

    def has_native_decode(self, device: torch.device) -> bool:
        has_room = len(self.banks) <= MAX_BANKS
        return device.type == "cuda" and has_room and _cuda_kernels.why_not(device) is None

    def is_one_launch(self, weight: Tensor) -> bool:
        """Whether base and delta are the native kernel's, which would copy another layout of W.

        It multiplies without tensor cores, which the base of more rows should have.
        """
        few = self.plan == "decode" and self.m <= plans.NATIVE_MAX_ROWS
        rows_lie_whole = weight.stride(1) == 1 or weight.shape[1] <= 1
        return few and rows_lie_whole and self.has_native_decode(weight.device)

    def tile(self, kernel: str) -> chips.Tile:
        return plans.tile(self.arch_name, kernel, self.dtype, self.m)

    def groups(self) -> Iterator[list[_Bank]]:
        """Neighbouring banks that one launch can serve: of one dtype."""
        group: list[_Bank] = []
        for bank in self.banks:
            if group and (len(group) == MAX_BANKS or bank.a.dtype is not group[0].a.dtype):
                yield group
                group = []
            group.append(bank)
        yield group

    # -- launches

    def low_rank_input(self, x: Tensor, matrix: str) -> Tensor:
        """S = A_g dropout_g(x), or dS = scale_g B_g^T dy: ``[m, R]``."""
        if self.plan == "decode":
            return self._decode_shrink(x)
        backward = matrix == "b"
        tile = self.tile("shrink")
        row_blocks = cdiv(self.m, tile.m)
        rank_blocks = sum(cdiv(bank.s_width, self.block_r) for bank in self.banks)
        depth = max((bank.n for bank in self.banks), default=0) if backward else self.k
        cores = chips.cores(x.device)
        chunk, splits = chunks(cores, depth, tile.k, row_blocks * rank_blocks)
        splits = max(splits, 1)  # k = 0 still has an S, of zeros
        parts = x.new_empty(splits, self.m, self.s_columns, dtype=torch.float32)
        for group in self.groups():
            first = group[0]
            own_x = x[:, first.column :] if backward else x
            rank_blocks = sum(cdiv(bank.s_width, self.block_r) for bank in group)
            launch(
                kernels.multi_shrink_kernel,
                (row_blocks * rank_blocks, splits),
                own_x, *_fields(group, matrix), *_dropouts(group), parts[:, :, first.s_column :],
                *self.routing(), self.m, self.per_id, self.slots, chunk, self.s_columns,
                *x.stride(), tuple(bank.n if backward else self.k for bank in group),
                tuple(bank.s_width for bank in group),
                SLICED=backward, SCALED=backward, GROUPED=self.plan == "grouped",
                DROPOUT=self.dropout and not backward,
                TERMS=chips.terms(self.dtype, first.a.dtype), PRECISION=self.precision,
                BLOCK_M=tile.m, BLOCK_K=tile.k, BLOCK_R=self.block_r, **options(tile),
            )  # fmt: skip
        if splits == 1:
            return parts[0]
        return sum_partials(parts, parts.new_empty(self.m, self.s_columns), 1.0)

    def _decode_shrink(self, x: Tensor) -> Tensor:
        tile = self.tile("decode_shrink")
        s = x.new_empty(self.m, self.s_columns, dtype=torch.float32)
        for group in self.groups():
            pages = sum(bank.s_width // PAGE for bank in group)
            launch(
                kernels.decode_shrink_kernel,
                (self.m * pages,),
                x, *_fields(group, "a")[:3], s[:, group[0].s_column :], self.ids,
                self.per_id, self.slots, self.k, self.s_columns, *x.stride(),
                tuple(bank.s_width for bank in group),
                BLOCK_K=tile.k, **options(tile),
            )  # fmt: skip
        return s

    def output(
        self,
        y: Tensor,
        s: Tensor,
        *,
        base: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        adds: bool = False,
    ) -> None:
        """y = base + delta + bias, or y += delta."""
        for group in self.groups():
            first, last = group[0].column, group[-1].column + group[-1].n
            self._tile(
                y[:, first:last], s, group, "b", tuple(bank.n for bank in group),
                (base[0], base[1][:, first:last]) if base else None,
                None if bias is None else bias.contiguous()[first:last],
                adds, sums=False,
            )  # fmt: skip

    def input_gradient(
        self,
        dx: Tensor,
        ds: Tensor,
        *,
        base: tuple[Tensor, Tensor] | None = None,
        adds: bool = False,
    ) -> Tensor:
        """dx = base + delta, or dx += delta; the delta is the sum over all banks."""
        for group in self.groups():
            self._tile(dx, ds, group, "a", (self.k,), base, None, adds, sums=True)
            base, adds = None, True
        return dx

    def _tile(
        self,
        out: Tensor,
        s: Tensor,
        group: list[_Bank],
        matrix: str,
        widths: tuple[int, ...],
        base: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
        adds: bool,
        sums: bool,
    ) -> None:
        dropout = self.dropout and sums
        s = s[:, group[0].s_column :]
        fields, s_widths = _fields(group, matrix), tuple(bank.s_width for bank in group)
        sizes = (self.per_id, self.slots, self.s_columns)
        flags = {
            "SUMS": sums, "GROUPED": self.plan == "grouped", "DROPOUT": dropout,
            "PRECISION": self.precision, "GROUP_M": GROUP_M,
            "BLOCK_R": min(self.block_r, chips.MAX_TILE_BLOCK_R),
        }  # fmt: skip
        if self.plan == "decode":
            tile = self.tile("decode_tile" if base else "decode_delta")
            x, w = base or (s, s)  # any pointer where there is no base
            blocks = sum(cdiv(width, tile.n) for width in widths)
            launch(
                tiles.decode_tile_kernel,
                (cdiv(self.m, tile.m) * blocks,),
                x, w, bias, out, s, *fields, self.ids, self.m, x.shape[1], *sizes,
                *x.stride(), *w.stride(), out.stride(0), widths, s_widths,
                HAS_BASE=base is not None, HAS_BIAS=bias is not None, PRECISION=self.precision,
                BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, **options(tile),
            )  # fmt: skip
        elif base:
            tile = self.tile("tile_masked" if dropout else "tile")
            x, w = base
            blocks = sum(cdiv(width, tile.n) for width in widths)
            launch(
                tiles.multi_tile_kernel,
                (cdiv(self.m, tile.m) * blocks,),
                x, w, bias, out, s, *fields, *_dropouts(group), *self.routing(),
                self.m, x.shape[1], *sizes, *x.stride(), *w.stride(), out.stride(0),
                widths, s_widths, HAS_BIAS=bias is not None, **flags,
                BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, **options(tile),
            )  # fmt: skip
        else:
            tile = self.tile("delta_masked" if dropout else "delta")
            blocks = sum(cdiv(width, tile.n) for width in widths)
            launch(
                tiles.multi_delta_kernel,
                (cdiv(self.m, tile.m) * blocks,),
                out, s, *fields, *_dropouts(group), *self.routing(), self.m, *sizes,
                out.stride(0), widths, s_widths, ADDS=adds, **flags,
                BLOCK_M=tile.m, BLOCK_N=tile.n, **options(tile),
            )  # fmt: skip

    def listed(self, bank: _Bank, grad_rows: Tensor, size: int) -> Tensor | None:
        """The slots, those with a gradient first; None where they have as many rows as slots.

        What has a gradient has a row of it at least, so that all are among the first ``size``.
        """
        if size >= self.slots:
            return None
        return ((grad_rows >= 0) & (bank.ranks > 0)).to(torch.int8).argsort(descending=True)

    def gradient(
        self,
        out: Tensor,
        bank: _Bank,
        s: Tensor,
        x: Tensor,
        grad_rows: Tensor,
        listed: Tensor | None,
        dropped: bool,
    ) -> None:
        """dA = dS^T dropout(x), or dB^T = scale S^T dy, of a bank's trained adapters."""
        tile = self.tile("grad")
        size, cols = out.shape
        block_r = chips.rank_block(bank.s_width)
        rank_blocks = cdiv(bank.s_width, block_r)
        most = cdiv(self.m, GRAD_MAX_PARTS)
        chunk = tile.m * cdiv(max(GRAD_ROWS, most), tile.m)
        parts = cdiv(self.m, chunk)
        sums = out if parts == 1 else out.new_empty(parts, size, cols, dtype=torch.float32)
        order, starts = self.sorted
        listed, count = (grad_rows, self.slots) if listed is None else (listed, size)
        launch(
            kernels.multi_grad_kernel,
            (count * rank_blocks, cdiv(cols, tile.k), parts),
            s[:, bank.s_column :], x, sums, bank.ranks, bank.scales, bank.p, bank.seeds,
            listed, grad_rows, order, starts,
            self.per_id, chunk, size, cols, s.stride(0), *x.stride(),
            SCALED=not dropped, DROPOUT=self.dropout and dropped, LISTED=count < self.slots,
            TERMS=chips.terms(self.dtype, bank.a.dtype), PRECISION=self.precision,
            RANK_BLOCKS=rank_blocks,
            BLOCK_M=tile.m, BLOCK_K=tile.k, BLOCK_R=block_r, **options(tile),
        )  # fmt: skip
        if parts > 1:
            launch(
                kernels.sum_parts_kernel,
                (count, cdiv(cols, SUM_BLOCK)),
                sums, out, bank.ranks, listed, grad_rows, starts, self.per_id, chunk, size, cols,
                LISTED=count < self.slots, BLOCK=SUM_BLOCK,
            )  # fmt: skip


def _fields(group: list[_Bank], matrix: str) -> tuple[tuple[Tensor, ...], ...]:
    """The kernels' matrices, tables, ranks and scales."""
    return tuple(
        tuple(getattr(bank, field) for bank in group)
        for field in (matrix, "table", "ranks", "scales")
    )


def _dropouts(group: list[_Bank]) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(bank.p for bank in group), tuple(bank.seeds for bank in group)
