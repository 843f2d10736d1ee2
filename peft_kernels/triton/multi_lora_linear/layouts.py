"""The slices and groups of banks of ``multi_lora_linear``, its plan, its grids and options."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.ops.multi_lora_linear import PAGE
from peft_kernels.triton.common import chips, dependent, layouts
from peft_kernels.triton.common.launch import GROUP_M, chunks, options
from peft_kernels.triton.common.layouts import Prepared
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.multi_lora_linear import plans

MAX_BANKS = 4  # of one launch; a kernel is compiled for each number of banks


class Slice(NamedTuple):
    """A bank's matrices, and where its slices of y and of S begin."""

    dtype: torch.dtype
    n: int
    column: int
    s_width: int
    s_column: int


class Group(NamedTuple):
    """Neighbouring banks that one launch can serve: of one dtype."""

    banks: slice
    columns: slice  # of y
    s_column: int
    widths: tuple[int, ...]
    s_widths: tuple[int, ...]
    dtype: torch.dtype


class Sizes(NamedTuple):
    """What a layout follows from. ``banks`` are of each the dtype, n and the pages of its table."""

    m: int
    k: int
    dtype: torch.dtype
    banks: tuple[tuple[torch.dtype, int, int], ...]
    ids: int
    dropout: bool
    plan: str
    backward: bool
    device: torch.device
    arch_name: str
    cores: int
    precision: str


