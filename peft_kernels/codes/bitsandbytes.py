"""bitsandbytes' layers of 4 and 8 bits.

4 bits as of Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs". The weight alone
is in codes: where bitsandbytes rounds x to int8 as well, x is taken as it is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from peft_kernels.codes.reading import NOT_YET, Reader
from peft_kernels.ops import NestedScales, QuantizedWeight

PACKED = "codes packed for bfloat16"
OUTLIERS = "outliers beyond a threshold"


def readers() -> dict[type, Reader]:
    """What reads which layer of the library's."""
    library: Any = sys.modules.get("bitsandbytes")
    if library is None:
        return {}
    own = library.nn
    four = dict.fromkeys((own.Linear4bit, own.LinearNF4, own.LinearFP4), _nibbles_of)
    return {**four, own.Linear8bitLt: _bytes_of}


def _nibbles_of(module: Any) -> QuantizedWeight | str:
    weight = module._parameters["weight"]
    quantised = getattr(weight, "quant_state", None)
    if quantised is None:
        return NOT_YET
    if getattr(quantised, "packing_format_for_cpu", False):
        return PACKED
    nested = None
    if quantised.nested:
        own = quantised.state2
        nested = NestedScales(own.absmax, own.code, own.blocksize, quantised.offset)
    n, k = quantised.shape
    codes, block = weight.data.view(torch.uint8), quantised.blocksize
    return QuantizedWeight(codes, quantised.absmax, (n, k), block, quantised.code, nested=nested)


def _bytes_of(module: Any) -> QuantizedWeight | str:
    kept, weight = module.state, module._parameters["weight"]
    if kept.has_fp16_weights:
        return NOT_YET
    if kept.threshold:
        return OUTLIERS
    # Until the first call of bitsandbytes' own the weight has them, then the layer's state.
    codes, scales = (weight.CB, weight.SCB) if kept.CB is None else (kept.CB, kept.SCB)
    if codes is None:
        return NOT_YET
    n, k = codes.shape
    return QuantizedWeight(codes, scales, (n, k), k, unit=1 / 127)
