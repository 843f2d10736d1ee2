"""PEFT's LoRA layers over weights in codes: the kernel reads codes where they lie.

x decides in which dtype is computed, with sums in float32, whatever ``compute_dtype`` says
(Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from peft_kernels._library import backend_of
from peft_kernels.codes import layers as codes
from peft_kernels.integrations.peft import state
from peft_kernels.integrations.peft.codes import bitsandbytes, gptqmodel, hqq, torchao
from peft_kernels.integrations.peft.codes.bases import Base, read_base
from peft_kernels.integrations.peft.linear import KERNEL, linear
from peft_kernels.integrations.served import count
from peft_kernels.ops._quantized import has_kernel

LIBRARIES = (bitsandbytes, torchao, hqq, gptqmodel)


def read(
    layer: nn.Module, x: Tensor, names: Sequence[str] | None
) -> tuple[Base, list[state.Adapter]] | str:
    """What kernels need to serve a call with x, or why they can't.

    Args:
        names: the adapter of each row, or None where the active ones are everybody's.
    """
    alone = state.why_base_alone(layer)
    if alone is not None:
        return alone
    found = _read_parts(layer, names)
    if isinstance(found, str):
        return found
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    fault = state.why_not_in(dtype, found[1])
    if fault is None and names is not None:
        fault = state.why_not_by_rows(found[1])
    return fault or found


def why_not(layer: nn.Module) -> str | None:
    """Why a call with x in the adapters' dtype would be PEFT's own, or None."""
    found = _read_parts(layer, None)
    return found if isinstance(found, str) else state.why_not_in(found[1][0].a.dtype, found[1])


def backend(layer: nn.Module) -> str:
    """What serves the layer's calls, where they are the kernel's."""
    base = read_base(layer)
    if isinstance(base, str) or not has_kernel(base.weight):
        return "reference"
    return backend_of(KERNEL, base.weight.codes.device, torch.float32)


def _read_parts(
    layer: nn.Module, names: Sequence[str] | None
) -> tuple[Base, list[state.Adapter]] | str:
    base = read_base(layer)
    if isinstance(base, str):
        return base
    active = layer.__dict__["_active_adapter"] if names is None else dict.fromkeys(names)
    adapters = state.read_adapters(layer, (active,) if isinstance(active, str) else active)
    if isinstance(adapters, str):
        return adapters
    return base, adapters


# ---- layers ------------------------------------------------------------------------------------


class _OverCodes(nn.Module):
    """PEFT's layer of this name, on :func:`peft_kernels.ops.lora_linear` over a weight in codes."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        if args or len(kwargs) > (names is not None):
            found: tuple[Base, list[state.Adapter]] | str = "other arguments"
        else:
            found = read(self, x, names)
        if isinstance(found, str):
            count(self, found)
            return super().forward(x, *args, **kwargs)
        base, adapters = found
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return linear(self, x, base._replace(bias=bias), adapters, names).to(x.dtype)


def _over_codes(kind: type) -> type:
    """The class of PEFT's on the kernel."""
    members = {"__doc__": _OverCodes.__doc__, "__module__": __name__}
    return type(kind.__name__, (_OverCodes, kind), members)


SERVED = {kind: _over_codes(kind) for library in LIBRARIES for kind in library.LAYERS}
# PEFT has layers of their own for some libraries; over the others' stands its plain one.
PLAIN: dict[type, type] = {PeftLinear: _over_codes(PeftLinear)}
# A pickle finds a class by its name in its module.
globals().update({ours.__name__: ours for ours in (*SERVED.values(), *PLAIN.values())})


def class_for(layer: nn.Module) -> type | None:
    """The class above for PEFT's plain layer, where what is below it is in codes."""
    ours = PLAIN.get(type(layer))
    base = layer._modules.get("base_layer")
    return ours if ours is not None and base is not None and codes.is_in_codes(base) else None


def is_served(layer: nn.Module) -> bool:
    """Whether this is one of the layers above."""
    return type(layer) in SERVED.values() or type(layer) in PLAIN.values()
