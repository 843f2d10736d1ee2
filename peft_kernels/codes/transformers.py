"""transformers' FP8Linear: e4m3 with a scale for all, or for each block of rows and columns.

The weight alone is in codes: where transformers rounds x to e4m3 as well, x is taken as it is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.codes.reading import NOT_YET, Reader
from peft_kernels.ops import QuantizedWeight, quantize
from peft_kernels.ops._quantize import FP8_BLOCK

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def readers() -> dict[type, Reader]:
    """What reads which layer of the library's."""
    library: Any = sys.modules.get("transformers.integrations.finegrained_fp8")
    return {} if library is None else {library.FP8Linear: _floats_of}


def _floats_of(module: Any) -> QuantizedWeight | str:
    weight, scales = module._parameters["weight"], module._parameters["weight_scale_inv"]
    if weight.dtype is not torch.float8_e4m3fn or scales is None:
        return NOT_YET
    (n, k), scales = weight.shape, scales.data
    rows, columns = module.block_size or (1, n * k)
    if scales.dtype not in _FLOATS:
        scales = scales.float()  # powers of two in e8m0
    return QuantizedWeight(weight.data, scales, (n, k), columns, block_rows=rows)


def requantised(module: Any, kind: type, values: Tensor) -> tuple[nn.Parameter, dict[str, Any]]:
    """By :func:`peft_kernels.ops.quantize`, which knows blocks of 128 x 128 and a common scale."""
    scales = module._parameters["weight_scale_inv"]
    blocks = module.block_size
    if blocks is not None and tuple(blocks) != (FP8_BLOCK, FP8_BLOCK):
        raise TypeError(
            f"requantize must be False over blocks of {list(blocks)}: those of {FP8_BLOCK} x "
            f"{FP8_BLOCK} can be made anew"
        )
    if scales.dtype not in _FLOATS:
        raise TypeError(f"requantize must be False over scales in {scales.dtype}: they are read")
    made = quantize(values, "fp8", by="tensor" if blocks is None else "block")
    new = nn.Parameter(made.scales.to(scales.dtype).view(scales.shape), requires_grad=False)
    return nn.Parameter(made.codes, requires_grad=False), {"weight_scale_inv": new}
