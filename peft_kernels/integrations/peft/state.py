"""A LoRA layer of PEFT's as a call finds it: what kernels need of it, or why they can't serve it.

PEFT changes layers in place, and whoever likes puts hooks on them, so that every call looks. What
is read is read from the dictionaries that modules keep it in, which costs less than their
``__getattr__``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from peft_kernels.integrations.peft.dora import read_magnitude
from peft_kernels.integrations.peft.whole import is_whole
from peft_kernels.integrations.served import WHOLE, is_plain, what_is_called

_BASES = (nn.Linear, Conv1D)
_MATRICES = (nn.Linear,)
_DROPOUTS = (nn.Identity, nn.Dropout)


class Base(NamedTuple):
    """The layer below."""

    weight: Tensor  # [n, k]
    bias: Tensor | None


class Adapter(NamedTuple):
    """An adapter of the layer."""

    name: str
    a: Tensor  # [r, k]
    b: Tensor  # [n, r]
    bias: Tensor | None  # [n], of B
    scale: float | Tensor
    dropout_p: float
    magnitude: Tensor | None = None  # [n], of DoRA


def read(
    layer: nn.Module, x: Tensor, names: Sequence[str] | None
) -> tuple[Base, list[Adapter]] | str:
    """What kernels need to serve a call with x, or why they can't.

    Args:
        names: the adapter of each row, or None where the active ones are everybody's.
    """
    alone = why_base_alone(layer)
    if alone is not None:
        return alone
    base = read_base(layer)
    if isinstance(base, str):
        return base
    active = layer.__dict__["_active_adapter"] if names is None else dict.fromkeys(names)
    adapters = read_adapters(layer, (active,) if isinstance(active, str) else active)
    if isinstance(adapters, str):
        return adapters
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif base.weight.dtype is not dtype:
        return f"x in {dtype} on a base in {base.weight.dtype}"
    fault = why_not_in(dtype, adapters) or _why_not_in_shards(x, base, adapters)
    if fault is None and names is not None:
        fault = why_not_by_rows(adapters)
    return fault or (base, adapters)


def why_base_alone(layer: nn.Module) -> str | None:
    """Why a call is one of the layer below, if it is."""
    state = layer.__dict__
    return (
        "disabled" if state["_disable_adapters"] else "merged" if state["merged_adapters"] else None
    )


def read_base(layer: nn.Module) -> Base | str:
    """The weight and the bias of the layer below, or why a kernel can't take them."""
    module: Any = layer._modules["base_layer"]
    if type(module) not in _BASES or not is_plain(module) or _has_any_global_hook():
        return f"base_layer: {what_is_called(module, _BASES)}"
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if not is_whole(weight, 2) or not (bias is None or is_whole(bias, 1)):
        return "base_layer: a weight that isn't a whole matrix"
    return Base(weight if type(module) is nn.Linear else weight.T, bias)


def read_adapters(layer: nn.Module, names: Iterable[str]) -> list[Adapter] | str:
    """Those of ``names`` that the layer has, or why a kernel can't take them."""
    children: Any = layer._modules
    state: Any = layer.__dict__
    found = []
    for name in names:
        a = children["lora_A"]._modules.get(name)
        if a is None:
            continue
        magnitude = read_magnitude(layer, name) if name in state["lora_variant"] else None
        if isinstance(magnitude, str):
            return magnitude
        b, dropout = children["lora_B"]._modules[name], children["lora_dropout"]._modules[name]
        if type(a) is not nn.Linear or not is_plain(a):
            return f"lora_A: {what_is_called(a, _MATRICES)}"
        if type(b) is not nn.Linear or not is_plain(b):
            return f"lora_B: {what_is_called(b, _MATRICES)}"
        if type(dropout) not in _DROPOUTS or not is_plain(dropout):
            return f"lora_dropout: {what_is_called(dropout, _DROPOUTS)}"
        bias = b._parameters["bias"]
        a, b = a._parameters.get("weight"), b._parameters.get("weight")
        if not (is_whole(a, 2) and is_whole(b, 2)):
            return "lora_A, lora_B: weights that aren't whole matrices"
        scale = state["scaling"][name]
        if not is_constant(scale):
            return "scaling: a tensor that isn't a constant"
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        found.append(Adapter(name, a, b, bias, scale, p, magnitude))
    return found or "no active adapter"


def why_not_in(dtype: torch.dtype, adapters: Sequence[Adapter]) -> str | None:
    """Why these can't be computed with, where x and the base's weight are in ``dtype``."""
    for adapter in adapters:
        own = adapter.a.dtype
        wide = own is torch.float32 and dtype is not torch.float64
        if own is not adapter.b.dtype or not (own is dtype or wide):
            return f"an adapter in {own} on a base in {dtype}"
        if adapter.dropout_p >= 1.0:
            return "dropout of everything"
        if adapter.magnitude is not None and (len(adapters) > 1 or adapter.bias is not None):
            return "DoRA beside other adapters" if len(adapters) > 1 else "DoRA with lora_bias"
    return None


def why_not_by_rows(adapters: Sequence[Adapter]) -> str | None:
    """Why these can't be each of some rows."""
    if any(adapter.bias is not None for adapter in adapters):
        return "adapter_names with lora_bias"
    if adapters[0].magnitude is not None:
        return "adapter_names with DoRA"
    if len({adapter.a.dtype for adapter in adapters}) > 1:
        return "adapters of several dtypes"
    return None


def _why_not_in_shards(x: Tensor, base: Base, adapters: list[Adapter]) -> str | None:
    """Why DTensors can't be computed with, if any of these are."""
    if type(base.weight) in WHOLE and type(adapters[0].a) in WHOLE:
        return None
    tensors = [x, base.weight, *(t for adapter in adapters for t in (adapter.a, adapter.b))]
    if any(type(tensor) in WHOLE for tensor in tensors):
        return "DTensors beside whole tensors"
    if adapters[0].magnitude is not None and adapters[0].dropout_p:
        return "DoRA's dropout with DTensors"  # PEFT's module draws it, as each process would
    return None


def is_constant(scale: float | Tensor) -> bool:
    """Whether kernels can take this as the factor of an adapter."""
    return not (isinstance(scale, Tensor) and (scale.dim() != 0 or scale.requires_grad))
