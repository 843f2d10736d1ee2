"""The grids and options of the launches of ``adapter_fusion``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.triton.adapter_fusion import tiles
from peft_kernels.triton.common import chips, layouts
from peft_kernels.triton.common.blocks import INTERPRET
from peft_kernels.triton.common.launch import chunks, options
from peft_kernels.triton.common.layouts import Prepared
from peft_kernels.triton.common.sizes import cdiv, next_power_of_2

WEIGHTS_BLOCK_M = 16


class Sizes(NamedTuple):
    """What a layout follows from; ``adapters`` are the bottlenecks' sizes.

    ``wide`` says that a parameter isn't in the dtype of x, and so in float32.
    """

    m: int
    dtype: torch.dtype
    wide: bool
    adapters: tuple[int, ...]
    activation: str
    arch_name: str
    cores: int
    precision: str


class Layout(layouts.Layout):
    """The launches of calls of these sizes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.terms = chips.terms(sizes.dtype, torch.float32 if sizes.wide else sizes.dtype)

    def tile(self, kernel: str) -> chips.Tile:
        return tiles.tile(self.sizes.arch_name, kernel, self.sizes.dtype, wide=self.sizes.wide)


_layout = functools.lru_cache(maxsize=1024)(Layout)


def layout_of(
    x: Tensor, parameters: tuple[Tensor, ...], adapters: Sequence[int], activation: str
) -> Layout:
    dtype, device, wide = x.dtype, x.device, False
    for parameter in parameters:
        wide = wide or parameter.dtype is not dtype
    arch_name, cores = chips.arch_name(device), chips.cores(device)
    precision = _precision(dtype, device)
    sizes = x.shape[0], dtype, wide, tuple(adapters), activation, arch_name, cores, precision
    return _layout(Sizes(*sizes))


def _precision(dtype: torch.dtype, device: torch.device) -> str:
    """Of products of float32 tiles; beside a 16-bit x they are split for the tensor cores."""
    return chips.precision(device, dtype, "ieee" if INTERPRET.value else "bf16x3")


# ---- launches ----------------------------------------------------------------------------------


def weights_launch(layout: Layout) -> Prepared:
    """That of the forward's weights and of the backward's."""
    sizes = layout.sizes
    many = sizes.dtype is torch.float32 and sizes.arch_name != chips.NO_TENSOR_CORES
    return (cdiv(sizes.m, WEIGHTS_BLOCK_M),), {
        "ACTIVATION": sizes.activation,
        "BLOCK_M": WEIGHTS_BLOCK_M,
        "BLOCK_R": chips.rank_block(max(sizes.adapters)),
        "ADAPTERS": next_power_of_2(len(sizes.adapters)),
        "num_warps": 8 if many else 4,
    }


def products_launch(layout: Layout, first: int, second: int, has_bias: bool) -> Prepared:
    """Of two products of so many columns."""
    tile = layout.tile("products")
    block_n = min(tile.n, max(16, next_power_of_2(max(first, second))))
    blocks = cdiv(first, block_n) + cdiv(second, block_n)
    return (cdiv(layout.sizes.m, tile.m) * blocks,), {
        "HAS_BIAS": has_bias, "TERMS": layout.terms, "PRECISION": layout.sizes.precision,
        "BLOCK_M": tile.m, "BLOCK_N": block_n, "BLOCK_K": tile.k, **options(tile),
    }  # fmt: skip


def mix_launch(
    layout: Layout, n: int, first: int, second: int, has_second: bool, has_residual: bool
) -> Prepared:
    """Of n columns, summed over so many of each product."""
    tile = layout.tile("mix")
    return (cdiv(layout.sizes.m, tile.m) * cdiv(n, tile.n),), {
        "HAS_SECOND": has_second, "HAS_RESIDUAL": has_residual,
        "PRECISION": layout.sizes.precision, "BLOCK_M": tile.m, "BLOCK_N": tile.n,
        "BLOCK_R": chips.rank_block(first), "BLOCK_R2": chips.rank_block(second), **options(tile),
    }  # fmt: skip


class Grad(NamedTuple):
    """A gradient in parts, each the sum over ``chunk`` rows."""

    splits: int
    chunk: int
    launch: Prepared


def grad_launch(layout: Layout, k: int, r: int, sums: bool) -> Grad:
    tile, block_r = layout.tile("grad"), chips.rank_block(r)
    programs = cdiv(k, tile.k) * cdiv(r, block_r)
    chunk, splits = chunks(layout.sizes.cores, layout.sizes.m, tile.m, programs)
    settings = {
        "NEEDS_SUMS": sums, "TERMS": layout.terms, "PRECISION": layout.sizes.precision,
        "BLOCK_M": tile.m, "BLOCK_K": tile.k, "BLOCK_R": block_r, **options(tile),
    }  # fmt: skip
    return Grad(splits, chunk, ((programs, splits), settings))
