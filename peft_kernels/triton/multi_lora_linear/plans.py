"""Which kernels of ``multi_lora_linear`` serve a call, and with which tiles.

A *plan* is one way to compute the op, right for any ids:

``"decode"``   S a row and a page at a time, then y with the rows of a tile side by side
``"grouped"``  rows sorted by adapter, so that a tile has few runs of one adapter
``"single"``   rows as they come: no sort and no gather
"""

from __future__ import annotations

import torch

from peft_kernels.triton.common.chips import (
    ARCHS,
    FEW_ROWS,
    NO_TENSOR_CORES,
    Tile,
    gemm_is_competitive,
)

DECODE_MAX_ROWS = 16
NATIVE_MAX_ROWS = 8  # of base and delta in the CUDA kernel; nothing was measured
SINGLE_MIN_ROWS = 64  # rows an id, from which a tile has few runs without sorting


def choose(plan: str, m: int, per_id: int, *, dropout: bool, backward: bool) -> str:
    """The plan that serves m rows, ``per_id`` for each id; ``plan`` is what was asked for."""
    if dropout:
        return "grouped"  # a row's mask depends on its place among those of its adapter
    if plan == "decode" or (plan == "auto" and m <= DECODE_MAX_ROWS):
        if not backward:
            return "decode"
        plan = "auto"
    if plan == "auto":
        return "single" if per_id >= SINGLE_MIN_ROWS else "grouped"
    return plan


def fuses_base(name: str, dtype: torch.dtype, m: int, n: int, depth: int) -> bool:
    """Whether [m, n] = base + delta is one kernel, or the library's GEMM and an add in place.

    The add reads and writes 2 m n elements once more, which takes 2 balance / depth of the time
    of a compute-bound GEMM. Our GEMM, whose tile leaves room for the delta, is expected to lose
    a fifth there (not measured). It loses nothing where the weight's own bytes are the bound,
    that is, with fewer rows than the balance, and a launch is saved.
    """
    if not gemm_is_competitive(name, dtype, n, depth):
        return False
    balance = ARCHS[name].balance
    return m < balance or 2 * balance / depth > 1 / 5


# A tile of y or dx has a second accumulator of its size beside the base's, for the delta of a run:
# half as many columns as `lora_linear` takes.
_TILES: dict[str, dict[str, Tile]] = {
    "sm_80": {
        "tile_few": Tile(32, 64, 64, 4, 4),
        "tile_many": Tile(128, 128, 64, 8, 3),
        "tile_masked": Tile(64, 128, 32, 8, 3),
        "delta": Tile(64, 64, 0, 4, 1),
        "delta_masked": Tile(64, 64, 0, 8, 1),
        "shrink": Tile(64, 0, 32, 4, 3),
        "grad": Tile(32, 0, 128, 8, 2),
        "decode_tile": Tile(16, 32, 128, 4, 4),
    },
    "sm_90": {
        "tile_few": Tile(64, 64, 128, 4, 4),
        "tile_many": Tile(128, 128, 64, 8, 3),
        "tile_masked": Tile(64, 128, 64, 8, 3),
        "delta": Tile(64, 128, 0, 4, 1),
        "delta_masked": Tile(64, 64, 0, 4, 1),
        "shrink": Tile(64, 0, 64, 4, 4),
        "grad": Tile(64, 0, 128, 8, 3),
        "decode_tile": Tile(16, 32, 128, 4, 4),
    },
    "sm_100": {
        "tile_few": Tile(64, 64, 128, 4, 4),
        "tile_many": Tile(128, 128, 64, 8, 3),
        "tile_masked": Tile(128, 64, 64, 8, 3),
        "delta": Tile(128, 64, 0, 4, 1),
        "delta_masked": Tile(128, 64, 0, 8, 1),
        "shrink": Tile(128, 0, 64, 8, 3),
        "grad": Tile(64, 0, 128, 8, 3),
        "decode_tile": Tile(16, 32, 128, 4, 4),
    },
    "gfx942": {
        "tile_few": Tile(16, 64, 128, 4, 2),
        "tile_many": Tile(128, 128, 64, 8, 2),
        "tile_masked": Tile(64, 128, 32, 8, 2),
        "delta": Tile(64, 64, 0, 4, 1),
        "delta_masked": Tile(64, 64, 0, 8, 1),
        "shrink": Tile(64, 0, 32, 8, 2),
        "grad": Tile(32, 0, 128, 8, 1),
        "decode_tile": Tile(16, 32, 128, 4, 2),
    },
    # Any other GPU, where the base is the library's: within 48 KB of shared memory.
    "other": {
        "delta": Tile(32, 64, 0, 4, 1),
        "delta_masked": Tile(32, 64, 0, 4, 1),
        "shrink": Tile(32, 0, 32, 4, 2),
        "grad": Tile(32, 0, 64, 4, 2),
    },
}
_TILES["sm_86"] = _TILES["sm_80"] | {
    "delta": Tile(32, 64, 0, 4, 1),
    "shrink": Tile(64, 0, 32, 8, 3),
}
_TILES["sm_89"] = _TILES["sm_120"] = _TILES["sm_86"]
_TILES["gfx90a"] = _TILES["gfx950"] = _TILES["gfx942"]
# float32 x, on any GPU, and there as well beside the library's base.
_FLOAT32 = {
    "delta": Tile(32, 64, 0, 4, 1),
    "delta_masked": Tile(32, 32, 0, 8, 1),
    "shrink": Tile(32, 0, 32, 4, 3),
    "grad": Tile(32, 0, 64, 4, 2),
}
_TILES[NO_TENSOR_CORES] = _FLOAT32 | {"shrink": Tile(32, 0, 32, 8, 3)}
# Few rows and no product of tiles: alike everywhere.
_FEW = {
    "decode_delta": Tile(16, 64, 0, 4, 1),
    "decode_shrink": Tile(0, 0, 512, 4, 2),
}


def tile(name: str, kernel: str, dtype: torch.dtype, m: int) -> Tile:
    """The shipped tile of ``kernel`` on the architecture ``name`` for m rows of x."""
    if kernel in _FEW:
        return _FEW[kernel]
    tiles = _FLOAT32 if dtype is torch.float32 else _TILES[name if name in ARCHS else "other"]
    return tiles.get(kernel) or tiles[f"{kernel}_few" if m <= FEW_ROWS else f"{kernel}_many"]
