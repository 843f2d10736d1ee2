# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernel that writes a float32 matrix as terms of a narrower dtype."""

import triton
import triton.language as tl

from peft_kernels.triton.common.blocks import rounded


@triton.jit
def terms_kernel(
    a, terms, rows, cols, sa_r, sa_c, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """terms[0] + terms[1] + ... = a, each the nearest to what those before it leave.

    ``a`` [rows, cols] is float32; ``terms`` [TERMS, rows, cols] is contiguous. One row's block of
    columns a program.
    """
    blocks = tl.cdiv(cols, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    where = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = where < cols
    rest = tl.load(a + row * sa_r + where * sa_c, mask=mask, other=0.0)
    out = terms + row * cols + where
    for _ in tl.static_range(TERMS):
        term = rounded(rest, terms.dtype.element_ty)
        tl.store(out, term, mask=mask)
        rest -= term.to(tl.float32)
        out += rows.to(tl.int64) * cols
