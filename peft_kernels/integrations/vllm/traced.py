"""What vLLM's compiled graphs call: each product of a layer as one op, that they don't look into.

vLLM traces a model once, drops every guard, and captures the graphs that it compiles. So an op is
given what stays from step to step, buffers and banks, and looks at the step when it runs.
"""

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from peft_kernels import _library


def _lora_add(
    y: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    tables: list[Tensor],
    ranks: list[Tensor],
    scales: list[Tensor],
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    count: Tensor,
    column: int,
    scale: float,
) -> None:
    """y += scale B_g A_g x, for the columns of the banks from ``column`` on."""
    if not count.item():
        return
    width = sum(matrix.shape[1] for matrix in b)
    if column + width > y.shape[1]:
        raise ValueError(
            f"y must have room for slices of {[matrix.shape[1] for matrix in b]} columns from "
            f"column {column} on; it has {y.shape[1]}"
        )
    if scale != 1:
        scales = [own * scale for own in scales]
    own = y[:, column : column + width]
    _run(own, x, a, b, tables, ranks, scales, ids, order, starts)


def _lora_shrink(
    s: Tensor,
    x: Tensor,
    a: list[Tensor],
    tables: list[Tensor],
    ranks: list[Tensor],
    scales: list[Tensor],
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
    count: Tensor,
    scale: float,
) -> None:
    """s[i] += scale A_g x, for every slice i of s ``[slices, m, r]``."""
    if not count.item():
        return
    no_y, no_b = x.new_empty(len(x), 0), [own.new_empty(len(own), 0) for own in a]
    found = _run(no_y, x, a, no_b, tables, ranks, scales, ids, order, starts)
    width = found.shape[1] // len(a)
    for i, part in enumerate(s):
        part.add_(found[:, i * width : i * width + part.shape[1]], alpha=scale)


def _run(
    y: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    tables: list[Tensor],
    ranks: list[Tensor],
    scales: list[Tensor],
    ids: Tensor,
    order: Tensor,
    starts: Tensor,
) -> Tensor:
    m = len(x)
    if m > len(ids):
        raise ValueError(f"x must have at most {len(ids)} rows, those of a step; it has {m}")
    # The kernel of few rows takes tensors of one dtype, and a y that has no other columns.
    plain = y.is_contiguous() and y.shape[1] and x.dtype is y.dtype is b[0].dtype is a[0].dtype
    plan = "auto" if plain else "grouped"
    op = _library.get_op("multi_lora_linear_add", _library.variant(x.dtype))
    return op(y, x, a, b, tables, ranks, scales, ids[:m], order[:m], starts, [], [], plan)


def _writes_only(*args) -> None:
    """The shapes of what they return."""


for _name, _op, _written in (
    ("peft_kernels_lora_add", _lora_add, "y"),
    ("peft_kernels_lora_shrink", _lora_shrink, "s"),
):
    direct_register_custom_op(
        _name,
        _op,
        mutates_args=[_written],
        fake_impl=_writes_only,
        dispatch_key="CompositeExplicitAutograd",
    )

lora_add = torch.ops.vllm.peft_kernels_lora_add
lora_shrink = torch.ops.vllm.peft_kernels_lora_shrink
