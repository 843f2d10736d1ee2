# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The Triton kernel of ``lora_linear`` that stays on its core, and reads tiles by descriptors.

    persistent_kernel      out = a w + factor P Q (+ bias)         as tile_kernel

Each program takes one tile after the other, so that the loads of the next are under way while one
ends. The hardware copies tiles by their coordinates (TMA), which takes no registers for addresses,
and on a Blackwell by warps of their own. Sums have tile_kernel's precision.
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
    tile_position,
    wait_for_first,
)
from peft_kernels.triton.lora_linear.kernels import ended, low_rank, plus_low_rank


@triton.jit(do_not_specialize=["seed", "threshold"])
def persistent_kernel(
    a, w, bias, gain, p, q, out, factor, seed, threshold, m, n, depth, r, sq_r, sq_n,
    W_BY_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr,
    DROPOUT: tl.constexpr, FACTOR_ON_DEVICE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr, SPECIALIZE: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """out = gain (a w + mask o (factor P Q)) + bias; a and w are descriptors.

    a [m, depth] has blocks [BLOCK_M, BLOCK_K]; w is [n, depth] W_BY_COLUMN, and [depth, n] else.
    Grid: at most as many programs as there are tiles.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    dtype: tl.constexpr = out.dtype.element_ty
    scale = float_scalar(factor, FACTOR_ON_DEVICE)
    if DROPOUT:
        key = scalar(seed, SEED_ON_DEVICE)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = tile_position(tile, tiles_m, tiles_n, GROUP_M)

        # 1. a w
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, depth, BLOCK_K, warp_specialize=SPECIALIZE):
            a_tile = a.load([pid_m * BLOCK_M, start])
            if W_BY_COLUMN:
                w_tile = w.load([pid_n * BLOCK_N, start]).T
            else:
                w_tile = w.load([start, pid_n * BLOCK_N])
            acc = dot(a_tile, w_tile, acc, PRECISION)

        # 2. factor P Q, into the same sums where no mask is between
        wait_for_first(PDL)
        rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if DROPOUT:
            part = low_rank(
                p, q, rows, cols, m, n, r, sq_r, sq_n, scale, dtype, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
            kept = kept_mask(key, threshold, rows, pid_n * BLOCK_N, BLOCK_M, BLOCK_N)
            acc += tl.where(kept, part, 0.0)
        else:
            acc = plus_low_rank(
                acc, p, q, rows, cols, m, n, r, sq_r, sq_n, scale, dtype, PRECISION, BLOCK_R
            )

        # 3. gain and bias, and the only rounding and store
        acc = ended(acc, gain, bias, cols, n, HAS_GAIN, HAS_BIAS)
        mask = (rows < m)[:, None] & (cols < n)[None, :]
        tl.store(pointers(out, rows, cols, n, 1), rounded(acc, dtype), mask=mask)
