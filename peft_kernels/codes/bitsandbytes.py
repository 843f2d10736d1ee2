"""bitsandbytes' layers of 4 and 8 bits.

4 bits as of Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs". The weight alone
is in codes: where bitsandbytes rounds x to int8 as well, x is taken as it is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.codes.reading import NOT_YET, Reader
from peft_kernels.ops import NestedScales, QuantizedWeight
from peft_kernels.ops._quantize import book_of

PACKED = "codes packed for bfloat16"
OUTLIERS = "outliers beyond a threshold"
LOST = "8-bit codes whose scales fully_shard has lost"
# Of a layer: whether evaluation may pack its codes in place, for a product in bfloat16.
_PACKS = "support_avx512bf16_for_cpu"


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
    quantised = _state_of(module, weight)
    if quantised is None:
        return NOT_YET
    if getattr(quantised, "packing_format_for_cpu", False):
        return PACKED
    nested = None
    if quantised.nested:
        own = quantised.state2
        nested = NestedScales(own.absmax, own.code, own.blocksize, quantised.offset.float())
    n, k = quantised.shape
    codes, block, scales = weight.data.view(torch.uint8), quantised.blocksize, quantised.absmax
    book = quantised.code
    if book.dtype is not torch.float32:  # made, as a loaded offset is, in another default dtype
        book = book_of(quantised.quant_type).to(codes.device)  # which the library doesn't read
    if scales.dim() == 2:  # as a state dict's unpacking leaves those that weren't nested
        scales = scales.T.reshape(-1)
    return QuantizedWeight(codes, scales, (n, k), block, book, nested=nested)


def _state_of(module: Any, weight: Any) -> Any:
    """What says what the codes mean: the layer's own is left where a weight was made anew."""
    found = getattr(weight, "quant_state", None)
    return module.quant_state if found is None else found


def _bytes_of(module: Any) -> QuantizedWeight | str:
    kept, weight = module.state, module._parameters["weight"]
    if kept.has_fp16_weights:
        return NOT_YET
    if kept.threshold:
        return OUTLIERS
    if kept.CB is None and not hasattr(weight, "CB"):
        return LOST
    # Until the first call of bitsandbytes' own the weight has them, then the layer's state.
    codes, scales = (weight.CB, weight.SCB) if kept.CB is None else (kept.CB, kept.SCB)
    if codes is None:
        return NOT_YET
    n, k = codes.shape
    return QuantizedWeight(codes, scales, (n, k), k, unit=1 / 127)


def dtype_of(module: Any) -> torch.dtype:
    """4 bits keep it; of 8 the bias has it."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if not _is_in_bytes(type(module)):
        state = _state_of(module, weight)
        return getattr(state, "original_dtype", state.dtype)  # packed it says another
    return torch.float32 if bias is None else bias.dtype


def requantised(module: Any, kind: type, values: Tensor) -> tuple[nn.Parameter, dict[str, Any]]:
    """By bitsandbytes itself, in blocks, books and scales like the layer's."""
    own, weight = sys.modules["bitsandbytes"].nn, module._parameters["weight"]
    if _is_in_bytes(kind):
        made = own.Int8Params(values, requires_grad=False)._quantize(values.device)
        state = copy.copy(module.state)
        state.CB = state.SCB = None
        return made, {"state": state}
    old = _state_of(module, weight)
    made = own.Params4bit(
        values.to(old.dtype),
        blocksize=old.blocksize,
        compress_statistics=old.nested,
        quant_type=old.quant_type,
        quant_storage=weight.dtype,
    )._quantize(values.device)
    return made, {"quant_state": made.quant_state}


def restate(module: Any, kind: type) -> None:
    """For the library's own state dict, and for torch's walk along the names in it."""
    weight = module._parameters["weight"]
    if _is_in_bytes(kind) or getattr(weight, "quant_state", None) is not None:
        return
    state = weight.quant_state = module.quant_state
    for name, value in state.as_dict(packed=True).items():
        if "." not in name:
            setattr(weight, name, value)


def take_scales(
    module: Any,
    kind: type,
    state_dict: Mapping[str, Any],
    prefix: str,
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Of 4 bits ``weight.absmax`` and so on, of 8 ``SCB``: without them codes mean nothing."""
    if f"{prefix}weight" not in state_dict:
        return
    take = _take_bytes if _is_in_bytes(kind) else _take_nibbles
    keys = take(module, state_dict, prefix)
    if not keys:
        errors.append(f"{prefix}weight is in codes, and the state dict must have its scales too")
    unexpected[:] = [key for key in unexpected if key not in keys]


def _take_nibbles(module: Any, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    start = f"{prefix}weight."
    found = {key[len(start) :]: value for key, value in state_dict.items() if key.startswith(start)}
    if not found:
        return []
    weight = module._parameters["weight"]
    kind = sys.modules["bitsandbytes"].functional.QuantState
    weight.quant_state = module.quant_state = kind.from_dict(dict(found), weight.device)
    return [start + key for key in found]


def _take_bytes(module: Any, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    if (key := f"{prefix}SCB") not in state_dict:
        return []
    kept, weight = module.state, module._parameters["weight"]
    codes, scales = (weight.CB, weight.SCB) if kept.CB is None else (kept.CB, kept.SCB)
    codes.copy_(weight.data)  # a copy of the layer has them twice
    scales.copy_(state_dict[key])
    return [key, f"{prefix}weight_format"]


def _is_in_bytes(kind: type) -> bool:
    return kind is sys.modules["bitsandbytes"].nn.Linear8bitLt


def keep_codes(layer: Any) -> bool:
    """Has evaluation of the layer leave the codes as they are; whether it had to unpack them."""
    if _PACKS not in layer.__dict__:
        return False
    layer.__dict__[_PACKS] = False
    state = _state_of(layer, layer.weight)
    packed = getattr(state, "packing_format_for_cpu", False)
    if packed:
        layer.state_dict()  # which unpacks them in place, but scales only where they were nested
        if state.absmax.dim() == 2:
            state.absmax = state.absmax.T.reshape(-1).float()
    return packed


def give_back(layer: nn.Module) -> None:
    """Lets it pack them again."""
    if _PACKS in layer.__dict__:
        layer.__dict__[_PACKS] = sys.modules["bitsandbytes"].functional.has_avx512bf16()
