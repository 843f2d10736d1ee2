"""One of PEFT's adapters for each row: a bank of the layer's own parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from peft_kernels.integrations.peft.state import Adapter
from peft_kernels.ops import (
    BankDropout,
    LoRABank,
    Trained,
    multi_lora_linear,
)
from peft_kernels.ops._dropout import draw_seed
from peft_kernels.ops._lora_banks import PAGE
from peft_kernels.ops._sharded import are_sharded
from peft_kernels.ops._sharded_banks import parts_beside


def rows_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    names: Sequence[str],
) -> Tensor:
    """``y[i] = W x[i] + b``, and the update of the adapter of ``adapters`` that ``names[i]`` names.

    Entry i of ``names`` serves the i-th of as many equal parts of x. A name that none has adds
    nothing. Gradients go to A and B of the adapters that require them.
    """
    if are_sharded(x, weight):
        parts = [parts_beside(weight, adapter.a, adapter.b) for adapter in adapters]
        adapters = [one._replace(a=a, b=b) for one, (a, b) in zip(adapters, parts, strict=True)]
    slots = {adapter.name: slot for slot, adapter in enumerate(adapters)}
    ids = torch.tensor([slots.get(name, -1) for name in names], dtype=torch.int32)
    return multi_lora_linear(
        x,
        weight,
        _bank(adapters, x.device),
        ids.to(x.device),
        bias=bias,
        dropout=_dropout(adapters, x.device),
        trained=_trained(adapters) if torch.is_grad_enabled() else None,
    )


@torch.no_grad()
def _bank(adapters: Sequence[Adapter], device: torch.device) -> LoRABank:
    """The adapters in pages one after the other."""
    sizes = [adapter.a.shape[0] for adapter in adapters]
    pages, first = [], 0
    for size in sizes:
        pages.append(range(first, first - (-size // PAGE)))
        first = pages[-1].stop
    most = max(map(len, pages))
    table = torch.tensor([[*own, *(0,) * (most - len(own))] for own in pages], dtype=torch.int32)
    ranks = torch.tensor(sizes, dtype=torch.int32)
    a = torch.cat([_whole_pages(adapter.a) for adapter in adapters])
    b = torch.cat([_whole_pages(adapter.b.T) for adapter in adapters])
    return LoRABank(a, b, table.to(device), ranks.to(device), _scales(adapters, device))


def _scales(adapters: Sequence[Adapter], device: torch.device) -> Tensor:
    scales = [adapter.scale for adapter in adapters]
    if any(isinstance(scale, Tensor) for scale in scales):
        return torch.stack([torch.as_tensor(s).to(device, torch.float32) for s in scales])
    return torch.tensor(scales, dtype=torch.float32, device=device)


def _whole_pages(rows: Tensor) -> Tensor:
    missing = -rows.shape[0] % PAGE
    return pad(rows, (0, 0, 0, missing)) if missing else rows


def _dropout(adapters: Sequence[Adapter], device: torch.device) -> BankDropout | None:
    if not any(adapter.dropout_p for adapter in adapters):
        return None
    p = torch.tensor([adapter.dropout_p for adapter in adapters], dtype=torch.float64)
    return BankDropout(p.to(device), torch.stack([draw_seed(device) for _ in adapters]))


def _trained(adapters: Sequence[Adapter]) -> Trained | None:
    """A and B of those adapters whose matrices require gradients."""
    rows, a, b, end = [], [], [], 0
    for adapter in adapters:
        wanted = adapter.a.requires_grad or adapter.b.requires_grad
        rows.append(end if wanted else -1)
        if wanted:
            a.append(adapter.a)
            b.append(adapter.b.T)
            end += adapter.a.shape[0]
    if not a:
        return None
    return Trained(torch.tensor(rows, dtype=torch.int32, device=a[0].device), a, b)
