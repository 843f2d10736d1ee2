# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernels of ``lora_linear`` over a weight in codes.

    codes_tile_kernel    out = a w + factor P Q (+ bias)   y with P = S, dx with P = dS
    dequantize_kernel    w itself, for a library GEMM

The weight's arguments are those of `weight_tile`. The other kernels of the op, and what is said of
rounding, are in ``lora_linear/kernels.py``.
"""

import triton
import triton.language as tl

from peft_kernels.triton.common.blocks import (
    dot,
    float_scalar,
    kept_mask,
    pointers,
    rounded,
    scalar,
    step,
    tile_position,
    wait_for_first,
)
from peft_kernels.triton.lora_linear.kernels import ended, low_rank, plus_low_rank
from peft_kernels.triton.lora_linear_codes.weights import weight_tile


@triton.jit(do_not_specialize=["seed", "threshold"])
def codes_tile_kernel(
    a, codes, scales, shifts, book, nested_scales, nested_book, nested_offset, unit, w_n, w_k,
    bias, p, q, out, factor, seed, threshold, m, r, sa_m, sa_k, sq_r, sq_n,
    LAYOUT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, E4M3: tl.constexpr, IN_RUNS: tl.constexpr,
    FORWARD: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    FACTOR_ON_DEVICE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr, PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """out = a w + mask o (factor P Q) + bias, one store; the weight [w_n, w_k] is in codes.

    y:  a = x,  w = W^T, P = S,  Q = B^T, factor = scale, no mask
    dx: a = dy, w = W,   P = dS, Q = A,   factor = 1 / (1 - p), the mask of dropout

    With PDL, which a mask doesn't go with, P is read last: the base's product needs no wait for it.
    """
    tl.static_assert(not (PDL and DROPOUT), "a mask applies to P Q before the base adds to it")
    n = w_n if FORWARD else w_k
    depth = w_k if FORWARD else w_n
    pid_m, pid_n = tile_position(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = out.dtype.element_ty

    # 1. factor P Q, first: the mask applies to it alone, and the base then adds to the same tile
    scale = float_scalar(factor, FACTOR_ON_DEVICE)
    if PDL:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        acc = low_rank(
            p, q, rows, cols, m, n, r, sq_r, sq_n, scale, dtype, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    if DROPOUT:
        key = scalar(seed, SEED_ON_DEVICE)
        acc = tl.where(kept_mask(key, threshold, rows, pid_n * BLOCK_N, BLOCK_M, BLOCK_N), acc, 0.0)

    # 2. a w, the weight rounded to x's dtype as it is widened
    a_ptrs = pointers(a, rows, inner, sa_m, sa_k)
    for start in range(0, depth, BLOCK_K):
        here = start + inner < depth
        a_tile = tl.load(a_ptrs, mask=(rows < m)[:, None] & here[None, :], other=0.0)
        if FORWARD:
            w_tile = tl.trans(
                weight_tile(
                    codes, scales, shifts, book, nested_scales, nested_book, nested_offset, unit,
                    cols, start, w_n, w_k, LAYOUT, BLOCK, BLOCK_ROWS, NESTED_BLOCK, E4M3, IN_RUNS,
                    BLOCK_K,
                )
            )  # fmt: skip
        else:
            w_tile = weight_tile(
                codes, scales, shifts, book, nested_scales, nested_book, nested_offset, unit,
                start + inner, pid_n * BLOCK_N, w_n, w_k, LAYOUT, BLOCK, BLOCK_ROWS, NESTED_BLOCK,
                E4M3, IN_RUNS, BLOCK_N,
            )  # fmt: skip
        acc = dot(a_tile, rounded(w_tile, dtype), acc, PRECISION)
        a_ptrs += step(BLOCK_K, sa_k)

    # 3. bias, and the only rounding and store
    wait_for_first(PDL)
    if PDL:
        acc = plus_low_rank(
            acc, p, q, rows, cols, m, n, r, sq_r, sq_n, scale, dtype, PRECISION, BLOCK_R
        )
    acc = ended(acc, None, bias, cols, n, False, HAS_BIAS)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(pointers(out, rows, cols, n, 1), rounded(acc, dtype), mask=mask)


@triton.jit
def dequantize_kernel(
    codes, scales, shifts, book, nested_scales, nested_book, nested_offset, unit, w_n, w_k, out,
    LAYOUT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, E4M3: tl.constexpr, IN_RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [w_n, w_k] = w, rounded once."""
    blocks = tl.cdiv(w_k, BLOCK_K)
    rows = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_K
    cols = first + tl.arange(0, BLOCK_K)
    tile = weight_tile(
        codes, scales, shifts, book, nested_scales, nested_book, nested_offset, unit,
        rows, first, w_n, w_k, LAYOUT, BLOCK, BLOCK_ROWS, NESTED_BLOCK, E4M3, IN_RUNS, BLOCK_K,
    )  # fmt: skip
    mask = (rows < w_n)[:, None] & (cols < w_k)[None, :]
    tl.store(pointers(out, rows, cols, w_k, 1), rounded(tile, out.dtype.element_ty), mask=mask)
