"""The launcher of ``lora_linear``'s kernel that stays on its core.

For chips whose hardware copies tiles by descriptors, and operands that those can say: rows of
16-bit elements that lie whole, each from an address of 16 bytes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peft_kernels.triton.common import chips, dependent
from peft_kernels.triton.common.chips import Tile
from peft_kernels.triton.common.launch import GROUP_M, argument, launch, options
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.lora_linear import persistent_kernels

if TYPE_CHECKING:
    from peft_kernels.triton.lora_linear.calls import Call

# By chip. A mask of dropout, a gain and float16's powers of two take registers that a wide tile's
# sums would need.
WIDE = {"sm_90": Tile(128, 256, 64, 8, 3), "sm_100": Tile(128, 256, 64, 8, 3)}
NARROW = {"sm_90": Tile(128, 128, 64, 8, 4), "sm_100": Tile(128, 128, 64, 8, 4)}
SPECIALIZING = ("sm_100",)  # chips for which Triton gives copies and products warps of their own
ALIGNMENT = 16  # bytes


def is_for(name: str, dtype: torch.dtype) -> bool:
    """Whether the kernel is for a chip and an x of this dtype."""
    return name in WIDE and dtype in (torch.bfloat16, torch.float16)


def serves(name: str, a: Tensor, w: Tensor) -> bool:
    """Whether it can compute ``a w`` on a chip; a ``[m, depth]``, w ``[depth, n]``."""
    if not (is_for(name, a.dtype) and a.numel() and w.numel()):
        return False
    return _has_descriptor(a) and (_has_descriptor(w) or _has_descriptor(w.T))


def _has_descriptor(matrix: Tensor) -> bool:
    stride = matrix.stride(0) * matrix.element_size()
    lies_whole = matrix.stride(1) == 1 and stride > 0 and stride % ALIGNMENT == 0
    return lies_whole and matrix.data_ptr() % ALIGNMENT == 0


def tile(
    call: Call,
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    p: Tensor,
    q: Tensor,
    out: Tensor,
    factor: Tensor | float,
    masked: bool,
) -> Tensor:
    """out = gain (a w + mask o (factor P Q)) + bias, where :func:`serves`."""
    (m, n), dropout = out.shape, masked and call.dropout
    narrow = dropout or gain is not None or a.dtype is torch.float16
    block = (NARROW if narrow else WIDE)[call.arch_name]
    by_column = not _has_descriptor(w)
    stored, sides = (w.T, [block.n, block.k]) if by_column else (w, [block.k, block.n])
    value, on_device = argument(factor, 1.0)
    tiles = cdiv(m, block.m) * cdiv(n, block.n)
    launch(
        persistent_kernels.persistent_kernel,
        (min(tiles, call.cores),),
        TensorDescriptor.from_tensor(a, [block.m, block.k]),
        TensorDescriptor.from_tensor(stored, sides),
        bias, gain, p, q, out, value, call.seed, call.threshold, m, n, a.shape[1], call.r,
        *q.stride(),
        W_BY_COLUMN=by_column, HAS_BIAS=bias is not None, HAS_GAIN=gain is not None,
        DROPOUT=dropout, FACTOR_ON_DEVICE=on_device, SEED_ON_DEVICE=call.seed_on_device,
        PRECISION=call.precision, SPECIALIZE=call.arch_name in SPECIALIZING, GROUP_M=GROUP_M,
        BLOCK_M=block.m, BLOCK_N=block.n, BLOCK_K=block.k,
        BLOCK_R=min(call.block_r, chips.MAX_TILE_BLOCK_R), **options(block),
        **dependent.second(call.pdl and not masked),
    )  # fmt: skip
    return out
