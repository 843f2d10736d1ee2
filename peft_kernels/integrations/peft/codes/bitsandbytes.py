"""bitsandbytes' layers of 4 and 8 bits.

The weight alone is in codes: where bitsandbytes rounds x to int8 as well, x is taken as it is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from torch import nn

from peft_kernels.integrations.peft.codes.reading import NOT_YET, Reader
from peft_kernels.ops import NestedScales, QuantizedWeight

PACKED = "base_layer: codes packed for bfloat16"
# Of a layer of bitsandbytes': whether evaluation may pack its codes in place, for a product in
# bfloat16, after which training has no gradient for x.
_PACKS = "support_avx512bf16_for_cpu"

LAYERS: list[type] = []
if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    LAYERS.append(Linear4bit)
if is_bnb_available():
    from peft.tuners.lora.bnb import Linear8bitLt

    LAYERS.append(Linear8bitLt)


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
        return "base_layer: outliers beyond a threshold"
    # Until the first call of bitsandbytes' own the weight has them, then the layer's state.
    codes, scales = (weight.CB, weight.SCB) if kept.CB is None else (kept.CB, kept.SCB)
    if codes is None:
        return NOT_YET
    n, k = codes.shape
    return QuantizedWeight(codes, scales, (n, k), k, unit=1 / 127)


def keep_codes(base: nn.Module) -> None:
    """Has evaluation of one of its layers leave the codes as they are, in PEFT's own calls too."""
    if _PACKS in base.__dict__:
        base.__dict__[_PACKS] = False


def give_back(base: nn.Module) -> None:
    """Lets it pack them again."""
    if _PACKS in base.__dict__:
        base.__dict__[_PACKS] = sys.modules["bitsandbytes"].functional.has_avx512bf16()
