# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""A tile of a weight in codes, widened to float32 where it is used.

`weight_tile` is what kernels call. Planes whose scales lie evenly in the rows are read in runs:
each byte once for both of its codes, each scale once for its run. Any other weight is read element
by element, as its definition in ``ops/_quantized.py`` and ``ops/_gguf_blocks.py`` says.
"""

import triton
import triton.language as tl

# ---- numbers -----------------------------------------------------------------------------------


@triton.jit
def _of_byte(code, E4M3: tl.constexpr):
    """An int8, or the e4m3 that a uint8 holds; older chips have no conversion of the latter."""
    if E4M3:
        bits = code.to(tl.int32)
        exponent = (bits >> 3) & 15
        normal = ((exponent + 120) << 23) | ((bits & 7) << 20)
        value = normal.to(tl.float32, bitcast=True)
        value = tl.where(exponent == 0, (bits & 7).to(tl.float32) * 0.001953125, value)  # 2^-9
        value = tl.where((bits & 127) == 127, float("nan"), value)
        return tl.where(bits >= 128, -value, value)
    else:
        return code.to(tl.float32)


@triton.jit
def _scale_at(
    scales, nested_scales, nested_book, nested_offset, block, mask, NESTED_BLOCK: tl.constexpr
):  # fmt: skip
    if NESTED_BLOCK > 0:
        code = tl.load(scales + block, mask=mask, other=0).to(tl.int32)
        outer = tl.load(nested_scales + block // NESTED_BLOCK, mask=mask, other=0.0)
        return tl.load(nested_book + code, mask=mask, other=0.0) * outer + tl.load(nested_offset)
    else:
        return tl.load(scales + block, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _half_at(bytes, mask):
    """The float16 in two bytes, which need not be aligned."""
    low = tl.load(bytes, mask=mask, other=0).to(tl.uint16)
    high = tl.load(bytes + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _byte_at(bytes, mask):
    return tl.load(bytes, mask=mask, other=0).to(tl.int32)


# ---- tiles -------------------------------------------------------------------------------------


@triton.jit
def weight_tile(
    codes, scales, shifts, book, nested_scales, nested_book, nested_offset, unit, rows, first, n, k,
    LAYOUT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, E4M3: tl.constexpr, IN_RUNS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """w[rows, first : first + COLS] in float32; ``first`` is a multiple of COLS.

    LAYOUT is "planes" or one of GGUF's. BLOCK is 0 where a scale has a whole row, -1 where it has
    the whole weight. Beyond n and k lies whatever a row's own scales make of the code 0.
    """
    if IN_RUNS:
        return _in_runs(
            codes, scales, shifts, book, nested_scales, nested_book, nested_offset, unit,
            rows, first, n, k, BLOCK, NESTED_BLOCK, E4M3, COLS,
        )  # fmt: skip
    i = rows[:, None]
    j = (first + tl.arange(0, COLS))[None, :]
    mask = (i < n) & (j < k)
    if LAYOUT == "planes":
        return _of_planes(
            codes, scales, shifts, book, nested_scales, nested_book, nested_offset, unit,
            i, j, mask, k, BLOCK, BLOCK_ROWS, NESTED_BLOCK, E4M3,
        )  # fmt: skip
    elif LAYOUT == "q4_K":
        return _q4_k(codes + _blocks_before(i, j, k, 256) * 144, j % 256, mask)
    elif LAYOUT == "q6_K":
        return _q6_k(codes + _blocks_before(i, j, k, 256) * 210, j % 256, mask)
    elif LAYOUT == "q8_0":
        block = codes + _blocks_before(i, j, k, 32) * 34
        code = tl.load(block + 2 + j % 32, mask=mask, other=0).to(tl.int8, bitcast=True)
        return code.to(tl.float32) * _half_at(block, mask)
    elif LAYOUT == "q4_0":
        block = codes + _blocks_before(i, j, k, 32) * 18
        return _half_at(block, mask) * (_nibble_of_32(block + 2, j % 32, mask) - 8.0)
    else:
        tl.static_assert(LAYOUT == "q4_1")
        block = codes + _blocks_before(i, j, k, 32) * 20
        return _half_at(block, mask) * _nibble_of_32(block + 4, j % 32, mask) + _half_at(
            block + 2, mask
        )


@triton.jit
def _in_runs(
    codes, scales, shifts, book, nested_scales, nested_book, nested_offset, unit, rows, first, n, k,
    BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, E4M3: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Planes of which every row has the same blocks, of a power of two elements or of all."""
    ROWS: tl.constexpr = rows.shape[0]
    RUN: tl.constexpr = COLS if BLOCK <= 0 or BLOCK > COLS else BLOCK
    RUNS: tl.constexpr = COLS // RUN
    inside = (rows < n)[:, None]
    wide_rows = rows.to(tl.int64)[:, None]

    # 1. codes
    if book is None:
        cols = first + tl.arange(0, COLS)
        code = tl.load(codes + wide_rows * k + cols[None, :], mask=inside & (cols < k), other=0)
        values = _of_byte(code, E4M3)
    else:
        pairs = first // 2 + tl.arange(0, COLS // 2)
        mask = inside & (pairs < k // 2)[None, :]
        pair = tl.load(codes + wide_rows * (k // 2) + pairs[None, :], mask=mask, other=0)
        pair = pair.to(tl.int32)
        values = tl.reshape(
            tl.join(tl.load(book + (pair >> 4)), tl.load(book + (pair & 15))), (ROWS, COLS)
        )

    # 2. a scale, and a shift, for each run
    if BLOCK == -1:
        block = tl.zeros((ROWS, 1), tl.int64)
        mask = inside
    elif BLOCK == 0:
        block = wide_rows
        mask = inside
    else:
        runs = first // BLOCK + tl.arange(0, RUNS)
        block = wide_rows * (k // BLOCK) + runs[None, :]
        mask = inside & (runs < k // BLOCK)[None, :]
    scale = unit * _scale_at(
        scales, nested_scales, nested_book, nested_offset, block, mask, NESTED_BLOCK
    )
    values = tl.reshape(values, (ROWS, RUNS, RUN)) * scale[:, :, None]
    if shifts is not None:
        shift = tl.load(shifts + block, mask=mask, other=0.0).to(tl.float32)
        values += shift[:, :, None]
    return tl.reshape(values, (ROWS, COLS))


@triton.jit
def _of_planes(
    codes, scales, shifts, book, nested_scales, nested_book, nested_offset, unit, i, j, mask, k,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    E4M3: tl.constexpr,
):  # fmt: skip
    element = i.to(tl.int64) * k + j
    if book is None:
        value = _of_byte(tl.load(codes + element, mask=mask, other=0), E4M3)
    else:
        pair = _byte_at(codes + element // 2, mask)
        value = tl.load(book + tl.where(element % 2 == 0, pair >> 4, pair & 15))
    if BLOCK == -1:
        block = tl.zeros_like(element)
    elif BLOCK == 0:
        block = i + tl.zeros_like(element)
    elif BLOCK_ROWS > 1:
        block = (i // BLOCK_ROWS).to(tl.int64) * tl.cdiv(k, BLOCK) + j // BLOCK
    else:
        block = element // BLOCK
    value *= unit * _scale_at(
        scales, nested_scales, nested_book, nested_offset, block, mask, NESTED_BLOCK
    )
    if shifts is not None:
        value += tl.load(shifts + block, mask=mask, other=0.0).to(tl.float32)
    return value


# ---- GGUF's blocks -----------------------------------------------------------------------------


@triton.jit
def _blocks_before(i, j, k, ELEMENTS: tl.constexpr):
    return i.to(tl.int64) * (k // ELEMENTS) + j // ELEMENTS


@triton.jit
def _nibble_of_32(bytes, e, mask):
    """Element e of 32 in 16 bytes: the low halves come first."""
    byte = _byte_at(bytes + e % 16, mask)
    return tl.where(e < 16, byte & 15, byte >> 4).to(tl.float32)


@triton.jit
def _q4_k(block, e, mask):
    part = e // 32
    # The scale c of the part and its shift f, of 6 bits: the first four parts have bytes of their
    # own, the others the last four bytes' halves and the first eight's high bits.
    low = _byte_at(block + 4 + part % 4, mask)
    middle = _byte_at(block + 8 + part % 4, mask)
    last = _byte_at(block + 12 + part % 4, mask)
    early = part < 4
    c = tl.where(early, low & 63, (last & 15) | (low >> 6 << 4)).to(tl.float32)
    f = tl.where(early, middle & 63, (last >> 4) | (middle >> 6 << 4)).to(tl.float32)
    byte = _byte_at(block + 16 + e // 64 * 32 + e % 32, mask)
    code = tl.where(part % 2 == 0, byte & 15, byte >> 4).to(tl.float32)
    return code * (_half_at(block, mask) * c) - _half_at(block + 2, mask) * f


@triton.jit
def _q6_k(block, e, mask):
    half = e // 128
    within = e % 128
    low = _byte_at(block + half * 64 + within % 64, mask)
    low = tl.where(within < 64, low & 15, low >> 4)
    high = _byte_at(block + 128 + half * 32 + e % 32, mask) >> (within // 32 * 2) & 3
    scale = tl.load(block + 192 + e // 16, mask=mask, other=0).to(tl.int8, bitcast=True)
    code = (low | (high << 4)).to(tl.float32) - 32.0
    return code * (_half_at(block + 208, mask) * scale.to(tl.float32))
