"""Launchers of ``lora_linear`` over weights in codes: widened in the tile, or dequantised first.

The maths and the schemas are in ``peft_kernels/ops/_quantized.py``, the plans in
``lora_linear/plans.py``. A dequantised weight lives as long as its call.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.ops._quantized import QuantizedWeight, arguments_of
from peft_kernels.triton.common import chips, dependent
from peft_kernels.triton.common.launch import GROUP_M, argument, launch, options
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.lora_linear import plans
from peft_kernels.triton.lora_linear.calls import Call, call_of
from peft_kernels.triton.lora_linear.launch import (
    from_dy,
    grad_a,
    grad_x,
    lora_linear_fwd,
    shrink,
)
from peft_kernels.triton.lora_linear_codes import kernels

WEIGHT_ARGUMENTS = 13
# Waits for memory: runs of 128 codes in a row, a few thousand elements a program.
DEQUANTIZE_N, DEQUANTIZE_K, DEQUANTIZE_WARPS = 32, 128, 4


def lora_linear_codes(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """y ``[m, n]`` in x's dtype and S ``[m, r]`` in float32."""
    weight = _weight_of(rest[:WEIGHT_ARGUMENTS], x.shape[1])
    bias, lora_a, lora_b, _, _, dropout_p, seed = rest[WEIGHT_ARGUMENTS:]
    call = call_of("fwd", x, weight.n, lora_a, dropout_p, seed, weight.kind())
    run = functools.partial(_forward, call, x, weight, bias, lora_a, lora_b, rest[-4:])
    with torch.cuda.device_of(x):
        return run(plans.choose(x.device, call.problem, run))


def _forward(
    call: Call,
    x: Tensor,
    weight: _Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale_and_dropout: tuple,
    plan: str,
) -> tuple[Tensor, Tensor]:
    if plan == "scratch":
        dense = dequantized(weight, x.dtype)
        return lora_linear_fwd(x, dense, bias, lora_a, lora_b, *scale_and_dropout)
    s = shrink(call, x, lora_a, pdl=call.pdl)
    scale, scale_t, *_ = scale_and_dropout
    factor = scale if scale_t is None else scale_t
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(call.m, call.n)
    return _tile(call, x, weight, bias, s, lora_b.T, y, factor, forward=True), s


