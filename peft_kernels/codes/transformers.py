"""transformers' FP8Linear: e4m3 with a scale for all, or for each block of rows and columns.

The weight alone is in codes: where transformers rounds x to e4m3 as well, x is taken as it is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from peft_kernels.codes.reading import NOT_YET, Reader
from peft_kernels.ops import QuantizedWeight

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
