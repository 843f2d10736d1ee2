"""Weights into codes, as bitsandbytes puts them there: the same codes and the same scales.

A block's scale is its largest magnitude, and each of its elements takes the code whose value is
nearest to element / scale (Dettmers et al. 2023, "QLoRA", section 3 and appendix E). Nested, the
scales less their mean are put into codes themselves, in blocks of 256 and the 8-bit dynamic type of
Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning". int8 has a scale for each
row, of the weight rounded to float16 (Dettmers et al. 2022, "LLM.int8()"). fp8 is e4m3
(Micikevicius et al. 2022, "FP8 Formats for Deep Learning"), of which the largest magnitude that
shares a scale is 448; of float32 with the codes and scales of torchao.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peft_kernels.ops._quantized import NestedScales, QuantizedWeight

KINDS = ("nf4", "fp4", "int8", "fp8")
SHARES = ("tensor", "row", "block")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FP8_BLOCK = 128
SCALES_BLOCK = 256
STEPS = 65535  # between -1 and 1, to one of which bitsandbytes rounds before it looks for a code
_SMALLEST = 1e-38  # in place of the scale of a block of zeros, to divide by

# QLoRA, appendix E: quantiles of the normal distribution, of which each stands for as many weights.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# A sign, two bits of exponent and one of mantissa, in the order of their bits; over 12.
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))


def quantize(
    weight: Tensor, kind: str = "nf4", *, block: int = 64, nested: bool = True, by: str = "row"
) -> QuantizedWeight:
    """A weight in codes of 4 or 8 bits.

    Args:
        weight: ``[n, k]``, float32, bfloat16 or float16.
        kind: ``"nf4"``, ``"fp4"``, ``"int8"`` or ``"fp8"``.
        block: of 4-bit codes, how many elements share a scale: a power of 2 from 32 to 4096.
        nested: of 4-bit codes, whether scales are in codes of 8 bits themselves.
        by: of fp8, what shares a scale: ``"tensor"``, ``"row"`` or ``"block"`` of 128 x 128.

    Raises:
        TypeError, ValueError: what can't be done, by the argument's name.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [n, k]; got shape {tuple(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight must be float32, bfloat16 or float16; got {weight.dtype}")
    if kind == "int8":
        return _in_bytes(weight.detach())
    if kind == "fp8":
        return _in_float8(weight.detach(), by)
    if block not in BLOCKS:
        raise ValueError(f"block must be a power of 2 from 32 to 4096; got {block}")
    return _in_nibbles(weight.detach(), kind, block, nested)


def _in_bytes(weight: Tensor) -> QuantizedWeight:
    n, k = weight.shape
    if not k:
        return QuantizedWeight(weight.to(torch.int8), weight.new_zeros(0).float(), (n, k), 1)
    half = weight.to(torch.float16).contiguous()
    scales = half.abs().amax(1).float()
    if not (scales.is_meta or scales.isfinite().all()):
        raise ValueError(
            f"weight must be within {torch.finfo(torch.float16).max:.0f} for int8, which rounds it "
            f"to float16; got {weight.abs().amax().item()}"
        )
    codes = torch.round(half * (127.0 / scales[:, None])).to(torch.int8)
    return QuantizedWeight(codes, scales, (n, k), k, unit=1 / 127)


def _in_float8(weight: Tensor, by: str) -> QuantizedWeight:
    if by not in SHARES:
        raise ValueError(f"by must be one of {', '.join(SHARES)}; got {by!r}")
    (n, k), largest = weight.shape, torch.finfo(torch.float8_e4m3fn).max
    rows, columns = {"tensor": (n, k), "row": (1, k), "block": (FP8_BLOCK, FP8_BLOCK)}[by]
    rows, columns = max(rows, 1), max(columns, 1)
    wide = torch.nn.functional.pad(weight.float(), (0, -k % columns, 0, -n % rows))
    blocks = wide.view(-(-n // rows), rows, -(-k // columns), columns)
    scales = blocks.abs().amax((1, 3), keepdim=True) / largest
    codes = (blocks / scales.clamp(min=_SMALLEST)).clamp(-largest, largest).view_as(wide)[:n, :k]
    codes = codes.contiguous().to(torch.float8_e4m3fn)
    scales = scales.flatten()
    if by == "tensor":
        return QuantizedWeight(codes, scales, (n, k), max(n * k, 1))
    return QuantizedWeight(codes, scales, (n, k), columns, block_rows=rows)


def _in_nibbles(weight: Tensor, kind: str, block: int, nested: bool) -> QuantizedWeight:
    n, k = weight.shape
    book = book_of(kind).to(weight.device)
    blocks, count = _blocks_of(weight.float().flatten(), block)
    scales = blocks.abs().amax(1)
    parts = (blocks * (1.0 / scales.clamp(min=_SMALLEST))[:, None]).clamp(-1, 1).flatten()[:count]
    order = torch.argsort(book)
    bounds = (book[order[:-1]] + book[order[1:]]) / 2
    codes = order[torch.bucketize(parts, bounds)].to(torch.uint8)
    if count % 2:
        codes = torch.cat((codes, codes.new_full((1,), _code_of_zero(book))))
    packed = (codes[::2] << 4 | codes[1::2])[:, None]
    if not nested:
        return QuantizedWeight(packed, scales, (n, k), block, book)
    scale_codes, own = _in_dynamic_codes(scales)
    return QuantizedWeight(packed, scale_codes, (n, k), block, book, nested=own)


def _in_dynamic_codes(scales: Tensor) -> tuple[Tensor, NestedScales]:
    offset = scales.mean()
    book = _dynamic_book().to(scales.device)
    blocks, count = _blocks_of(scales - offset, SCALES_BLOCK)
    largest = blocks.abs().amax(1)
    parts = (blocks * (1.0 / largest.clamp(min=_SMALLEST))[:, None]).flatten()[:count]
    parts = torch.floor((parts + 1) * (STEPS / 2) + 0.5) * (2 / STEPS) - 1
    codes = torch.bucketize(parts, (book[:-1] + book[1:]) / 2)
    codes.masked_fill_((largest == 0).repeat_interleave(SCALES_BLOCK)[:count], 0)
    return codes.to(torch.uint8), NestedScales(largest, book, SCALES_BLOCK, offset)


def _blocks_of(flat: Tensor, block: int) -> tuple[Tensor, int]:
    """``[blocks, block]``, the last one filled up with zeros, and how many elements there are."""
    missing = -flat.numel() % block
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, block), flat.numel()


def _code_of_zero(book: Tensor) -> int:
    return int((book == 0).nonzero()[0])


@functools.cache
def book_of(kind: str) -> Tensor:
    """What the codes of nf4 or fp4 mean."""
    return torch.tensor(NF4 if kind == "nf4" else FP4, dtype=torch.float32)


@functools.cache
def _dynamic_book() -> Tensor:
    """The 256 values of the dynamic type: 7 decades of either sign, each with twice the steps."""
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = 10.0 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
