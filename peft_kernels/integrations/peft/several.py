"""Several of PEFT's adapters on all rows: as one where they can be, or one after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.integrations.peft.state import Adapter, are_apart


def together(adapters: list[Adapter]) -> tuple[Adapter, list[Adapter]]:
    """One adapter that adds what all of these do, or the first and the rest."""
    first, *others = adapters
    if not others or are_apart(adapters):
        return first, others
    scales = [adapter.scale for adapter in adapters]
    alike = not any(isinstance(s, Tensor) for s in scales) and len(set(scales)) == 1
    b = [one.b if alike else one.b * one.scale for one in adapters]
    a = torch.cat([adapter.a for adapter in adapters])
    return Adapter("", a, torch.cat(b, dim=1), None, first.scale if alike else 1.0, 0.0), []


def add(y: Tensor, x: Tensor, adapter: Adapter) -> None:
    """``y += scale dropout(x) A^T B^T``, in place, for y that a kernel computed.

    Products of PyTorch's, which take less time than a kernel for rows of several adapters does on
    the one that all of these rows have.
    """
    dropped = F.dropout(x.to(adapter.a.dtype), adapter.dropout_p)
    y += F.linear(F.linear(dropped, adapter.a) * adapter.scale, adapter.b)


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
