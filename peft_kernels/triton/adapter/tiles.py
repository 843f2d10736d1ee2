"""The tiles of the kernels of ``adapter``, by architecture."""

from __future__ import annotations

import torch

from peft_kernels.triton.common.chips import NO_TENSOR_CORES, Tile

# 16-bit x. "wide": with a float32 parameter, whose products are split.
TILES: dict[str, dict[str, Tile]] = {
    "sm_80": {
        "fwd": Tile(64, 64, 32, 8, 2),
        "fwd_wide": Tile(32, 64, 32, 8, 2),
        "norm_bwd": Tile(32, 64, 0, 8, 2),
        "norm_bwd_wide": Tile(32, 32, 0, 8, 2),
        "bwd": Tile(64, 64, 64, 8, 2),
        "bwd_wide": Tile(32, 64, 32, 8, 2),
        "up": Tile(16, 128, 0, 8, 2),
    },
    "sm_90": {
        "fwd": Tile(64, 64, 64, 8, 3),
        "fwd_wide": Tile(64, 64, 32, 8, 2),
        "norm_bwd": Tile(64, 64, 0, 8, 2),
        "norm_bwd_wide": Tile(64, 32, 0, 8, 2),
        "bwd": Tile(64, 64, 64, 8, 2),
        "bwd_wide": Tile(64, 64, 32, 8, 2),
        "up": Tile(64, 128, 0, 8, 2),
    },
    "sm_100": {
        "fwd": Tile(64, 64, 32, 4, 2),
        "fwd_wide": Tile(64, 32, 32, 8, 2),
        "norm_bwd": Tile(64, 64, 0, 8, 2),
        "bwd": Tile(64, 64, 64, 8, 2),
        "bwd_wide": Tile(64, 32, 32, 8, 2),
        "up": Tile(64, 128, 0, 8, 2),
        "up_wide": Tile(64, 64, 0, 8, 1),
    },
    "gfx942": {
        "fwd": Tile(64, 32, 32, 8, 1),
        "norm_bwd": Tile(64, 32, 0, 8, 1),
        "bwd": Tile(64, 64, 32, 8, 1),
        "up": Tile(32, 128, 0, 8, 1),
    },
    # Any other GPU: within 48 KB of shared memory.
    "other": {
        "fwd": Tile(32, 64, 32, 8, 2),
        "fwd_wide": Tile(16, 64, 32, 4, 1),
        "norm_bwd": Tile(32, 32, 0, 4, 1),
        "bwd": Tile(32, 64, 32, 4, 1),
        "bwd_wide": Tile(32, 32, 32, 8, 1),
        "up": Tile(16, 64, 0, 4, 1),
    },
}
TILES["sm_86"] = TILES["sm_89"] = TILES["sm_80"]
TILES["sm_120"] = TILES["sm_80"] | {
    "fwd": Tile(32, 64, 32, 8, 2),
    "norm_bwd_wide": Tile(16, 32, 0, 4, 2),
}
TILES["gfx90a"] = TILES["gfx942"] | {"fwd_wide": Tile(64, 64, 32, 8, 1)}
TILES["gfx950"] = TILES["gfx942"]
# float32 x, on any GPU.
FLOAT32 = {
    "fwd": Tile(16, 32, 32, 4, 1),
    "norm_bwd": Tile(16, 32, 0, 8, 1),
    "bwd": Tile(32, 32, 32, 8, 1),
    "up": Tile(32, 64, 0, 8, 2),
}
TILES[NO_TENSOR_CORES] = FLOAT32


def tile(name: str, kernel: str, dtype: torch.dtype, *, wide: bool) -> Tile:
    """The shipped tile of ``kernel`` on the architecture ``name``."""
    if dtype is torch.float32:
        return FLOAT32[kernel]
    tiles = TILES[name if name in TILES else "other"]
    return tiles.get(f"{kernel}_wide", tiles[kernel]) if wide else tiles[kernel]