class Layout(layouts.Layout):
    """The slices, groups of banks, plan and launches of calls of these sizes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.per_id = sizes.m // max(sizes.ids, 1)
        self.plan = plans.choose(
            sizes.plan, sizes.m, self.per_id, dropout=sizes.dropout, backward=sizes.backward
        )
        self.slices = _slices(sizes)
        last = self.slices[-1]
        self.s_columns = last.s_column + last.s_width
        self.groups = _groups(self.slices)
        self.block_r = chips.rank_block(max(one.s_width for one in self.slices))
        # Of several groups a tile's launch doesn't follow its own shrink's; without columns of S
        # there is no shrink.
        follows = not sizes.backward and len(self.groups) == 1 and self.s_columns > 0
        self.pdl = follows and dependent.launches(sizes.arch_name, sizes.device)

    def tile(self, kernel: str) -> chips.Tile:
        return plans.tile(self.sizes.arch_name, kernel, self.sizes.dtype, self.sizes.m)


def layout_of(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    tables: Sequence[Tensor],
    ids: Tensor,
    *,
    dropout: bool,
    plan: str,
    backward: bool,
) -> Layout:
    banks = [(a[i].dtype, b[i].shape[1], tables[i].shape[1]) for i in range(len(a))]
    (m, k), device = x.shape, x.device
    return _layout(
        Sizes(
            m, k, x.dtype, tuple(banks), ids.numel(), dropout, plan, backward,
            device, chips.arch_name(device), chips.cores(device), chips.float32_precision(device),
        )
    )  # fmt: skip


_layout = functools.lru_cache(maxsize=1024)(Layout)


def _slices(sizes: Sizes) -> tuple[Slice, ...]:
    found, column, s_column = [], 0, 0
    for dtype, n, pages in sizes.banks:
        found.append(Slice(dtype, n, column, PAGE * pages, s_column))
        column, s_column = column + n, s_column + PAGE * pages
    return tuple(found)


def _groups(slices: tuple[Slice, ...]) -> tuple[Group, ...]:
    first, found = 0, []
    for end in range(1, len(slices) + 1):
        full = end - first == MAX_BANKS
        if end == len(slices) or full or slices[end].dtype is not slices[first].dtype:
            found.append(_group(slices, first, end))
            first = end
    return tuple(found)


def _group(slices: tuple[Slice, ...], first: int, end: int) -> Group:
    own, last = slices[first:end], slices[end - 1]
    return Group(
        banks=slice(first, end),
        columns=slice(own[0].column, last.column + last.n),
        s_column=own[0].s_column,
        widths=tuple(one.n for one in own),
        s_widths=tuple(one.s_width for one in own),
        dtype=own[0].dtype,
    )


# ---- launches: grids and options ---------------------------------------------------------------


class Shrink(NamedTuple):
    """S in parts: how many, and how deep each; a launch for each group of banks."""

    splits: int
    chunk: int
    launches: list[Prepared]


def shrink_launches(layout: Layout, backward: bool) -> Shrink:
    sizes, tile = layout.sizes, layout.tile("shrink")
    row_blocks = cdiv(sizes.m, tile.m)
    rank_blocks = [sum(cdiv(w, layout.block_r) for w in g.s_widths) for g in layout.groups]
    depth = max(one.n for one in layout.slices) if backward else sizes.k
    chunk, splits = chunks(sizes.cores, depth, tile.k, row_blocks * sum(rank_blocks))
    splits = max(splits, 1)  # k = 0 still has an S, of zeros
    launches: list[Prepared] = []
    for group, blocks in zip(layout.groups, rank_blocks, strict=True):
        settings: dict[str, Any] = {
            "SLICED": backward, "SCALED": backward, "GROUPED": layout.plan == "grouped",
            "DROPOUT": sizes.dropout and not backward,
            "TERMS": chips.terms(sizes.dtype, group.dtype), "PRECISION": sizes.precision,
            "BLOCK_M": tile.m, "BLOCK_K": tile.k, "BLOCK_R": layout.block_r,
            **dependent.first(layout.pdl),
        }  # fmt: skip
        launches.append(((row_blocks * blocks, splits), settings | options(tile)))
    return Shrink(splits, chunk, launches)


def decode_shrink_launch(layout: Layout, s_widths: tuple[int, ...]) -> Prepared:
    tile = layout.tile("decode_shrink")
    pages = sum(s_widths) // PAGE
    return (layout.sizes.m * pages,), {
        "BLOCK_K": tile.k, **options(tile), **dependent.first(layout.pdl),
    }  # fmt: skip


def decode_tile_launch(
    layout: Layout, widths: tuple[int, ...], has_base: bool, has_bias: bool
) -> Prepared:
    tile = layout.tile("decode_tile" if has_base else "decode_delta")
    return _grid(layout, tile, widths), {
        "HAS_BASE": has_base, "HAS_BIAS": has_bias, "PRECISION": layout.sizes.precision,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, **options(tile),
        **dependent.second(layout.pdl),
    }  # fmt: skip


def tile_launch(layout: Layout, widths: tuple[int, ...], sums: bool, has_bias: bool) -> Prepared:
    dropout = layout.sizes.dropout and sums
    tile = layout.tile("tile_masked" if dropout else "tile")
    return _grid(layout, tile, widths), {
        "HAS_BIAS": has_bias, **_flags(layout, sums, dropout),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, **options(tile),
    }  # fmt: skip


def delta_launch(layout: Layout, widths: tuple[int, ...], sums: bool, adds: bool) -> Prepared:
    dropout = layout.sizes.dropout and sums
    tile = layout.tile("delta_masked" if dropout else "delta")
    return _grid(layout, tile, widths), {
        "ADDS": adds, **_flags(layout, sums, dropout),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, **options(tile),
    }  # fmt: skip


def _grid(layout: Layout, tile: chips.Tile, widths: tuple[int, ...]) -> tuple[int]:
    return (cdiv(layout.sizes.m, tile.m) * sum(cdiv(width, tile.n) for width in widths),)


def _flags(layout: Layout, sums: bool, dropout: bool) -> dict[str, Any]:
    return {
        "SUMS": sums, "GROUPED": layout.plan == "grouped", "DROPOUT": dropout,
        "PRECISION": layout.sizes.precision, "GROUP_M": GROUP_M,
        "BLOCK_R": min(layout.block_r, chips.MAX_TILE_BLOCK_R), **dependent.second(layout.pdl),
    }  # fmt: skip
