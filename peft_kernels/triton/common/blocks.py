# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""What the Triton kernels are made of: addresses, rounding, products, the dropout mask.

Kernels import these by name; each is compiled into its caller.
"""

import triton
import triton.language as tl

from peft_kernels.triton.common import chips

# The interpreter has bfloat16 as raw uint16: it multiplies those integers in tl.dot, and truncates
# where a GPU rounds to nearest. Under it the helpers below widen, and round, by themselves.
# The answer is Triton's own: it takes TRITON_INTERPRET=true and =on for 1 too.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
# The PRECISION of products where Triton has no instructions of the tensor cores: 16-bit operands
# are widened to float32 and multiplied once. Parts of fewer bits would each be a product as slow.
WIDENED = tl.constexpr(chips.WIDENED)


# ---- dependent launches: the rules are in ``dependent.py`` -------------------------------------


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """Lets the launch after this one begin, as soon as all programs of this one have."""
    if PDL and not INTERPRET:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_first(PDL: tl.constexpr):
    """Waits until the launch before this one has ended, and its stores can be read."""
    if PDL and not INTERPRET:
        tl.extra.cuda.gdc_wait()


# ---- scalars, tiles, rounding ------------------------------------------------------------------


@triton.jit
def scalar(value, ON_DEVICE: tl.constexpr):
    """An argument that is a number, or points to a 0-d tensor on the device (no host sync)."""
    if ON_DEVICE:
        return tl.load(value)
    else:
        return value


@triton.jit
def float_scalar(value, ON_DEVICE: tl.constexpr):
    """As `scalar`, in float32: a float64 scale must not widen the tile it multiplies."""
    if ON_DEVICE:
        return tl.load(value).to(tl.float32)
    else:
        return value


@triton.jit
def tile_position(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Walks GROUP_M rows of tiles down before the next column, so that both operands stay in L2."""
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def pointers(base, rows, cols, row_stride, col_stride):
    """[rows, cols] of pointers; the offsets are 64-bit."""
    return base + (
        rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    )


@triton.jit
def step(length: tl.constexpr, stride):
    """How far a pointer moves over ``length`` elements, in 64 bits."""
    return tl.full((), length, tl.int64) * stride


@triton.jit
def rounded(tile, dtype: tl.constexpr):
    """``tile`` (float32) to the nearest value of ``dtype``, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = tile.to(tl.uint32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1)).to(tl.uint32)) >> 16
        bits = tl.where(tile == tile, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return tile.to(dtype)


# ---- products ----------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with float32 sums; PRECISION counts for float32 operands, and if it is WIDENED."""
    if INTERPRET or PRECISION == WIDENED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee" if PRECISION == WIDENED else PRECISION)


@triton.jit
def scales(tile, LIMIT: tl.constexpr, BY_ROW: tl.constexpr = False):
    """Powers of two, ``up`` and 1 / ``up``, that bring the tile's largest element to 2^13.

    float16 ends at 65504 and thins out below 2^-14, where S, dS and adapters may well be. ``up``
    stays below 2^LIMIT, so that a sum multiplied by it stays finite. BY_ROW gives every row its
    own powers, so that no row's rounding depends on another row.
    """
    largest = tl.max(tl.abs(tile), axis=1, keep_dims=True) if BY_ROW else tl.max(tl.abs(tile))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    shift = tl.minimum(tl.maximum(13 - exponent, -100), LIMIT)
    up = ((127 + shift) << 23).to(tl.float32, bitcast=True)
    down = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    return up, down


