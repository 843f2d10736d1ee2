"""A frozen linear layer and several adapters on all of its rows, each with a dropout of its own.

    y = x W^T + b + sum_i scale_i dropout_i(x) A_i^T B_i^T

The products with W, forward and backward, are taken once, by lora_linear with the first adapter.
What the others add, multi_lora_add_ adds to y in place: rank-sized products, of which S is kept,
and no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels.ops._checks import check_dropout
from peft_kernels.ops._dropout import draw_seeds, dropped
from peft_kernels.ops._dtypes import acc_dtype, autocast
from peft_kernels.ops._lora_banks import BankDropout
from peft_kernels.ops._lora_factors import LoRAFactors, bank_of, trained_of
from peft_kernels.ops._quantized import QuantizedWeight
from peft_kernels.ops._rows import in_shape_of, rows_of
from peft_kernels.ops._sharded import (
    are_sharded,
    bias_part,
    input_part,
    layout_of,
    mesh_of,
    output_of,
    parameter_part,
    seeds_here,
)
from peft_kernels.ops._transforms import is_special
from peft_kernels.ops.lora_linear import lora_linear
from peft_kernels.ops.multi_lora_linear import multi_lora_add_


def lora_linear_sum(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    factors: LoRAFactors,
    dropout_p: Sequence[float],
    *,
    bias: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """``y = x @ weight.T + bias + sum_i scale_i * dropout_i(x) @ A_i.T @ B_i.T``.

    Sums are in float32; y is rounded once for each adapter.

    Args:
        x: ``[..., k]``; with weight and bias, as of :func:`peft_kernels.ops.lora_linear`.
        weight: ``[n, k]``, or one in codes. If it is a DTensor, so are x, A and B.
        factors: the adapters, here each in float32 or the dtype of x.
        dropout_p: of each adapter the share of elements dropped, in [0, 1).
        bias: ``[n]``.
        seeds: ``[adapters]`` int64; drawn from torch's generator where it is None. Adapter i drops
            what it would drop alone, with this seed.

    Raises:
        ValueError, TypeError: as of :func:`peft_kernels.ops.lora_linear`.
    """
    for share in dropout_p:
        check_dropout(share)
    dense = None if isinstance(weight, QuantizedWeight) else weight
    x, dense, bias = autocast(x, dense, bias)
    if dense is not None and are_sharded(x, dense):
        return _of_shards(lora_linear_sum, x, dense, factors, dropout_p, bias)
    if seeds is None:
        seeds = draw_seeds(len(dropout_p), x.device)
    rows, base = rows_of(x), weight if dense is None else dense
    (a, b, scale, p, seed), *others = zip(*factors, dropout_p, seeds.unbind(), strict=True)
    y = lora_linear(rows, base, a, b, bias=bias, scale=scale, dropout_p=p, seed=seed)
    add = _add_composed if is_special() else _add
    for other in others:
        y = add(y, rows, *other)
    return in_shape_of(x, y)


def _add(y: Tensor, x: Tensor, a, b, scale, p: float, seed: Tensor) -> Tensor:
    """``y += scale dropout(x) A^T B^T``: one adapter, which all rows have."""
    factors = LoRAFactors([a], [b], [scale])
    dropout = None
    if p:
        share = torch.tensor([p], dtype=torch.float64)
        dropout = BankDropout(share.to(x.device), seed.view(1))
    ids = torch.zeros(1, dtype=torch.int32, device=x.device)
    trained = trained_of(factors) if torch.is_grad_enabled() else None
    return multi_lora_add_(y, x, bank_of(factors), ids, dropout=dropout, trained=trained)


def _add_composed(y: Tensor, x: Tensor, a, b, scale, p: float, seed: Tensor) -> Tensor:
    """The same in PyTorch's operations, which transforms and graphs differentiate."""
    acc = acc_dtype(x)
    low_rank = dropped(x, p, seed if p else None) @ a.to(acc).T
    return (y + scale * (low_rank @ b.to(acc).T)).to(y.dtype)


def _of_shards(
    local: Callable[..., Tensor],
    x: Any,
    weight: Any,
    factors: LoRAFactors,
    dropout_p: Sequence[float],
    bias: Any,
) -> Tensor:
    """``local`` on each process's shards of these DTensors, as :mod:`._sharded` has them lie."""
    names = {f"lora_a of adapter {i}": one for i, one in enumerate(factors.a)}
    names |= {f"lora_b of adapter {i}": one for i, one in enumerate(factors.b)}
    mesh = mesh_of(x=x, weight=weight, bias=bias, **names)
    layout = layout_of(x, weight)
    parts = LoRAFactors(
        [parameter_part(one, layout.a, layout.da) for one in factors.a],
        [parameter_part(one, layout.b, layout.db) for one in factors.b],
        factors.scales,
    )
    y = local(
        input_part(x, layout.x, layout.dx),
        parameter_part(weight, weight.placements, layout.dw),
        parts,
        dropout_p,
        bias=None if bias is None else bias_part(bias, layout),
        seeds=seeds_here(draw_seeds(len(dropout_p), x.device), True, layout, mesh),
    )
    return output_of(y, x, weight, layout)
