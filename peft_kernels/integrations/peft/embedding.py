"""PEFT's LoRA on an embedding, in PyTorch's own operations: ``y = W[ids] + scale A^T[ids] B^T``.

The lookups are those of the base and of PEFT's layer, with all that an embedding can be told
(padding_idx, max_norm, ...). What follows, for any number of active adapters, is one product that
adds to what was looked up.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as peft_lora
from torch import Tensor, nn

from peft_kernels.integrations.peft.state import is_constant, why_base_alone
from peft_kernels.integrations.served import count

EMBEDDING = "embedding"
Factors = tuple[Tensor, Tensor, float | Tensor]  # A [r, V], B [d, r], scale


class Embedding(peft_lora.Embedding):
    """PEFT's ``lora.Embedding``, with one product for all active adapters."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found: list[Factors] | str
        if args or kwargs:
            found = "adapter_names" if "adapter_names" in kwargs else "other arguments"
        else:
            found = why_base_alone(self) or read_factors(self)
        if isinstance(found, str):
            count(self, found)
            return super().forward(x, *args, **kwargs)
        count(self, EMBEDDING)
        rows = self.base_layer(x)
        factor = self._get_embed_scale()  # of the base: rows are multiplied by it
        s, b = [], []
        for own_a, own_b, scale in found:
            s.append(self._embed(x, own_a.T) * (scale if factor is None else scale * factor))
            b.append(own_b)
        delta = s[0] @ b[0].T if len(s) == 1 else torch.cat(s, -1) @ torch.cat(b, 1).T
        is_wide = torch.promote_types(delta.dtype, rows.dtype) is delta.dtype
        return (delta.add_(rows) if is_wide else delta + rows).to(rows.dtype)


def read_factors(layer: nn.Module) -> list[Factors] | str:
    """A, B and scale of the adapters that are active, or why a call is PEFT's own."""
    state: Any = layer.__dict__
    children: Any = state["_modules"]
    if state.get("tp_layer") is not None:
        return "tensor parallelism"
    active = state["_active_adapter"]
    found: list[Factors] = []
    for name in (active,) if isinstance(active, str) else active:
        a = children["lora_embedding_A"]._parameters.get(name)
        if a is None:
            continue
        if name in state["lora_variant"]:
            return type(state["lora_variant"][name]).__name__
        b = children["lora_embedding_B"]._parameters[name]
        if not (type(a) is type(b) is nn.Parameter and a.dim() == b.dim() == 2):
            return "lora_embedding_A, lora_embedding_B: weights that aren't whole matrices"
        if a.dtype is not b.dtype:
            return "lora_embedding_A, lora_embedding_B: several dtypes"
        scale = state["scaling"][name]
        if not is_constant(scale):
            return "scaling: a tensor that isn't a constant"
        found.append((a, b, scale))
    return found or "no active adapter"
