"""Launchers of ``dora_linear``: those of ``lora_linear`` with a gain, and what a gain adds.

The maths and the schemas are in ``peft_kernels/ops/dora_linear.py``, the kernels that only this op
has in ``kernels.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.triton.common import chips
from peft_kernels.triton.common.launch import argument, chunks, launch, sum_partials
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.dora_linear import kernels
from peft_kernels.triton.lora_linear.launch import lora_linear_bwd, with_gain

# Of passes that wait for memory: rows of 256 bytes or more, a few thousand elements a program.
BLOCK_M, BLOCK_N, WARPS = 32, 128, 4
# Of the rare columns whose z is computed anew.
END_M, END_N, END_K, END_R = 32, 32, 32, 16
WIDENED_END_M = 16  # multiplied outside the tensor cores


def dora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gain: Tensor,
    scale: float,
    scale_t: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y ``[m, n]`` in x's dtype and S ``[m, r]`` in float32."""
    return with_gain(
        x, weight, bias, gain.contiguous(), lora_a, lora_b, scale, scale_t, dropout_p, seed
    )


def dora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gain: Tensor,
    y: Tensor,
    s: Tensor,
    scale: float,
    scale_t: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
    needs_gain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx ``[m, k]``, dA ``[r, k]``, dB ``[n, r]``, dgain ``[n]``; of size 0 where not needed."""
    gain, s = gain.contiguous(), s.contiguous()
    with torch.cuda.device_of(x):
        dz, sums = _gain_bwd(dy, y.contiguous(), bias, gain, needs_gain)
        dgain = gain.new_empty(0)
        if needs_gain:
            factor = scale if scale_t is None else scale_t
            dgain = _gain_end(dy, x, weight, lora_b, s, sums, gain, factor)
    options = scale, scale_t, dropout_p, seed, needs_x, needs_a, needs_b
    return *lora_linear_bwd(dz, x, weight, lora_a, lora_b, s, *options), dgain


def _gain_bwd(
    dy: Tensor, y: Tensor, bias: Tensor | None, gain: Tensor, needs_gain: bool
) -> tuple[Tensor, Tensor]:
    """dz = gain dy, and sum_m dy (y - bias) where that is needed."""
    m, n = dy.shape
    blocks = cdiv(n, BLOCK_N)
    chunk, splits = chunks(chips.cores(dy.device), m, BLOCK_M, blocks)
    dz = dy.new_empty(m, n)
    parts = gain.new_empty(splits if needs_gain else 0, n)
    launch(
        kernels.gain_bwd_kernel,
        (blocks, splits),
        dy, y, None if bias is None else bias.contiguous(), gain, dz, parts, m, n, chunk,
        *dy.stride(),
        HAS_BIAS=bias is not None, NEEDS_GAIN=needs_gain,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=WARPS,
    )  # fmt: skip
    return dz, sum_partials(parts, gain.new_empty(n), 1.0) if needs_gain else parts


def _gain_end(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_b: Tensor,
    s: Tensor,
    sums: Tensor,
    gain: Tensor,
    scale: float | Tensor,
) -> Tensor:
    """dgain = sums / gain, and what it is where gain is 0."""
    (m, n), k, r = dy.shape, x.shape[1], s.shape[1]
    dgain = torch.empty_like(gain)
    factor, on_device = argument(scale, 1.0)
    precision = chips.float32_precision(x.device)
    launch(
        kernels.gain_end_kernel,
        (cdiv(n, END_N),),
        dy, x, weight, lora_b, s, sums, gain, dgain, factor, m, n, k, r,
        *dy.stride(), *x.stride(), weight.stride(1), weight.stride(0), *lora_b.stride(),
        SCALE_ON_DEVICE=on_device, PRECISION=precision,
        BLOCK_M=WIDENED_END_M if precision == chips.WIDENED else END_M,
        BLOCK_N=END_N, BLOCK_K=END_K, BLOCK_R=END_R, num_warps=WARPS,
    )  # fmt: skip
    return dgain
