"""Random weights in codes of every layout, and what multiplies them."""

import torch

from peft_kernels.ops import NestedScales, QuantizedWeight
from peft_kernels.ops._gguf_blocks import BLOCKS

BOOK = torch.linspace(-1, 1, 16) ** 3


PLANES = ["flat", "nested", "shifted", "int8", "int8 by 16", "e4m3", "e4m3 by 16 x 16"]


def weight_of(n, k, *, block=64, kind="nested"):
    """Random codes: of 4 bits, with scales in codes too or with shifts, or of 8 bits."""
    torch.manual_seed(n + k)
    if kind in BLOCKS:
        return in_blocks(n, k, kind)
    if kind == "int8":
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        return QuantizedWeight(codes, torch.rand(n) + 0.5, (n, k), k, unit=1 / 127)
    if kind == "int8 by 16":
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        scales, shifts = torch.rand(2, -(-n * k // 16)).div(64).to(torch.bfloat16)
        return QuantizedWeight(codes, scales, (n, k), 16, shifts=shifts)
    if kind == "e4m3":
        codes = torch.randn(n, k).to(torch.float8_e4m3fn)
        return QuantizedWeight(codes, torch.rand(()) + 0.5, (n, k), n * k)
    if kind == "e4m3 by 16 x 16":
        codes = torch.randn(n, k).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-n // 16), -(-k // 16)) + 0.5
        return QuantizedWeight(codes, scales, (n, k), 16, block_rows=16)
    blocks = -(-n * k // block)
    codes = torch.randint(0, 256, (-(-n * k // 2), 1), dtype=torch.uint8)
    if kind == "flat":
        return QuantizedWeight(codes, torch.rand(blocks) + 0.5, (n, k), block, BOOK)
    if kind == "shifted":
        scales, shifts = torch.rand(2, blocks).half() + 0.5
        return QuantizedWeight(codes, scales, (n, k), block, BOOK, shifts=shifts)
    scale_codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    book = torch.linspace(-1, 1, 256)
    nested = NestedScales(torch.rand(-(-blocks // 256)) + 0.5, book, 256, torch.tensor(2.0))
    return QuantizedWeight(codes, scale_codes, (n, k), block, BOOK, nested=nested)


def in_blocks(n, k, layout):
    """Random blocks of GGUF's, with halves of ordinary size where their scales are."""
    elements, size = BLOCKS[layout]
    blocks = torch.randint(0, 256, (n * k // elements, size), dtype=torch.uint8)
    for at in {"q4_1": (0, 2), "q4_K": (0, 2), "q6_K": (208,)}.get(layout, (0,)):
        blocks[:, at : at + 2] = (torch.rand(len(blocks), 1) / 64).half().view(torch.uint8)
    return QuantizedWeight(blocks, torch.empty(0), (n, k), elements, layout=layout)


def problem(m, n, k, dtype=torch.float32, r=6):
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    return x, torch.randn(r, k).div(k**0.5), torch.randn(n, r), bias
