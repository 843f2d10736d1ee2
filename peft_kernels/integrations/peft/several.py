"""Several of PEFT's adapters on all rows, as few as can be computed with."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.integrations.peft.state import Adapter


def together(adapters: list[Adapter]) -> list[Adapter]:
    """Adapters that add what all of these do: one of all the ranks that share a dtype and drop
    nothing, and those that do, each with its own dropout."""
    if len(adapters) == 1:
        return adapters
    alike: dict[torch.dtype, list[Adapter]] = {}
    for adapter in adapters:
        if not adapter.dropout_p:
            alike.setdefault(adapter.a.dtype, []).append(adapter)
    return [*map(_as_one, alike.values()), *(one for one in adapters if one.dropout_p)]


def _as_one(adapters: list[Adapter]) -> Adapter:
    """One adapter of the ranks of all of these."""
    first = adapters[0]
    if len(adapters) == 1:
        return first
    scales = [adapter.scale for adapter in adapters]
    alike = not any(isinstance(s, Tensor) for s in scales) and len(set(scales)) == 1
    b = [one.b if alike else one.b * one.scale for one in adapters]
    a = torch.cat([adapter.a for adapter in adapters])
    return Adapter("", a, torch.cat(b, dim=1), None, first.scale if alike else 1.0, 0.0)


def sum_of_biases(
    bias: Tensor | None, adapters: list[Adapter], dtype: torch.dtype
) -> Tensor | None:
    """The base's bias, and that of each B at its adapter's scale."""
    for adapter in adapters:
        if adapter.bias is not None:
            if bias is None or isinstance(adapter.scale, Tensor):
                own = (adapter.bias * adapter.scale).to(dtype)
                bias = own if bias is None else bias + own
            else:
                bias = torch.add(bias, adapter.bias.to(dtype), alpha=adapter.scale)
    return bias
