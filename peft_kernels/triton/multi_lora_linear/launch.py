"""Launchers of the Triton kernels of ``multi_lora_linear``: which kernel, on which grid.

The maths, the schemas and the layout of a bank are in ``peft_kernels/ops/multi_lora_linear.py``,
the kernels in ``kernels.py``, the plans and tiles in ``plans.py`` and ``common/chips.py``, the
launches in ``calls.py``.
No launch depends on what ids, ranks or tables hold: nothing waits for the device, and a CUDA graph
of a call serves any adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.triton.multi_lora_linear.calls import Call

# ---- forward -----------------------------------------------------------------------------------


def multi_lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    tables: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scales: Sequence[Tensor],
    ids: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    dropout_p: Sequence[Tensor],
    seeds: Sequence[Tensor],
    plan: str,
) -> tuple[Tensor, Tensor]:
    """y ``[m, n]`` in x's dtype and S ``[m, R]`` in float32."""
    banks = (a, b, tables, ranks, scales)
    call = Call(x, *banks, ids, order, starts, dropout_p, seeds, plan)
    with torch.cuda.device_of(x):
        if call.is_one_launch(weight):
            native = torch.ops.peft_kernels.multi_lora_linear_decode.default
            return native(x, weight, bias, *map(list, banks), call.ids)
        if not call.fuses_base(*weight.shape):
            y = F.linear(x, weight, bias)
            return y, _add(call, y, x, banks)
        s = call.low_rank_input(x, "a")
        y = x.new_empty(call.m, weight.shape[0])
        call.output(y, s, base=(x, weight), bias=bias)
    return y, s


def multi_lora_linear_add(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    tables: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scales: Sequence[Tensor],
    ids: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    dropout_p: Sequence[Tensor],
    seeds: Sequence[Tensor],
    plan: str,
) -> Tensor:
    """S ``[m, R]`` in float32; the delta is added into y ``[m, n]``, which is contiguous."""
    banks = (a, b, tables, ranks, scales)
    call = Call(x, *banks, ids, order, starts, dropout_p, seeds, plan)
    with torch.cuda.device_of(x):
        return _add(call, y, x, banks)


def _add(call: Call, y: Tensor, x: Tensor, banks: Sequence[Sequence[Tensor]]) -> Tensor:
    """y += delta, and S."""
    if call.plan == "decode" and call.has_native_decode(x.device):
        native = torch.ops.peft_kernels.multi_lora_linear_decode_add.default
        return native(y, x, *map(list, banks), call.ids)
    s = call.low_rank_input(x, "a")
    call.output(y, s, adds=True)
    return s


# ---- backward ----------------------------------------------------------------------------------


def multi_lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    tables: Sequence[Tensor],
    ranks: Sequence[Tensor],
    scales: Sequence[Tensor],
    ids: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    s: Tensor,
    dropout_p: Sequence[Tensor],
    seeds: Sequence[Tensor],
    grad_rows: Sequence[Tensor],
    grad_sizes: Sequence[int],
    needs_x: bool,
    plan: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx ``[m, k]``, of size 0 where not needed, and the trained adapters' dA and dB by bank."""
    banks = (a, b, tables, ranks, scales)
    call = Call(x, *banks, ids, order, starts, dropout_p, seeds, plan, backward=True)
    dx = x.new_empty(0)
    da = [a[i].new_zeros(size, call.k) for i, size in enumerate(grad_sizes)]
    db = [b[i].new_zeros(size, b[i].shape[1]) for i, size in enumerate(grad_sizes)]
    if not needs_x and not any(grad_sizes):
        return dx, da, db
    with torch.cuda.device_of(x):
        ds = call.low_rank_input(dy, "b")
        if needs_x:
            if weight is None:
                dx = call.input_gradient(x.new_empty(x.shape), ds)
            elif call.fuses_base(call.k, weight.shape[0]):
                dx = call.input_gradient(x.new_empty(x.shape), ds, base=(dy, weight))
            else:
                dx = call.input_gradient(torch.mm(dy, weight), ds, adds=True)
        for i, size in enumerate(grad_sizes):
            if size:
                bank = call.bank(i)
                own_dy = dy[:, bank.place.column : bank.place.column + bank.place.n]
                rows = grad_rows[i].contiguous()
                listed = call.listed(bank, rows, size)
                call.gradient(da[i], bank, ds, x, rows, listed, dropped=True)
                call.gradient(db[i], bank, s, own_dy, rows, listed, dropped=False)
    return dx, da, db
