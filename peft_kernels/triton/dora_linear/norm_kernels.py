# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernels of DoRA's norms, which are made again where something changed.

    dora_changed_kernel   whether A, scale B or W's diagonal are as kept      a chunk each
    dora_norm_kernel      |W + scale B A| by row                              unless all are
    dora_keep_kernel      keeps those of the chunks that aren't

The maths is in ``peft_kernels/ops/_dora_norm.py``. They are kept once the norms stand: a stream
that finds all as kept may read these.
"""

import triton
import triton.language as tl

from peft_kernels.triton.common.blocks import dot, float_scalar, pointers


@triton.jit
def _now(weight, a, b, at, scale, size_a, size_b, size_d, stride_d, ON_DEVICE: tl.constexpr):
    """The elements ``at`` of A, scale B and W's diagonal, in float32."""
    a_now = tl.load(a + at, mask=at < size_a, other=0.0).to(tl.float32)
    b_now = tl.load(b + at, mask=at < size_b, other=0.0).to(tl.float32)
    d_now = tl.load(weight + at * stride_d, mask=at < size_d, other=0.0).to(tl.float32)
    return a_now, b_now * float_scalar(scale, ON_DEVICE), d_now


@triton.jit
def dora_changed_kernel(
    weight, a, b, kept_a, kept_b, diagonal, changed, scale, size_a, size_b, size_d, stride_d,
    SCALE_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """changed[chunk] is 1 where an element isn't equal to what is kept. Grid: chunks."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a_now, b_now, d_now = _now(
        weight, a, b, at, scale, size_a, size_b, size_d, stride_d, SCALE_ON_DEVICE
    )
    differs = a_now != tl.load(kept_a + at, mask=at < size_a, other=0.0)
    differs = differs | (b_now != tl.load(kept_b + at, mask=at < size_b, other=0.0))
    differs = differs | (d_now != tl.load(diagonal + at, mask=at < size_d, other=0.0))
    tl.store(changed + tl.program_id(0), tl.max(differs.to(tl.int32), 0))


@triton.jit
def dora_norm_kernel(
    weight, a, b, changed, norm, scale, n, k, r, chunks, sw_n, sw_k,
    SCALE_ON_DEVICE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """norm [n], if any of the chunks changed. Grid: row blocks."""
    chunk = tl.arange(0, CHUNKS)
    if tl.max(tl.load(changed + chunk, mask=chunk < chunks, other=0), 0) != 0:
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        factor = float_scalar(scale, SCALE_ON_DEVICE)
        squares = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, k, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            of_w = (rows < n)[:, None] & (cols < k)[None, :]
            merged = tl.load(pointers(weight, rows, cols, sw_n, sw_k), mask=of_w, other=0.0)
            merged = merged.to(tl.float32)
            for rank in range(0, r, BLOCK_R):
                ranks = rank + tl.arange(0, BLOCK_R)
                of_b = (rows < n)[:, None] & (ranks < r)[None, :]
                of_a = (ranks < r)[:, None] & (cols < k)[None, :]
                b_tile = tl.load(pointers(b, rows, ranks, r, 1), mask=of_b, other=0.0)
                a_tile = tl.load(pointers(a, ranks, cols, k, 1), mask=of_a, other=0.0)
                merged = dot(
                    b_tile.to(tl.float32) * factor, a_tile.to(tl.float32), merged, PRECISION
                )
            squares += tl.sum(merged * merged, axis=1)
        tl.store(norm + rows, tl.sqrt(squares), mask=rows < n)


@triton.jit
def dora_keep_kernel(
    weight, a, b, kept_a, kept_b, diagonal, changed, scale, size_a, size_b, size_d, stride_d,
    SCALE_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keeps what the norms are of. Grid: chunks."""
    if tl.load(changed + tl.program_id(0)) != 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        a_now, b_now, d_now = _now(
            weight, a, b, at, scale, size_a, size_b, size_d, stride_d, SCALE_ON_DEVICE
        )
        tl.store(kept_a + at, a_now, mask=at < size_a)
        tl.store(kept_b + at, b_now, mask=at < size_b)
        tl.store(diagonal + at, d_now, mask=at < size_d)
