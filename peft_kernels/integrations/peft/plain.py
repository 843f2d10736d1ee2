"""A LoRA layer of PEFT's in the state that most calls find it in, told in one pass.

What :func:`~peft_kernels.integrations.peft.state.read` tells of any state, with the reason where no
kernel serves it, costs more than PEFT's own layer has to spare. Where this says yes, so does that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

# The weight, the bias, A, B, scale and dropout_p of lora_linear_plain.
Arguments = tuple[Tensor, Tensor | None, Tensor, Tensor, float, float]
_LINEAR, _IDENTITY, _DROPOUT, _PARAMETER = nn.Linear, nn.Identity, nn.Dropout, nn.Parameter
_TENSORS = (Tensor, nn.Parameter)
_FLOAT, _HALVES = torch.float32, (torch.bfloat16, torch.float16)


def read_plain(layer: nn.Module, x: Tensor) -> Arguments | None:
    """What lora_linear_plain needs to serve a call with x, or None where ``read`` must look.

    Plain is one active adapter, in the base's dtype or float32, on an ``nn.Linear``, with nothing
    put around a part of the layer, and no autocast.
    """
    state: Any = layer.__dict__
    name = state["_active_adapter"]
    if type(name) is not str:
        if len(name) != 1:
            return None
        (name,) = name
    children = state["_modules"]
    a = children["lora_A"]._modules.get(name)
    if (
        a is None
        or state["_disable_adapters"]
        or state["merged_adapters"]
        or state["lora_variant"]
        or _has_any_global_hook()
        or torch._C._is_any_autocast_enabled()
    ):
        return None
    base, b = children["base_layer"], children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    for module in (base, a, b, dropout):
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return None
    if not (type(base) is type(a) is type(b) is _LINEAR):
        return None
    p = 0.0
    if type(dropout) is not _IDENTITY:
        if type(dropout) is not _DROPOUT:
            return None
        p = dropout.p if dropout.training else 0.0
    scale, bias, b_bias = state["scaling"][name], base._parameters["bias"], b._parameters["bias"]
    weight = base._parameters.get("weight")
    a, b = a._parameters.get("weight"), b._parameters.get("weight")
    if (
        b_bias is None
        and type(scale) is float
        and type(x) in _TENSORS
        and type(weight) is type(a) is type(b) is _PARAMETER
        and (bias is None or (type(bias) is _PARAMETER and bias.dim() == 1))
        and weight.dim() == a.dim() == b.dim() == 2
        and 0.0 <= p < 1.0
    ):
        dtype, own_dtype = x.dtype, a.dtype
        if (
            dtype is weight.dtype
            and (bias is None or dtype is bias.dtype)
            and own_dtype is b.dtype
            and (own_dtype is dtype or (own_dtype is _FLOAT and dtype in _HALVES))
        ):
            return weight, bias, a, b, scale, p
    return None
