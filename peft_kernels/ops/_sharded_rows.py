"""Gradients of A or B by way of a sum of ``[m, r]``, for batches of few rows.

What is summed over processes is dA ``[r, k]`` or dB ``[n, r]``, or else what they are made of,
where that is less:

    dS = scale dy B                  [m, r]   a sum over processes that have parts of n
    dA = dS^T x                      [r, k]
    S  = x A^T                       [m, r]   a sum over processes that have parts of k
    dB = scale dy^T S                [n, r]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels.ops._dtypes import acc_dtype
from peft_kernels.ops._rows import rows_of

Sum = Callable[[Tensor], Tensor]


class ThroughRows(torch.autograd.Function):
    """y as it is; backward, the gradient of A or of B, which the op before it doesn't give.

    Args:
        y: ``[..., n]`` of a process, without dropout.
        x, lora_a, lora_b, scale: of :func:`peft_kernels.ops.lora_linear`.
        of_a: whether it is A's gradient, and not B's.
        summed: over processes.
    """

    @staticmethod
    def forward(ctx, y, x, lora_a, lora_b, scale, of_a: bool, summed: Sum):
        ctx.save_for_backward(x, lora_a, lora_b)
        ctx.scale, ctx.of_a, ctx.summed = scale, of_a, summed
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, lora_a, lora_b = ctx.saved_tensors
        acc = acc_dtype(dy)
        wide_dy = rows_of(dy).to(acc)
        wide_x = rows_of(x).to(dy.dtype).to(acc)  # as the op had it under autocast
        da = db = None
        if ctx.of_a:
            ds = ctx.summed(ctx.scale * (wide_dy @ lora_b.to(acc)))
            da = (ds.T @ wide_x).to(lora_a.dtype)
        else:
            s = ctx.summed(wide_x @ lora_a.to(acc).T)
            db = (ctx.scale * (wide_dy.T @ s)).to(lora_b.dtype)
        return dy, None, da, db, None, None, None