@triton.jit
def wide_dot(a, wide, acc, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a wide to float32's precision, where ``wide`` may be float32 and ``a`` 16 bits wide.

    wide = the sum of TERMS numbers of a's dtype: 3 of bfloat16's 8 bits, or 2 of float16's 11, hold
    a float32. The big tile goes to the tensor cores as it is; the small one is multiplied again.
    """
    if a.dtype == wide.dtype or PRECISION == WIDENED:
        acc = dot(a, wide, acc, PRECISION)
    else:
        if a.dtype == tl.float16:
            up, down = scales(wide, 60)
            wide = wide * up
            acc = acc * up
        for _ in tl.static_range(TERMS):
            term = rounded(wide, a.dtype)
            acc = dot(a, term, acc, PRECISION)
            wide = wide - term.to(tl.float32)
        if a.dtype == tl.float16:
            acc = acc * down
    return acc


@triton.jit
def joined(wide, dtype: tl.constexpr, SLOTS: tl.constexpr):
    """SLOTS terms of ``dtype`` beside each other for each column of ``wide``, a float32 tile.

    bfloat16's, 2 or 4, the fourth of which is zero. They are one operand of one product where
    `wide_dot` makes one of each; `added_slots` adds up its columns. A tile of ``dtype`` already, or
    one slot, is left as it is.
    """
    if SLOTS == 1 or wide.dtype == dtype:
        return wide
    else:
        high = rounded(wide, dtype)
        rest = wide - high.to(tl.float32)
        middle = rounded(rest, dtype)
        if SLOTS == 2:
            terms = tl.join(high, middle)
        else:
            low = rounded(rest - middle.to(tl.float32), dtype)
            terms = tl.join(tl.join(high, low), tl.join(middle, tl.zeros_like(high)))
        return tl.reshape(terms, (wide.shape[0], SLOTS * wide.shape[1]))


@triton.jit
def slots_of(first, BLOCK_R: tl.constexpr, SLOTS: tl.constexpr):
    """For an operand that lies in terms: each column's rank, and which of its terms it is."""
    columns = tl.arange(0, SLOTS * BLOCK_R)
    return first + columns // SLOTS, columns % SLOTS


@triton.jit
def added_slots(acc, SLOTS: tl.constexpr):
    """The sum of every SLOTS neighbouring columns of a product."""
    if SLOTS == 1:
        return acc
    else:
        return tl.sum(tl.reshape(acc, (acc.shape[0], acc.shape[1] // SLOTS, SLOTS)), axis=2)


@triton.jit
def rank_dot(p, q, acc, dtype: tl.constexpr, PRECISION: tl.constexpr, BY_ROW: tl.constexpr = False):
    """acc + p q for a tile that ends in ``dtype``; p is float32, q float32 or ``dtype``.

    Each operand is rounded to ``dtype`` once: unbiased, and one product at the tensor cores' full
    rate. A second product would take a second accumulator from a Blackwell's tensor memory.
    BY_ROW keeps the rows of the result apart, where those of p belong to different requests.
    """
    if PRECISION == WIDENED:
        acc = dot(p, q, acc, PRECISION)
    else:
        if dtype == tl.float16:
            up, down = scales(p, 30, BY_ROW)
            p = p * up
            if q.dtype == tl.float32:
                q_up, q_down = scales(q, 30)
                q = q * q_up
                up = up * q_up
                down = down * q_down
            acc = acc * up
        if q.dtype != dtype:
            q = rounded(q, dtype)
        acc = dot(rounded(p, dtype), q, acc, PRECISION)
        if dtype == tl.float16:
            acc = acc * down
    return acc


# ---- dropout -----------------------------------------------------------------------------------


@triton.jit
def kept_mask(seed, threshold, rows, first_col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] of booleans, the words of ``peft_kernels/ops/_dropout.py``.

    One Philox call gives the words of four neighbouring columns; first_col is a multiple of 4.
    """
    groups = first_col // 4 + tl.arange(0, BLOCK_N // 4)
    w0, w1, w2, w3 = tl.philox(seed, groups[None, :], rows[:, None], 0, 0)
    # Compared before they are joined: a tile of booleans takes fewer registers than one of words.
    even = tl.join(w0 >= threshold, w2 >= threshold)
    odd = tl.join(w1 >= threshold, w3 >= threshold)
    # join puts its operands on a new last axis, so the order in memory is w0 w1 w2 w3.
    return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_N))
