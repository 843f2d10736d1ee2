"""The launches of one call of ``multi_lora_linear``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import _cuda_kernels
from peft_kernels.ops.multi_lora_linear import sort_by_adapter
from peft_kernels.triton.common import chips
from peft_kernels.triton.common.launch import launch, options, sum_partials
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.multi_lora_linear import kernels, layouts, plans
from peft_kernels.triton.multi_lora_linear import tile_kernels as tiles

# An adapter's gradient is summed in parts of this many rows: fewer leave most of a GPU idle when
# one adapter has all rows. The parts together are at most GRAD_MAX_PARTS times the gradient.
GRAD_ROWS, GRAD_MAX_PARTS = 1024, 16
SUM_BLOCK = 128


class Bank(NamedTuple):
    """Of one bank, what its gradients are made of."""

    place: layouts.Slice
    ranks: Tensor
    scales: Tensor
    p: Tensor
    seeds: Tensor


class Call:
    """The banks and rows of one call of the op, and the layout of its launches."""

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
        self.slots = ranks[0].shape[0]
        self.layout = layouts.layout_of(
            x, a, b, tables, ids, dropout=self.dropout, plan=plan, backward=backward
        )
        self.plan, self.per_id = self.layout.plan, self.layout.per_id
        self._matrices = {"a": a, "b": b}
        self._tables = tables
        self._ranks = [one.contiguous() for one in ranks]
        self._scales = [one.contiguous() for one in scales]
        # Without dropout the kernels take any pointer there, and don't read it.
        self._p = [p.contiguous() for p in dropout_p] if self.dropout else self._scales
        self._seeds = [seed.contiguous() for seed in seeds] if self.dropout else self._scales
        self.ids = ids.contiguous() if ids.dim() == 1 else ids.contiguous().view(-1)
        self._routes = (order, starts)

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
        return plans.fuses_base(self.layout.sizes.arch_name, self.dtype, self.m, n, depth)

    def has_native_decode(self, device: torch.device) -> bool:
        has_room = len(self._tables) <= layouts.MAX_BANKS
        return device.type == "cuda" and has_room and _cuda_kernels.why_not(device) is None

    def is_one_launch(self, weight: Tensor) -> bool:
        """Whether base and delta are the native kernel's, which would copy another layout of W.

        It multiplies without tensor cores, which the base of more rows should have.
        """
        few = self.plan == "decode" and self.m <= plans.NATIVE_MAX_ROWS
        rows_lie_whole = weight.stride(1) == 1 or weight.shape[1] <= 1
        return few and rows_lie_whole and self.has_native_decode(weight.device)

    def bank(self, i: int) -> Bank:
        place, p, seeds = self.layout.slices[i], self._p[i], self._seeds[i]
        return Bank(place, self._ranks[i], self._scales[i], p, seeds)

    def _fields(self, group: layouts.Group, matrix: str) -> tuple[tuple[Tensor, ...], ...]:
        """The kernels' matrices, tables, ranks and scales."""
        own = group.banks
        fields = self._matrices[matrix], self._tables, self._ranks, self._scales
        return tuple([tuple(field[own]) for field in fields])

    def _dropouts(self, group: layouts.Group) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(self._p[group.banks]), tuple(self._seeds[group.banks])

    # -- launches

    def low_rank_input(self, x: Tensor, matrix: str) -> Tensor:
        """S = A_g dropout_g(x), or dS = scale_g B_g^T dy: ``[m, R]``."""
        if self.plan == "decode":
            return self._decode_shrink(x)
        layout, backward = self.layout, matrix == "b"
        shrink = layout.once(layouts.shrink_launches, backward)
        parts = x.new_empty(shrink.splits, self.m, layout.s_columns, dtype=torch.float32)
        for group, (grid, settings) in zip(layout.groups, shrink.launches, strict=True):
            launch(
                kernels.multi_shrink_kernel, grid,
                _columns_from(x, group.columns.start if backward else 0),
                *self._fields(group, matrix), *self._dropouts(group),
                _columns_from(parts, group.s_column),
                *self.routing(), self.m, self.per_id, self.slots, shrink.chunk, layout.s_columns,
                *x.stride(), group.widths if backward else (self.k,) * len(group.widths),
                group.s_widths, **settings,
            )  # fmt: skip
        if shrink.splits == 1:
            return parts[0]
        return sum_partials(parts, parts.new_empty(self.m, layout.s_columns), 1.0, layout.pdl)

    def _decode_shrink(self, x: Tensor) -> Tensor:
        layout = self.layout
        s = x.new_empty(self.m, layout.s_columns, dtype=torch.float32)
        for group in layout.groups:
            grid, settings = layout.once(layouts.decode_shrink_launch, group.s_widths)
            launch(
                kernels.decode_shrink_kernel, grid,
                x, *self._fields(group, "a")[:3], _columns_from(s, group.s_column), self.ids,
                self.per_id, self.slots, self.k, layout.s_columns, *x.stride(), group.s_widths,
                **settings,
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
        """y = x W^T + delta + bias for a base (x, W), or y += delta."""
        bias = None if bias is None else bias.contiguous()
        for group in self.layout.groups:
            own_y, own_base, own_bias = y, base, bias
            if len(self.layout.groups) > 1:
                own_y = y[:, group.columns]
                own_base = None if base is None else (base[0], base[1][group.columns])
                own_bias = None if bias is None else bias[group.columns]
            wide = None if own_base is None else (*own_base, own_base[1].stride()[::-1])
            self._tile(own_y, s, group, "b", group.widths, wide, own_bias, adds, sums=False)

    def input_gradient(
        self,
        dx: Tensor,
        ds: Tensor,
        *,
        base: tuple[Tensor, Tensor] | None = None,
        adds: bool = False,
    ) -> Tensor:
        """dx = dy W + delta for a base (dy, W), or dx += delta, which is the sum of all banks'."""
        wide = None if base is None else (*base, base[1].stride())
        for group in self.layout.groups:
            self._tile(dx, ds, group, "a", (self.k,), wide, None, adds, sums=True)
            wide, adds = None, True
        return dx

    def _tile(
        self,
        out: Tensor,
        s: Tensor,
        group: layouts.Group,
        matrix: str,
        widths: tuple[int, ...],
        base: tuple[Tensor, Tensor, tuple[int, ...]] | None,
        bias: Tensor | None,
        adds: bool,
        sums: bool,
    ) -> None:
        """One launch; a base is x, W and the strides of W's depth and columns."""
        layout = self.layout
        s = _columns_from(s, group.s_column)
        low_rank = s, *self._fields(group, matrix)
        sizes = self.per_id, self.slots, layout.s_columns
        if self.plan == "decode":
            x, w, strides = base or (s, s, s.stride())  # any pointer where there is no base
            grid, settings = layout.once(
                layouts.decode_tile_launch, widths, base is not None, bias is not None
            )
            launch(
                tiles.decode_tile_kernel, grid,
                x, w, bias, out, *low_rank, self.ids, self.m, x.shape[1], *sizes,
                *x.stride(), *strides, out.stride(0), widths, group.s_widths, **settings,
            )  # fmt: skip
        elif base:
            x, w, strides = base
            grid, settings = layout.once(layouts.tile_launch, widths, sums, bias is not None)
            launch(
                tiles.multi_tile_kernel, grid,
                x, w, bias, out, *low_rank, *self._dropouts(group), *self.routing(),
                self.m, x.shape[1], *sizes, *x.stride(), *strides, out.stride(0),
                widths, group.s_widths, **settings,
            )  # fmt: skip
        else:
            grid, settings = layout.once(layouts.delta_launch, widths, sums, adds)
            launch(
                tiles.multi_delta_kernel, grid,
                out, *low_rank, *self._dropouts(group), *self.routing(), self.m, *sizes,
                out.stride(0), widths, group.s_widths, **settings,
            )  # fmt: skip

    def listed(self, bank: Bank, grad_rows: Tensor, size: int) -> Tensor | None:
        """The slots, those with a gradient first; None where they have as many rows as slots.

        What has a gradient has a row of it at least, so that all are among the first ``size``.
        """
        if size >= self.slots:
            return None
        return ((grad_rows >= 0) & (bank.ranks > 0)).to(torch.int8).argsort(descending=True)

    def gradient(
        self,
        out: Tensor,
        bank: Bank,
        s: Tensor,
        x: Tensor,
        grad_rows: Tensor,
        listed: Tensor | None,
        dropped: bool,
    ) -> None:
        """dA = dS^T dropout(x), or dB^T = scale S^T dy, of a bank's trained adapters."""
        place, tile = bank.place, self.layout.tile("grad")
        size, cols = out.shape
        block_r = chips.rank_block(place.s_width)
        rank_blocks = cdiv(place.s_width, block_r)
        most = cdiv(self.m, GRAD_MAX_PARTS)
        chunk = tile.m * cdiv(max(GRAD_ROWS, most), tile.m)
        parts = cdiv(self.m, chunk)
        sums = out if parts == 1 else out.new_empty(parts, size, cols, dtype=torch.float32)
        order, starts = self.sorted
        listed, count = (grad_rows, self.slots) if listed is None else (listed, size)
        launch(
            kernels.multi_grad_kernel,
            (count * rank_blocks, cdiv(cols, tile.k), parts),
            s[:, place.s_column :], x, sums, bank.ranks, bank.scales, bank.p, bank.seeds,
            listed, grad_rows, order, starts,
            self.per_id, chunk, size, cols, s.stride(0), *x.stride(),
            SCALED=not dropped, DROPOUT=self.dropout and dropped, LISTED=count < self.slots,
            TERMS=chips.terms(self.dtype, place.dtype),
            PRECISION=self.layout.sizes.precision,
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


def _columns_from(matrix: Tensor, first: int) -> Tensor:
    return matrix[..., first:] if first else matrix
