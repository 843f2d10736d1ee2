"""The tiles that ``lora_linear``'s products can have on a chip, and the one that a shape gets.

`tiling` takes what `cost.seconds` calls fastest, of tiles and of splits of the sum over k. Chips
without tiles here have one for few rows and one for many (`chips.tile`), and so has float32 x,
whose sum isn't split.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.common.chips import Tile

# For "tile" (masked or not) and for "in_loop"; many rows have `chips`' own tile for them as well.
# Tiles of fewer than 64 rows serve few rows alone: `cost` knows nothing of the instructions between
# two products, of which small tiles have more.
_HOPPER = {
    "tile": (
        Tile(64, 16, 128, 4, 4),
        Tile(64, 32, 64, 4, 4),
        Tile(64, 64, 128, 4, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(128, 128, 64, 8, 3),
    ),
    "in_loop": (
        Tile(64, 16, 64, 4, 4),
        Tile(64, 32, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
    ),
}
# With 4 warps its compiler spills parts of a sum in the narrowest tile.
_BLACKWELL = _HOPPER | {"in_loop": (Tile(64, 16, 64, 8, 4), *_HOPPER["in_loop"][1:])}
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm_80": {
        "tile": (
            Tile(16, 16, 128, 4, 4),
            Tile(16, 32, 128, 4, 4),
            Tile(16, 64, 128, 4, 4),
            Tile(32, 64, 64, 4, 4),
            Tile(64, 64, 64, 4, 3),
            Tile(64, 128, 64, 4, 3),
        ),
        "in_loop": (
            Tile(16, 16, 64, 4, 4),
            Tile(16, 32, 64, 4, 4),
            Tile(16, 64, 64, 4, 3),
            Tile(32, 64, 64, 4, 3),
            Tile(64, 64, 32, 4, 3),
        ),
    },
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "gfx942": {
        "tile": (
            Tile(16, 16, 128, 4, 2),
            Tile(16, 32, 128, 4, 2),
            Tile(16, 64, 128, 4, 2),
            Tile(32, 32, 64, 4, 2),
            Tile(64, 64, 64, 4, 2),
            Tile(64, 128, 64, 8, 2),
        ),
        "in_loop": (
            Tile(16, 16, 32, 4, 2),
            Tile(16, 32, 32, 4, 2),
            Tile(16, 64, 32, 4, 2),
            Tile(64, 64, 32, 8, 2),
        ),
    },
}
TILES["sm_86"] = TILES["sm_89"] = TILES["sm_120"] = TILES["sm_80"]
TILES["gfx90a"] = TILES["gfx950"] = TILES["gfx942"]
SMALL_TILE_ROWS = 64
BIG_TILE = 128 * 128
# Into how many parts a sum over k may be split. Each number is a variant of the kernel that adds
# them up.
SPLITS = (1, 2, 4, 8)
# The most that the parts of a call may take of the GPU's memory while it lasts.
PARTS_BYTES = 64 << 20
# What adds them up waits for memory: a few elements a thread, and many programs.
ADDED = Tile(16, 64, 0, 4, 1)
# What adds up S beside it: all of S's parts of a tile are in flight.
ADDED_S = Tile(32, 128, 0, 4, 1)


@dataclass(frozen=True)
class Tiling:
    """The blocks of a product's programs, and in how many parts its sum is made."""

    tile: Tile
    splits: int = 1


def candidates(name: str, kernel: str, dtype: torch.dtype, m: int) -> tuple[Tile, ...]:
    """The tiles of ``kernel`` ("tile", "tile_masked" or "in_loop") that m rows can have."""
    if dtype is torch.float32 or name not in TILES:
        return (chips.tile(name, kernel, dtype, m),)
    tiles = TILES[name][kernel.removesuffix("_masked")]
    if m <= chips.FEW_ROWS:
        return tiles
    many = tuple(tile for tile in tiles if tile.m >= SMALL_TILE_ROWS)
    return (*many, chips.tile(name, kernel, dtype, m))


def splits_of(kernel: str, tile: Tile) -> tuple[int, ...]:
    """Into how many parts the sums of a tile may be split.

    Beside S and the mask of dropout a big tile of "in_loop" leaves no registers for the parts'
    addresses on an sm_80.
    """
    return (1,) if kernel == "in_loop" and tile.m * tile.n >= BIG_TILE else SPLITS


@functools.lru_cache(maxsize=4096)
def tiling(
    name: str,
    kernel: str,
    dtype: torch.dtype,
    product: cost.Product,
    chip: cost.Chip | None = None,
) -> Tiling:
    """The fastest on paper, of ``chip`` where it isn't the architecture's."""
    tiles = candidates(name, kernel, dtype, product.m)
    chip = chip or cost.CHIPS.get(name)
    if dtype is torch.float32 or chip is None:
        return Tiling(tiles[0])
    most = PARTS_BYTES // max(4 * product.m * product.n, 1)
    choices = [
        Tiling(tile, splits)
        for tile in tiles
        for splits in splits_of(kernel, tile)
        if splits == 1 or splits <= most
    ]
    return min(choices, key=lambda choice: cost.seconds(chip, product, choice.tile, choice.splits))


def seconds(
    name: str, kernel: str, dtype: torch.dtype, product: cost.Product, chip: cost.Chip
) -> float:
    """What `tiling`'s choice takes on paper."""
    choice = tiling(name, kernel, dtype, product, chip)
    return cost.seconds(chip, product, choice.tile, choice.splits)
