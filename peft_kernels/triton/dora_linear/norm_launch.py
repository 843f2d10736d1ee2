"""The launcher of DoRA's norms: three launches, of which those that write do nothing by default.

The maths and the schema are in ``peft_kernels/ops/_dora_norm.py``, the kernels in
``norm_kernels.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.triton.common import chips
from peft_kernels.triton.common.launch import argument, launch
from peft_kernels.triton.common.sizes import cdiv, next_power_of_2
from peft_kernels.triton.dora_linear import norm_kernels

CHUNK, WARPS = 4096, 4
# Rows and columns of W; few rows, so that a layer of a thousand has programs for half a GPU. Ranks
# by 32: compilers unroll a float32 product's whole sum, and spill over a longer one.
BLOCK_N, BLOCK_K, MAX_BLOCK_R = 16, 64, 32


def dora_norm_kept(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    scale_t: Tensor | None,
    norm: Tensor,
    kept_a: Tensor,
    kept_b: Tensor,
    diagonal: Tensor,
) -> None:
    """norm ``[n]`` of these, made again where they aren't as kept, and then kept."""
    (n, k), r = weight.shape, lora_a.shape[0]
    a, b = lora_a.contiguous(), lora_b.contiguous()
    sizes = a.numel(), b.numel(), diagonal.numel()
    chunks = cdiv(max(sizes), CHUNK)
    # Its own in each call: what one stream finds changed is nothing to another.
    changed = norm.new_empty(chunks, dtype=torch.int32)
    factor, on_device = argument(scale if scale_t is None else scale_t, 1.0)
    kept = kept_a, kept_b, diagonal
    looked_at = weight, a, b, *kept, changed, factor, *sizes, sum(weight.stride())
    with torch.cuda.device_of(weight):
        looks = {"SCALE_ON_DEVICE": on_device, "BLOCK": CHUNK, "num_warps": WARPS}
        launch(norm_kernels.dora_changed_kernel, (chunks,), *looked_at, **looks)
        launch(
            norm_kernels.dora_norm_kernel,
            (cdiv(n, BLOCK_N),),
            weight, a, b, changed, norm, factor, n, k, r, chunks, *weight.stride(),
            SCALE_ON_DEVICE=on_device, PRECISION=chips.float32_precision(weight.device),
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=16 if r <= 16 else MAX_BLOCK_R,
            CHUNKS=next_power_of_2(chunks), num_warps=WARPS,
        )  # fmt: skip
        launch(norm_kernels.dora_keep_kernel, (chunks,), *looked_at, **looks)
