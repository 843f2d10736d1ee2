"""Weights in the blocks of GGUF files (ggml: ``ggml-common.h``, ``dequantize_row_*``).

A block is a run of bytes for 32 or 256 elements of a row, its numbers little-endian. d and m are
float16; q are codes without a sign, s signed bytes, c and f codes of 6 bits:

    q8_0    d, 32 s                                w = s d
    q4_0    d, 16 bytes                            w = (q - 8) d
    q4_1    d, m, 16 bytes                         w = q d + m
    q4_K    d, m, 12 bytes of c and f, 128 bytes   w = q (d c[i]) - m f[i]     i = e // 32
    q6_K    128 bytes, 64 bytes, 16 s, d           w = (q - 32) (d s[i])       i = e // 16
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# How many elements a block has, and how many bytes.
BLOCKS: dict[str, tuple[int, int]] = {
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q4_K": (256, 144),
    "q6_K": (256, 210),
}


def dequantize_blocks(layout: str, codes: Tensor, n: int, k: int) -> Tensor:
    """The weight ``[n, k]`` in float32.

    Args:
        layout: a key of :data:`BLOCKS`, whose blocks must divide k.
        codes: uint8, contiguous, of any shape: the blocks row by row.
    """
    blocks = codes.reshape(-1, BLOCKS[layout][1])
    return _READ[layout](blocks).reshape(n, k)


def _halves(part: Tensor) -> Tensor:
    """Two bytes of each block as a number, ``[blocks, 1]``."""
    return part.contiguous().view(torch.float16).float()


def _signed(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.int8).float()


def _nibbles(part: Tensor, run: int) -> Tensor:
    """The low halves of each run of bytes, then their high halves: ``[blocks, ..., 2, run]``."""
    runs = part.unflatten(1, (-1, 1, run))
    return torch.cat((runs & 15, runs >> 4), 2)


def _q8_0(blocks: Tensor) -> Tensor:
    d, codes = blocks.split((2, 32), 1)
    return _signed(codes) * _halves(d)


def _q4_0(blocks: Tensor) -> Tensor:
    d, codes = blocks.split((2, 16), 1)
    return _halves(d) * (_nibbles(codes, 16).flatten(1).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    d, m, codes = blocks.split((2, 2, 16), 1)
    return _halves(d) * _nibbles(codes, 16).flatten(1).float() + _halves(m)


def _q4_k(blocks: Tensor) -> Tensor:
    d, m, packed, codes = blocks.split((2, 2, 12, 128), 1)
    # The first four of either lie in the low 6 bits of 4 bytes; the high 2 bits of those are the
    # high 2 of the other four, whose low 4 are the halves of the last 4 bytes.
    first, second, rest = packed.split(4, 1)
    scales = torch.cat((first & 63, (rest & 15) | (first >> 6 << 4)), 1)
    shifts = torch.cat((second & 63, (rest >> 4) | (second >> 6 << 4)), 1)
    scales, shifts = _halves(d) * scales.float(), _halves(m) * shifts.float()
    return scales[:, :, None] * _nibbles(codes, 32).reshape(-1, 8, 32).float() - shifts[:, :, None]


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, factors, d = blocks.split((128, 64, 16, 2), 1)
    low = _nibbles(low, 64).reshape(-1, 8, 32)
    high = high.reshape(-1, 2, 1, 32)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 2).reshape(-1, 8, 32)
    codes = (low | high << 4).reshape(-1, 16, 16).float() - 32
    return (_halves(d) * _signed(factors))[:, :, None] * codes


_READ: dict[str, Callable[[Tensor], Tensor]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q4_K": _q4_k,
    "q6_K": _q6_k,
}
