"""The tiles of the kernels of ``prefix_attention``, by architecture and the head's size."""

from __future__ import annotations

import torch

from peft_kernels.triton.common import chips
from peft_kernels.triton.common.chips import Tile

# By the head's size, rounded up to a power of two and at least 64, from which on the tiles differ.
# m: rows, which are queries of one KV head's group. n: keys. "masked": with a mask, of which a
# thread holds an address and a value beside each score.
TILES: dict[str, dict[str, dict[int, Tile]]] = {
    "sm_80": {
        "few": {64: Tile(16, 64, 0, 4, 3), 256: Tile(16, 32, 0, 4, 3)},
        "fwd": {64: Tile(64, 64, 0, 4, 3), 128: Tile(128, 64, 0, 8, 3), 256: Tile(64, 32, 0, 8, 2)},
        "fwd_masked": {
            64: Tile(64, 32, 0, 4, 3),
            128: Tile(64, 32, 0, 8, 3),
            256: Tile(32, 32, 0, 8, 2),
        },
        "query_grad": {64: Tile(64, 32, 0, 4, 2), 128: Tile(64, 32, 0, 8, 2)},
        "text_grad": {64: Tile(32, 64, 0, 8, 2)},
        "text_grad_masked": {64: Tile(32, 64, 0, 8, 2), 128: Tile(32, 32, 0, 8, 2)},
        "prefix_grad": {64: Tile(32, 64, 0, 8, 1)},
    },
    "sm_90": {
        "few": {64: Tile(16, 32, 0, 4, 3), 128: Tile(16, 64, 0, 4, 3)},
        "fwd": {64: Tile(128, 64, 0, 8, 3), 256: Tile(128, 64, 0, 8, 2)},
        "fwd_masked": {
            64: Tile(128, 64, 0, 8, 3),
            128: Tile(128, 16, 0, 8, 3),
            256: Tile(64, 16, 0, 8, 2),
        },
        "query_grad": {
            64: Tile(64, 64, 0, 4, 2),
            128: Tile(64, 64, 0, 8, 2),
            256: Tile(64, 32, 0, 8, 2),
        },
        "query_grad_masked": {64: Tile(64, 64, 0, 4, 2), 128: Tile(64, 32, 0, 8, 2)},
        "text_grad": {
            64: Tile(64, 64, 0, 4, 2),
            128: Tile(64, 64, 0, 8, 2),
            256: Tile(64, 32, 0, 8, 2),
        },
        "text_grad_masked": {
            64: Tile(64, 64, 0, 4, 2),
            128: Tile(32, 64, 0, 8, 2),
            256: Tile(32, 32, 0, 8, 2),
        },
        "prefix_grad": {
            64: Tile(64, 64, 0, 8, 1),
            128: Tile(16, 64, 0, 8, 2),
            256: Tile(64, 32, 0, 8, 1),
        },
    },
    "sm_100": {
        "few": {64: Tile(16, 64, 0, 4, 3)},
        "fwd": {64: Tile(128, 64, 0, 8, 3), 256: Tile(128, 32, 0, 8, 2)},
        "fwd_masked": {64: Tile(128, 16, 0, 8, 3), 256: Tile(64, 32, 0, 8, 2)},
        "query_grad": {64: Tile(64, 64, 0, 4, 2), 128: Tile(64, 64, 0, 8, 2)},
        "query_grad_masked": {64: Tile(64, 32, 0, 8, 2), 256: Tile(64, 32, 0, 8, 1)},
        "text_grad": {
            64: Tile(64, 64, 0, 4, 2),
            128: Tile(64, 64, 0, 8, 2),
            256: Tile(64, 64, 0, 8, 1),
        },
        "text_grad_masked": {
            64: Tile(32, 64, 0, 4, 2),
            128: Tile(32, 64, 0, 8, 2),
            256: Tile(32, 64, 0, 8, 1),
        },
        "prefix_grad": {
            64: Tile(64, 64, 0, 8, 2),
            128: Tile(64, 64, 0, 8, 1),
            256: Tile(64, 32, 0, 8, 1),
        },
    },
    "gfx942": {
        "few": {64: Tile(16, 64, 0, 4, 1)},
        "fwd": {64: Tile(128, 32, 0, 8, 1)},
        "fwd_masked": {64: Tile(128, 32, 0, 8, 1), 256: Tile(64, 32, 0, 4, 1)},
        "query_grad": {64: Tile(64, 64, 0, 8, 1), 128: Tile(64, 32, 0, 4, 1)},
        "query_grad_masked": {64: Tile(64, 32, 0, 4, 1)},
        "text_grad": {64: Tile(32, 64, 0, 4, 1)},
        "text_grad_masked": {64: Tile(32, 32, 0, 4, 1)},
        "prefix_grad": {64: Tile(32, 64, 0, 4, 1), 256: Tile(32, 32, 0, 4, 1)},
    },
    # Any other GPU: within 48 KB of shared memory.
    "other": {
        "few": {64: Tile(16, 32, 0, 4, 1)},
        "fwd": {64: Tile(32, 32, 0, 4, 1)},
        "fwd_masked": {64: Tile(32, 32, 0, 4, 1), 256: Tile(16, 32, 0, 4, 1)},
        "query_grad": {64: Tile(32, 32, 0, 4, 1), 256: Tile(16, 32, 0, 4, 1)},
        "query_grad_masked": {64: Tile(16, 32, 0, 4, 1)},
        "text_grad": {
            64: Tile(32, 32, 0, 4, 1),
            128: Tile(16, 32, 0, 4, 1),
            256: Tile(16, 16, 0, 4, 1),
        },
        "prefix_grad": {
            64: Tile(32, 32, 0, 4, 1),
            128: Tile(16, 32, 0, 4, 1),
            256: Tile(16, 16, 0, 4, 1),
        },
    },
}
TILES["sm_86"] = {
    "few": {64: Tile(16, 64, 0, 4, 3), 128: Tile(16, 32, 0, 4, 3), 256: Tile(16, 32, 0, 4, 2)},
    "fwd": {64: Tile(64, 64, 0, 4, 3), 128: Tile(64, 32, 0, 8, 3), 256: Tile(64, 32, 0, 8, 2)},
    "fwd_masked": TILES["sm_80"]["fwd_masked"],
    "query_grad": {
        64: Tile(64, 32, 0, 4, 2),
        128: Tile(64, 32, 0, 8, 2),
        256: Tile(32, 32, 0, 8, 1),
    },
    "query_grad_masked": {
        64: Tile(32, 32, 0, 4, 2),
        128: Tile(64, 32, 0, 8, 2),
        256: Tile(32, 32, 0, 8, 1),
    },
    "text_grad": {64: Tile(32, 64, 0, 8, 2), 256: Tile(32, 32, 0, 8, 2)},
    "text_grad_masked": {64: Tile(32, 32, 0, 8, 2)},
    "prefix_grad": {64: Tile(32, 64, 0, 8, 1), 256: Tile(32, 32, 0, 8, 1)},
}
TILES["sm_89"] = TILES["sm_120"] = TILES["sm_86"]
TILES["gfx90a"] = TILES["gfx950"] = TILES["gfx942"]
# float32 q, on any GPU. Of heads wider than 128 the backward needs 65 KB of shared memory. dq of
# heads of 256 spills, and on an sm_100 that of 128.
FLOAT32 = {
    "few": {64: Tile(16, 32, 0, 4, 1), 128: Tile(16, 32, 0, 8, 1), 256: Tile(16, 16, 0, 8, 1)},
    "fwd": {64: Tile(32, 32, 0, 4, 1), 128: Tile(16, 32, 0, 8, 1), 256: Tile(16, 16, 0, 8, 1)},
    "fwd_masked": {
        64: Tile(32, 32, 0, 8, 1),
        128: Tile(16, 32, 0, 8, 1),
        256: Tile(16, 16, 0, 8, 1),
    },
    "query_grad": {64: Tile(16, 32, 0, 4, 1), 128: Tile(16, 16, 0, 8, 1)},
    "text_grad": {64: Tile(16, 32, 0, 4, 1), 128: Tile(16, 16, 0, 8, 1)},
    "prefix_grad": {64: Tile(16, 32, 0, 4, 1), 128: Tile(16, 16, 0, 8, 1)},
}
TILES[chips.NO_TENSOR_CORES] = FLOAT32 | {"text_grad": {64: Tile(16, 16, 0, 8, 1)}}
# Wider heads are the reference's, in both directions: whole rows of q, k and v lie in a tile, and
# would take 200 KB of shared memory and more. So are those of float32, which x is widened to where
# there are no tensor cores, in 64 KB.
MAX_SIZE, MAX_SIZE_IN_64_KB = 256, 128


def has_room(name: str, dtype: torch.dtype, size: int) -> bool:
    """Whether the architecture ``name`` has the shared memory that heads of ``size`` take."""
    float32 = dtype is torch.float32 or name == chips.NO_TENSOR_CORES
    little = float32 and chips.arch(name).shared <= 64 * 1024
    return size <= (MAX_SIZE_IN_64_KB if little else MAX_SIZE)


def tile(name: str, kernel: str, dtype: torch.dtype, block_d: int, *, has_mask: bool) -> Tile:
    """The shipped tile of ``kernel`` on the architecture ``name``, for heads up to ``block_d``."""
    tiles = FLOAT32 if dtype is torch.float32 else TILES[name if name in TILES else "other"]
    by_size = tiles[kernel]
    if has_mask:
        by_size = tiles.get(f"{kernel}_masked", by_size)
    return by_size[max(size for size in by_size if size <= max(64, block_d))]
