"""One of PEFT's adapters for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels.integrations.peft.state import Adapter
from peft_kernels.ops import BankDropout, LoRAFactors, QuantizedWeight, multi_lora_linear
from peft_kernels.ops._dropout import draw_seeds
from peft_kernels.ops._sharded import are_sharded
from peft_kernels.ops._sharded_banks import parts_beside


def rows_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    names: Sequence[str],
) -> Tensor:
    """``y[i] = W x[i] + b``, and the update of the adapter of ``adapters`` that ``names[i]`` names.

    Entry i of ``names`` serves the i-th of as many equal parts of x. A name that none has adds
    nothing. Gradients go to A and B of the adapters that require them.
    """
    if not isinstance(weight, QuantizedWeight) and are_sharded(x, weight):
        parts = [parts_beside(weight, adapter.a, adapter.b) for adapter in adapters]
        adapters = [one._replace(a=a, b=b) for one, (a, b) in zip(adapters, parts, strict=True)]
    slots = {adapter.name: slot for slot, adapter in enumerate(adapters)}
    ids = torch.tensor([slots.get(name, -1) for name in names], dtype=torch.int32)
    factors = LoRAFactors(
        [adapter.a for adapter in adapters],
        [adapter.b for adapter in adapters],
        [adapter.scale for adapter in adapters],
    )
    dropout = _dropout(adapters, x.device)
    return multi_lora_linear(x, weight, factors, ids.to(x.device), bias=bias, dropout=dropout)


def _dropout(adapters: Sequence[Adapter], device: torch.device) -> BankDropout | None:
    if not any(adapter.dropout_p for adapter in adapters):
        return None
    p = torch.tensor([adapter.dropout_p for adapter in adapters], dtype=torch.float64)
    return BankDropout(p.to(device), draw_seeds(len(adapters), device))
