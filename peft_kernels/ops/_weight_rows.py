"""A weight in codes some rows at a time, and what DoRA's norm is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from peft_kernels.ops._quantized import (
    PLANES,
    QuantizedWeight,
    dequantize,
    has_kernel,
    scales_of_codes,
)
from peft_kernels.ops.lora_linear import linear_of_codes

_ELEMENTS = 1 << 20  # about so many are widened at once


def values_by_rows(weight: QuantizedWeight) -> Iterator[Tensor]:
    """Its values ``[.., k]`` float32, all rows in their order; of packed layouts all at once."""
    n, k = weight.shape
    if not has_kernel(weight):
        yield dequantize(weight)
        return
    step, part = (_rows_of_planes if weight.layout == PLANES else _rows_of_blocks)(weight)
    rows = max(_ELEMENTS // max(k * step, 1), 1) * step
    for first in range(0, n, rows):
        yield dequantize(part(first, min(first + rows, n)))


def _rows_of_blocks(weight: QuantizedWeight):
    """Of GGUF's layouts, whose rows are whole blocks."""
    n, k = weight.shape
    rows = weight.codes.view(n, -1)
    return 1, lambda i, j: weight._replace(codes=rows[i:j], shape=(j - i, k))


def _rows_of_planes(weight: QuantizedWeight):
    """How many rows are whole blocks and whole bytes, and what takes such rows out."""
    codes, scales, (n, k), block, book, _, nested, shifts, _, block_rows = weight
    if nested is not None:
        scales = scales_of_codes(scales, *nested)
    codes, a_byte = codes.flatten(), 1 if book is None else 2
    planes = [None if plane is None else plane.flatten() for plane in (scales, shifts)]
    if block_rows > 1:
        step, columns = block_rows, -(-k // block)

        def blocks(i: int, j: int) -> slice:
            return slice(i // step * columns, -(-j // step) * columns)
    else:
        if block > k and block % k == 0:  # a scale of several rows becomes one of each
            alike = block // k
            planes = [p if p is None else p.repeat_interleave(alike)[:n] for p in planes]
            block = k
        step = block // math.gcd(block, k)

        def blocks(i: int, j: int) -> slice:
            return slice(i * k // block, -(-j * k // block))

    if step * k % a_byte:
        step *= 2

    def part(i: int, j: int) -> QuantizedWeight:
        own = slice(i * k // a_byte, -(-j * k // a_byte))
        scales, shifts = (None if p is None else p[blocks(i, j)] for p in planes)
        assert scales is not None
        return weight._replace(
            codes=codes[own], scales=scales, shape=(j - i, k), block=block, nested=None,
            shifts=shifts,
        )  # fmt: skip

    return step, part


@torch.no_grad()
def squares_of_codes(weight: QuantizedWeight) -> Tensor:
    """The squared norms of the rows, ``[n]`` float32."""
    found = [torch.linalg.vector_norm(rows, dim=1) for rows in values_by_rows(weight)]
    return torch.cat(found).square()


@torch.no_grad()
def cross_of_codes(weight: QuantizedWeight, a: Tensor) -> Tensor:
    """``W A^T``, ``[n, r]`` float32."""
    return linear_of_codes(a.float(), weight).T