def lora_linear_codes_bwd(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dx ``[m, k]``, dA ``[r, k]``, dB ``[n, r]``; of size 0 where not needed."""
    weight = _weight_of(rest[:WEIGHT_ARGUMENTS], x.shape[1])
    lora_a, lora_b, s, scale, scale_t, dropout_p, seed, *needs = rest[WEIGHT_ARGUMENTS:]
    needs_x, needs_a, needs_b = needs
    call = call_of("bwd", x, weight.n, lora_a, dropout_p, seed, weight.kind())
    with torch.cuda.device_of(x):
        dx, da, db = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
        factor = scale if scale_t is None else scale_t
        ds, db = from_dy(call, dy, lora_b, s.contiguous(), factor, needs_x or needs_a, needs_b, db)
        if needs_x:
            run = functools.partial(_grad_x, call, dy, weight, ds, lora_a)
            dx = run(plans.choose(x.device, call.problem, run))
        if needs_a:
            da = grad_a(call, x, ds, lora_a)
    return dx, da, db


def _grad_x(
    call: Call, dy: Tensor, weight: _Weight, ds: Tensor, lora_a: Tensor, plan: str
) -> Tensor:
    dtype = call.problem.dtype
    if plan == "scratch":
        return grad_x(call.over_dense(), dy, dequantized(weight, dtype), ds, lora_a)
    dx = dy.new_empty(call.m, call.k, dtype=dtype)
    return _tile(call, dy, weight, None, ds, lora_a, dx, call.inv_keep, forward=False)


# ---- the weight as kernels take it ---------------------------------------------------------------


class _Weight(NamedTuple):
    codes: Tensor
    scales: Tensor | None
    shifts: Tensor | None
    book: Tensor | None
    nested_scales: Tensor | None
    nested_book: Tensor | None
    nested_offset: Tensor | None
    n: int
    k: int
    block: int  # elements; 0 a whole row, -1 the whole weight
    block_rows: int
    nested_block: int
    unit: float
    layout: str

    def arguments(self) -> tuple:
        return *self[:7], self.unit, self.n, self.k

    def constants(self) -> dict[str, Any]:
        return {
            "LAYOUT": self.layout,
            "BLOCK": self.block,
            "BLOCK_ROWS": self.block_rows,
            "NESTED_BLOCK": self.nested_block,
            "E4M3": self.codes.dtype is torch.uint8 and self.book is None,
            "IN_RUNS": self.lies_in_runs(),
        }

    def lies_in_runs(self) -> bool:
        if self.layout != "planes" or self.block_rows > 1:
            return False
        if self.book is not None and self.k % 2:
            return False
        block = self.block
        return block <= 0 or (self.k % block == 0 and block & (block - 1) == 0)

    def kind(self) -> str:
        """What plans are measured by."""
        if self.layout != "planes":
            return self.layout
        bits = "4-bit" if self.book is not None else str(self.codes.dtype).removeprefix("torch.")
        block = {0: "row", -1: "all"}.get(self.block, self.block)
        return f"{bits}/{block}" + ("/nested" if self.nested_block else "")


def _weight_of(arguments: tuple, k: int) -> _Weight:
    codes, *tensors = arguments[:7]
    n, block, block_rows, nested_block, unit, layout = arguments[7:]
    if layout == "planes" and block_rows == 1 and block >= k:
        # No variant of a kernel for each k.
        block = 0 if block == k else -1 if block >= n * k else block
    if codes.dtype is torch.float8_e4m3fn:
        codes = codes.view(torch.uint8)
    return _Weight._make((codes, *tensors, n, k, block, block_rows, nested_block, unit, layout))


def kind_of(weight: QuantizedWeight) -> str:
    """What plans over it are measured by."""
    return _weight_of(arguments_of(weight), weight.shape[1]).kind()


def dequantized(weight: _Weight, dtype: torch.dtype) -> Tensor:
    """The weight ``[n, k]``, rounded once."""
    out = torch.empty(weight.n, weight.k, dtype=dtype, device=weight.codes.device)
    blocks = cdiv(weight.n, DEQUANTIZE_N) * cdiv(weight.k, DEQUANTIZE_K)
    launch(
        kernels.dequantize_kernel,
        (blocks,),
        *weight.arguments(), out,
        **weight.constants(),
        BLOCK_N=DEQUANTIZE_N, BLOCK_K=DEQUANTIZE_K, num_warps=DEQUANTIZE_WARPS, num_stages=1,
    )  # fmt: skip
    return out


# ---- the fused tile ------------------------------------------------------------------------------


def _tile(
    call: Call,
    a: Tensor,
    weight: _Weight,
    bias: Tensor | None,
    p: Tensor,
    q: Tensor,
    out: Tensor,
    factor: Tensor | float,
    forward: bool,
) -> Tensor:
    """out = a w + mask o (factor P Q) + bias."""
    tile = call.tile("codes")
    m, n = out.shape
    dropout = call.dropout and not forward
    value, on_device = argument(factor, 1.0)
    launch(
        kernels.codes_tile_kernel,
        (cdiv(m, tile.m) * cdiv(n, tile.n),),
        a, *weight.arguments(), bias, p, q, out, value, call.seed, call.threshold, m, call.r,
        *a.stride(), *q.stride(),
        **weight.constants(),
        FORWARD=forward, HAS_BIAS=bias is not None, DROPOUT=dropout, FACTOR_ON_DEVICE=on_device,
        SEED_ON_DEVICE=call.seed_on_device, PRECISION=call.precision, GROUP_M=GROUP_M,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        BLOCK_R=min(call.block_r, chips.MAX_TILE_BLOCK_R), **options(tile),
        **dependent.second(call.pdl and forward),
    )  # fmt: skip
    return out
