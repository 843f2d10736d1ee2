"""The tiles of the kernels of ``adapter_fusion``, by architecture."""

from __future__ import annotations

import torch

from peft_kernels.triton.common.chips import NO_TENSOR_CORES, Tile

# 16-bit x. "wide": with a float32 parameter, whose products are split.
TILES: dict[str, dict[str, Tile]] = {
    "sm_80": {
        "products": Tile(64, 128, 64, 8, 3),
        "products_wide": Tile(64, 128, 32, 8, 3),
        "mix": Tile(64, 64, 0, 8, 2),
        "grad": Tile(32, 0, 128, 8, 3),
    },
    "sm_90": {
        "products": Tile(128, 128, 64, 8, 3),
        "products_wide": Tile(128, 128, 32, 8, 3),
        "mix": Tile(128, 128, 0, 8, 2),
        "mix_wide": Tile(64, 128, 0, 8, 2),
        "grad": Tile(64, 0, 128, 8, 3),
    },
    "sm_100": {
        "products": Tile(128, 128, 64, 8, 3),
        "products_wide": Tile(64, 128, 64, 8, 2),
        "mix": Tile(128, 128, 0, 8, 2),
        "mix_wide": Tile(64, 128, 0, 8, 2),
        "grad": Tile(64, 0, 128, 8, 3),
    },
    "gfx942": {
        "products": Tile(64, 64, 32, 8, 2),
        "mix": Tile(64, 64, 0, 8, 1),
        "grad": Tile(32, 0, 128, 8, 1),
    },
    # Any other GPU: within 48 KB of shared memory.
    "other": {
        "products": Tile(32, 64, 32, 4, 2),
        "mix": Tile(32, 64, 0, 4, 1),
        "grad": Tile(32, 0, 128, 8, 2),
    },
}
TILES["sm_86"] = TILES["sm_89"] = TILES["sm_120"] = TILES["sm_80"]
TILES["gfx90a"] = TILES["gfx950"] = TILES["gfx942"]
# float32 x, on any GPU.
FLOAT32 = {
    "products": Tile(32, 32, 32, 4, 2),
    "mix": Tile(32, 64, 0, 4, 1),
    "grad": Tile(32, 0, 64, 8, 2),
}
TILES[NO_TENSOR_CORES] = FLOAT32


def tile(name: str, kernel: str, dtype: torch.dtype, *, wide: bool) -> Tile:
    """The shipped tile of ``kernel`` on the architecture ``name``."""
    if dtype is torch.float32:
        return FLOAT32[kernel]
    tiles = TILES[name if name in TILES else "other"]
    return tiles.get(f"{kernel}_wide", tiles[kernel]) if wide else tiles[kernel]
