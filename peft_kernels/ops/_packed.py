"""Weights in the packed layouts of HQQ, GPTQ and AWQ, dequantised in PyTorch's own operations.

    w = (code - zero) scale

of one of a group's codes, its zero and its scale, which lie

- ``hqq_B``, B 8, 4, 3, 2 or 1 bits (Badri and Shaji 2023, "Half-Quadratic Quantization"): the
  weight's elements in groups ``[rows, columns]`` in rows or in columns, scales and zeros in floats
  ``[rows, 1]`` or ``[1, columns]``. Of the parts of equal rows of them the first lies in the
  highest bits of uint8 (of 3 bits ten parts in int32), the last in the lowest. Rounded in the
  scales' dtype, as there.
- ``gptq_B``, B 8, 4 or 2 (Frantar et al. 2023, "GPTQ"): codes int32 ``[k B/32, n]``, the first of k
  in the lowest bits; scales ``[groups, n]``, zeros int32 ``[groups, n B/32]``, and ``book`` the
  group of each of k. ``gptq_v1_B`` has zeros less 1.
- ``awq_4`` (Lin et al. 2024, "AWQ"): codes int32 ``[k, n/8]``, zeros int32 ``[groups, n/8]``, the
  columns of each eight in the order of ``AWQ_ORDER`` from the lowest bits, scales ``[groups, n]``,
  and ``block`` of k in a group.

Zeros stand in a weight's ``shifts``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peft_kernels.ops._quantized import QuantizedWeight

HQQ = {f"hqq_{bits}": bits for bits in (8, 4, 3, 2, 1)}
GPTQ = {f"gptq_{version}{bits}": bits for version in ("", "v1_") for bits in (8, 4, 2)}
AWQ = "awq_4"
PACKED = (*HQQ, *GPTQ, AWQ)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column is at nibble i
_COLUMN_AT = tuple(AWQ_ORDER.index(column) for column in range(8))


def dequantize_packed(
    layout: str, codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor | None, block: int,
    n: int, k: int,
) -> Tensor:  # fmt: skip
    """The weight ``[n, k]`` in float32."""
    if layout in HQQ:
        return _hqq(HQQ[layout], codes, scales, zeros, n * k).view(n, k)
    if layout in GPTQ:
        bits = GPTQ[layout]
        values = fields(codes, bits).movedim(-1, 1).flatten(0, 1)[:k]
        zeros = fields(zeros, bits).flatten(1)[:, :n] + int("v1" in layout)
    else:
        values, zeros = (fields(part, 4)[..., _COLUMN_AT].flatten(1) for part in (codes, zeros))
        groups = torch.arange(k, device=codes.device) // block
    return ((values - zeros[groups]) * scales.float()[groups]).T.contiguous()


def fields(packed: Tensor, bits: int) -> Tensor:
    """The parts of each int32, ``[..., 32 / bits]``, from the lowest bits."""
    by = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    return packed[..., None] >> by & (1 << bits) - 1


def _hqq(bits: int, codes: Tensor, scales: Tensor, zeros: Tensor, elements: int) -> Tensor:
    by = range(bits * (_hqq_parts(bits) - 1), -1, -bits)
    values = torch.cat([codes >> shift & (1 << bits) - 1 for shift in by])
    values = values[: elements // max(codes.shape[1], 1)]
    return ((values.to(scales.dtype) - zeros) * scales).float()


def _hqq_parts(bits: int) -> int:
    return 10 if bits == 3 else 8 // bits


# ---- checks ------------------------------------------------------------------------------------


def check_packed(weight: QuantizedWeight) -> None:
    """Raises a ValueError that names the part of it that isn't of its layout."""
    codes, scales, (n, k), block, groups, _, _, zeros, layout, _ = weight
    if zeros is None:
        raise ValueError(f"weight.shifts must be the zeros of {layout}; got None")
    if block < 1:
        raise ValueError(f"weight.block must be at least 1; got {block}")
    if layout in HQQ:
        _check_hqq(codes, scales, zeros, HQQ[layout], (n, k))
        return
    count = -(-k // block)
    if layout in GPTQ:
        words = 32 // GPTQ[layout]
        count = scales.shape[0] if scales.dim() else 0
        wanted = (-(-k // words), n), (count, -(-n // words))
        if groups is None or groups.shape != (k,) or groups.is_floating_point():
            raise ValueError(f"weight.book must be the group of each of k, [{k}] integers")
    else:
        if n % 8:
            raise ValueError(f"{layout} has eights of columns, by which n = {n} can't be divided")
        wanted = (k, n // 8), (count, n // 8)
    for name, given, shape in zip(("codes", "shifts"), (codes, zeros), wanted, strict=True):
        if given.dtype is not torch.int32 or given.shape != shape:
            raise ValueError(
                f"weight.{name} must be {list(shape)} int32 in {layout}; "
                f"got {list(given.shape)}, {given.dtype}"
            )
    if not scales.is_floating_point() or scales.shape != (count, n):
        raise ValueError(
            f"weight.scales must be {[count, n]} floats in {layout}; "
            f"got {list(scales.shape)}, {scales.dtype}"
        )


def _check_hqq(codes, scales, zeros, bits: int, shape: tuple[int, int]) -> None:
    dtype = torch.int32 if bits == 3 else torch.uint8
    if codes.dtype is not dtype or codes.dim() != 2:
        raise ValueError(
            f"weight.codes must be [rows, columns] {dtype} in hqq_{bits}; "
            f"got {list(codes.shape)}, {codes.dtype}"
        )
    columns = codes.shape[1]
    rows = shape[0] * shape[1] // max(columns, 1)
    room = codes.shape[0] * _hqq_parts(bits)
    if rows * columns != shape[0] * shape[1] or not rows <= room < rows + _hqq_parts(bits):
        raise ValueError(
            f"weight.codes must hold {list(shape)} elements of {bits} bits; "
            f"got {list(codes.shape)}, {codes.dtype}"
        )
    for name, given in (("scales", scales), ("shifts", zeros)):
        if tuple(given.shape) not in ((rows, 1), (1, columns)) or given.dtype is not scales.dtype:
            raise ValueError(
                f"weight.{name} must be [{rows}, 1] or [1, {columns}] in hqq_{bits}; "
                f"got {list(given.shape)}, {given.dtype}"
            )
