"""PEFT's LoRA over bitsandbytes' layers of 4 and 8 bits: the kernel reads codes where they lie.

x decides in which dtype is computed, with sums in float32, whatever ``compute_dtype`` says
(Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"). The weight alone is in
codes: where bitsandbytes rounds x to int8 as well, x is taken as it is.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels.integrations.peft import state
from peft_kernels.integrations.peft.several import add, sum_of_biases, together
from peft_kernels.integrations.served import count, is_plain, what_is_called
from peft_kernels.ops import NestedScales, QuantizedWeight, lora_linear

KERNEL = "lora_linear"
PACKED = "base_layer: codes packed for bfloat16"
NOT_YET = "base_layer: a weight that isn't in codes yet"
# Of a layer of bitsandbytes': whether evaluation may pack its codes in place, for a product in
# bfloat16, after which training has no gradient for x.
_PACKS = "support_avx512bf16_for_cpu"


class Base(NamedTuple):
    """The layer below."""

    weight: QuantizedWeight
    bias: Tensor | None


def read_base(layer: nn.Module) -> Base | str:
    """The weight in codes and the bias of the layer below, or why a kernel can't take them."""
    module: Any = layer._modules["base_layer"]
    kinds = _kinds()
    if type(module) not in kinds or not is_plain(module) or _has_any_global_hook():
        return f"base_layer: {what_is_called(module, kinds)}"
    found = _bytes_of(module) if type(module) is kinds[-1] else _nibbles_of(module)
    return found if isinstance(found, str) else Base(found, module._parameters["bias"])


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


def read(layer: nn.Module, x: Tensor) -> tuple[Base, list[state.Adapter]] | str:
    """What kernels need to serve a call with x, or why they can't."""
    alone = state.why_base_alone(layer)
    if alone is not None:
        return alone
    found = _read_parts(layer)
    if isinstance(found, str):
        return found
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return state.why_not_in(dtype, found[1]) or found


def why_not(layer: nn.Module) -> str | None:
    """Why a call with x in the adapters' dtype would be PEFT's own, or None."""
    found = _read_parts(layer)
    return found if isinstance(found, str) else state.why_not_in(found[1][0].a.dtype, found[1])


def _read_parts(layer: nn.Module) -> tuple[Base, list[state.Adapter]] | str:
    base = read_base(layer)
    if isinstance(base, str):
        return base
    active = layer.__dict__["_active_adapter"]
    adapters = state.read_adapters(layer, (active,) if isinstance(active, str) else active)
    if isinstance(adapters, str):
        return adapters
    if any(adapter.magnitude is not None for adapter in adapters):
        return "DoRA over codes"
    return base, adapters


# ---- layers ------------------------------------------------------------------------------------


class _OverCodes(nn.Module):
    """PEFT's layer of this name, on :func:`peft_kernels.ops.lora_linear` over a weight in codes."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = "other arguments" if args or kwargs else read(self, x)
        if isinstance(found, str):
            count(self, found)
            return super().forward(x, *args, **kwargs)
        count(self, KERNEL)
        base, adapters = found
        first, others = together(adapters)
        dtype = x.dtype if base.bias is None else base.bias.dtype
        bias = sum_of_biases(base.bias, adapters, dtype)
        y = lora_linear(
            x,
            base.weight,
            first.a,
            first.b,
            bias=None if bias is None else bias.to(x.dtype),
            scale=first.scale,
            dropout_p=first.dropout_p,
        )
        for adapter in others:
            add(y, x, adapter)
        return y.to(x.dtype)


SERVED: dict[type, type] = {}

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

    class Linear4bit(_OverCodes, PeftLinear4bit):
        __doc__ = _OverCodes.__doc__

    SERVED[PeftLinear4bit] = Linear4bit

if is_bnb_available():
    from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear8bitLt

    class Linear8bitLt(_OverCodes, PeftLinear8bitLt):
        __doc__ = _OverCodes.__doc__

    SERVED[PeftLinear8bitLt] = Linear8bitLt


def is_served(layer: nn.Module) -> bool:
    """Whether this is one of the layers above."""
    return type(layer) in SERVED.values()


def keep_codes(layer: nn.Module) -> None:
    """Has evaluation of the layer below leave its codes as they are, in PEFT's own calls too."""
    if is_served(layer):
        base: Any = layer.get_base_layer()  # type: ignore[operator]
        if _PACKS in base.__dict__:
            base.__dict__[_PACKS] = False


def give_back(layer: nn.Module) -> None:
    """Lets it pack them again."""
    if is_served(layer):
        base: Any = layer.get_base_layer()  # type: ignore[operator]
        if _PACKS in base.__dict__:
            base.__dict__[_PACKS] = sys.modules["bitsandbytes"].functional.has_avx512bf16()


def _kinds() -> tuple[type, ...]:
    library: Any = sys.modules.get("bitsandbytes")
    if library is None:
        return ()
    own = library.nn
    return own.Linear4bit, own.LinearNF4, own.LinearFP4, own.Linear8bitLt
