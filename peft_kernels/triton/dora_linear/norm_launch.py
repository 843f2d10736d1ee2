"""The launcher of DoRA's norms: three launches, of which those that write do nothing by default.

The maths is in ``peft_kernels/ops/_dora_norm.py``, the kernels in
``norm_kernels.py``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peft_kernels.triton.common import chips
from peft_kernels.triton.common.launch import argument, launch_prepared
from peft_kernels.triton.common.layouts import Prepared
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
    scale: Tensor | float,
    norm: Tensor,
    kept_a: Tensor,
    kept_b: Tensor,
    diagonal: Tensor,
) -> None:
    """norm ``[n]`` of these, made again where they aren't as kept, and then kept.

    kept_a ``[r, k]``, kept_b ``[n, r]`` and diagonal ``[min(n, k)]`` are what it is of, in float32.
    """
    (n, k), r, size = weight.shape, lora_a.shape[0], diagonal.numel()
    a, b = lora_a.contiguous(), lora_b.contiguous()
    factor, on_device = argument(scale, 1.0)
    chunks, looking, making = _launches(
        n, k, r, size, on_device, chips.float32_precision(weight.device)
    )
    # Its own in each call: what one stream finds changed is nothing to another.
    changed = norm.new_empty(chunks, dtype=torch.int32)
    strides = weight.stride()
    looked_at = (
        weight, a, b, kept_a, kept_b, diagonal, changed, factor, r * k, n * r, size, sum(strides),
    )  # fmt: skip
    with torch.cuda.device_of(weight):
        launch_prepared(norm_kernels.dora_changed_kernel, looking, *looked_at)
        launch_prepared(
            norm_kernels.dora_norm_kernel, making,
            weight, a, b, changed, norm, factor, n, k, r, chunks, *strides,
        )  # fmt: skip
        launch_prepared(norm_kernels.dora_keep_kernel, looking, *looked_at)


@functools.lru_cache(maxsize=1024)
def _launches(
    n: int, k: int, r: int, diagonal: int, on_device: bool, precision: str
) -> tuple[int, Prepared, Prepared]:
    """Chunks of what is looked at, the launches that look and keep, and the one of the norms."""
    chunks = cdiv(max(r * k, n * r, diagonal), CHUNK)
    looks = {"SCALE_ON_DEVICE": on_device, "BLOCK": CHUNK, "num_warps": WARPS}
    makes = {
        "SCALE_ON_DEVICE": on_device, "PRECISION": precision,
        "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "BLOCK_R": 16 if r <= 16 else MAX_BLOCK_R,
        "CHUNKS": next_power_of_2(chunks), "num_warps": WARPS,
    }  # fmt: skip
    return chunks, ((chunks,), looks), ((cdiv(n, BLOCK_N),), makes)
