# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernel that adds up the parts of a long sum, in a fixed order."""

import triton
import triton.language as tl

from peft_kernels.triton.common.blocks import (
    float_scalar,
    let_next_begin,
    pointers,
    rounded,
    wait_for_first,
)


@triton.jit
def sum_partials_kernel(
    parts, out, factor, count, size,
    FACTOR_ON_DEVICE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """out[i] = factor sum_j parts[j, i]; parts [count, size] float32, PARTS of them at a time."""
    let_next_begin(PDL)
    wait_for_first(PDL)
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = tl.arange(0, PARTS)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, PARTS):
        mask = (first + which < count)[:, None] & (where < size)[None, :]
        acc += tl.sum(tl.load(pointers(parts, first + which, where, size, 1), mask, 0.0), axis=0)
    acc = acc * float_scalar(factor, FACTOR_ON_DEVICE)
    tl.store(out + where, rounded(acc, out.dtype.element_ty), mask=where < size)
