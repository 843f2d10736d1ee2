"""multi_lora_linear of DTensors: rows of several adapters, each process with its part of all.

x, the weight ``[n, k]``, the bias and y lie as for one adapter, :mod:`._sharded`. Of a bank each
process has what goes beside its part of the weight: A's columns by k, B's by n. All processes have
all rows, and the same ids. A's gradient is a sum of ``r k`` elements for each adapter where the
weight is sharded by n, and B's one of ``n r`` where it is by k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from peft_kernels.ops._lora_banks import BankDropout, LoRABank
from peft_kernels.ops._lora_factors import LoRAFactors
from peft_kernels.ops._sharded import (
    Layout,
    adapter_placements,
    bias_part,
    input_part,
    layout_of,
    mesh_of,
    output_of,
    parameter_part,
    seeds_here,
)


def multi_lora_linear_sharded(
    local: Callable[..., Tensor],
    x: Any,
    weight: Any,
    banks: Any,
    ids: Any,
    *,
    bias: Any,
    dropout: Any,
    **options: Any,
) -> Tensor:
    """``local`` on each process's part of x, weight and bias, which are DTensors.

    Args:
        local: :func:`peft_kernels.ops.multi_lora_linear`.
        banks, options: of the process's part.
        dropout: its seeds are those of the first process.

    Returns:
        y as a DTensor: sharded by columns, or a sum that is still to be taken.

    Raises:
        TypeError, ValueError: as of one adapter.
    """
    mesh = mesh_of(x=x, weight=weight, bias=bias)
    _check_parts(banks)
    x = _with_all_rows(x)
    layout = layout_of(x, weight)
    y = local(
        input_part(x, layout.x, layout.dx),
        parameter_part(weight, weight.placements, layout.dw),
        banks,
        ids,
        bias=None if bias is None else bias_part(bias, layout),
        dropout=_dropout_here(dropout, layout, mesh),
        **options,
    )
    return output_of(y, x, weight, layout)


def parts_beside(weight: Any, lora_a: Any, lora_b: Any) -> tuple[Tensor, Tensor]:
    """A process's part of A ``[r, k]`` and of B ``[n, r]``, which pass gradients on to all of it.

    Args:
        weight: a DTensor ``[n, k]``, as the layer's x has the columns of.
    """
    placements = adapter_placements(weight)
    grads = (_summed(own, weight.placements) for own in placements)
    pairs = zip((lora_a, lora_b), placements, grads, strict=True)
    a, b = (parameter_part(*pair) for pair in pairs)
    return a, b


def _check_parts(banks: LoRABank | Sequence[LoRABank] | LoRAFactors) -> None:
    from torch.distributed.tensor import DTensor

    if isinstance(banks, LoRAFactors):
        tensors = [*banks.a, *banks.b]
    else:
        tensors = [t for bank in ([banks] if isinstance(banks, LoRABank) else banks) for t in bank]
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        raise TypeError(
            "a bank's tensors must be those of this process, beside its part of the weight; got "
            "DTensors. The layers of a pool are sharded by the styles of "
            "peft_kernels.integrations.parallel, and torch's own come before attach()"
        )


def _summed(placements: Sequence, of_weight: Sequence) -> list:
    """What is whole has a gradient of parts where the weight is in parts."""
    from torch.distributed.tensor import Partial

    return [
        Partial() if own.is_replicate() and not whole.is_replicate() else own
        for own, whole in zip(placements, of_weight, strict=True)
    ]


def _with_all_rows(x: Any) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    columns = Shard(x.dim() - 1), Shard(-1)
    return x.redistribute(
        placements=[p if p in columns or p.is_partial() else Replicate() for p in x.placements]
    )


def _dropout_here(dropout: Any, layout: Layout, mesh: Any) -> Any:
    if dropout is None:
        return None
    if isinstance(dropout, BankDropout):
        return dropout._replace(seeds=seeds_here(dropout.seeds, True, layout, mesh))
    return [_dropout_here(one, layout, mesh) for one in dropout]
