"""HQQLinear of the hqq package, of 8, 4, 3, 2 or 1 bits."""

from __future__ import annotations

import sys
from typing import Any

from peft_kernels.codes.reading import NOT_YET, Reader
from peft_kernels.ops import QuantizedWeight

ELSEWHERE = "scales that are in codes, or kept elsewhere"
UNPACKED = "codes that aren't packed"


def readers() -> dict[type, Reader]:
    """What reads which layer of the library's."""
    library: Any = sys.modules.get("hqq.core.quantize")
    return {} if library is None else {library.HQQLinear: _groups_of}


def _groups_of(module: Any) -> QuantizedWeight | str:
    meta = module.meta
    if module.W_q is None or not meta:
        return NOT_YET
    scales, zeros = meta.get("scale"), meta.get("zero")
    if scales is None or zeros is None:
        return ELSEWHERE
    if meta["packing"] is None:
        return UNPACKED
    codes = module.W_q.data
    if meta["view_as_float"]:
        codes = codes.view(meta["unpack_view_dtype"])
    n, k = meta["shape"]
    layout = f"hqq_{meta['packing'][0]}"  # as they are packed: 5 bits in 8
    block = n * k // max(scales.numel(), 1)
    return QuantizedWeight(codes, scales, (n, k), block, shifts=zeros, layout=layout)
