"""Weights in codes, and LoRA linear over them: nothing of the weight's size is kept, nor written
but where a GPU has many rows.

Element (i, j) of a weight ``[n, k]`` is, where codes and scales lie in planes of their own,

    w[i, j] = value(code[i, j]) unit scale[b] + shift[b]

with b the block of the element: ``e // block`` for element e counted row by row, or where blocks
have several rows the one that holds row i and column j. A code is int8, e4m3, or of 4 bits, two a
byte and the first in the high half, with a book of 16 values. Scales may be in codes themselves
(Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3, double
quantization):

    scale[b] = nested.book[scale_code[b]] nested.scale[b // nested.block] + nested.offset

GGUF's layouts have codes and scales in blocks (``_gguf_blocks.py``); those of HQQ, GPTQ and AWQ are
read by the reference alone (``_packed.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._checks import check_adapter, check_devices, check_float, check_same
from peft_kernels.ops._dropout import dropped, factor_of
from peft_kernels.ops._dtypes import acc_dtype, scale_of
from peft_kernels.ops._gguf_blocks import BLOCKS, dequantize_blocks
from peft_kernels.ops._packed import PACKED, check_packed, dequantize_packed
from peft_kernels.ops._transforms import gradients_of, wants_gradient_composition


class NestedScales(NamedTuple):
    """What the codes of scales mean."""

    scales: Tensor  # float32, one for each block of codes
    book: Tensor  # [256] float32
    block: int
    offset: Tensor  # 0-d float32


class QuantizedWeight(NamedTuple):
    """A frozen weight in codes, in the tensors of whatever library made them."""

    codes: Tensor  # uint8 with two codes a byte, int8 or float8_e4m3fn; any shape, contiguous
    scales: Tensor  # of a float's dtype, one for each block; uint8 where they are nested
    shape: tuple[int, int]  # [n, k]
    block: int  # elements, or of blocks of several rows the columns
    book: Tensor | None = None  # [16] float32
    unit: float = 1.0
    nested: NestedScales | None = None
    shifts: Tensor | None = None  # as scales, one for each block
    layout: str = "planes"  # or one of GGUF's, of which codes are the bytes, or of _packed.py
    block_rows: int = 1


PLANES = "planes"


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight itself, ``[n, k]``, rounded once from float32."""
    return _dequantized(arguments_of(weight), weight.shape[1]).to(dtype)


def _dequantized(arguments: tuple, k: int) -> Tensor:
    codes, scales, shifts, book, nested_scales, nested_book, offset = arguments[:_TENSORS]
    n, block, block_rows, nested_block, unit, layout = arguments[_TENSORS:]
    if layout in PACKED:
        return dequantize_packed(layout, codes, scales, shifts, book, block, n, k)
    if layout != PLANES:
        return dequantize_blocks(layout, codes, n, k)
    scales = scales.flatten()
    if nested_scales is not None:
        scales = scales_of_codes(scales, nested_scales, nested_book, nested_block, offset)

    def by_element(of_blocks: Tensor) -> Tensor:
        if block_rows == 1:
            return of_blocks.float().repeat_interleave(block)[: n * k].view(n, k)
        grid = of_blocks.float().view(-(-n // block_rows), -(-k // block))
        return grid.repeat_interleave(block_rows, 0)[:n].repeat_interleave(block, 1)[:, :k]

    values = _values_of(codes.flatten(), book)[: n * k].view(n, k) * unit * by_element(scales)
    return values if shifts is None else values + by_element(shifts.flatten())


def scales_of_codes(
    codes: Tensor, scales: Tensor, book: Tensor, block: int, offset: float | Tensor
) -> Tensor:
    """What nested codes of scales mean, one after the other."""
    codes = codes.flatten()
    return book[codes.int()] * scales.repeat_interleave(block)[: codes.numel()] + offset


def _values_of(codes: Tensor, book: Tensor | None) -> Tensor:
    if book is None:
        return codes.float()
    return book[torch.stack((codes >> 4, codes & 15), 1).flatten().int()]


def has_kernel(weight: QuantizedWeight) -> bool:
    """Whether kernels read its layout."""
    return weight.layout not in PACKED


def _variant(weight: QuantizedWeight, dtype: torch.dtype) -> str:
    return _library.variant(dtype) if has_kernel(weight) else "_ref"


def arguments_of(weight: QuantizedWeight) -> tuple:
    """What the ops take of it."""
    codes, scales, shape, block, book, unit, nested, shifts, layout, block_rows = weight
    if nested is not None and (unit != 1.0 or shifts is not None):  # kernels take neither beside it
        scales, nested = scales_of_codes(scales, *nested), None
    own: tuple = (None, None, 0, None) if nested is None else nested
    nested_scales, nested_book, nested_block, offset = own
    tensors = codes, scales, shifts, book, nested_scales, nested_book, offset
    return *tensors, shape[0], block, block_rows, nested_block, unit, layout


# ---- ops ---------------------------------------------------------------------------------------

_TENSORS, _COUNT = 7, 13  # of the arguments that are a weight's
_CODES = (
    "Tensor codes, Tensor scales, Tensor? shifts, Tensor? book, Tensor? nested_scales,"
    " Tensor? nested_book, Tensor? nested_offset, int n, int block, int block_rows,"
    " int nested_block, float unit, str layout"
)
_OPTIONS = "float scale, Tensor? scale_t, float dropout_p, Tensor? seed"
FWD_SCHEMA = (
    f"(Tensor x, {_CODES}, Tensor? bias, Tensor lora_a, Tensor lora_b, {_OPTIONS})"
    " -> (Tensor, Tensor)"
)
BWD_SCHEMA = (
    f"(Tensor dy, Tensor x, {_CODES}, Tensor lora_a, Tensor lora_b, Tensor s, {_OPTIONS},"
    " bool needs_x, bool needs_a, bool needs_b) -> (Tensor, Tensor, Tensor)"
)


def _fwd_ref(x, *rest):
    arguments, rest = rest[:_COUNT], rest[_COUNT:]
    bias, lora_a, lora_b, scale, scale_t, dropout_p, seed = rest
    acc = acc_dtype(x)
    s = dropped(x, dropout_p, seed) @ lora_a.to(acc).T
    y = x.to(acc) @ _dequantized(arguments, x.shape[1]).to(acc).T
    y = y + scale_of(scale, scale_t, x) * (s @ lora_b.to(acc).T)
    return (y if bias is None else y + bias.to(acc)).to(x.dtype), s


@_library.outside_autocast
def _composition(x, *rest) -> Tensor:
    """y in differentiable operations, for gradients of gradients."""
    return _fwd_ref(x, *rest)[0]


def _bwd_ref(dy, x, *rest):
    arguments, rest = rest[:_COUNT], rest[_COUNT:]
    lora_a, lora_b, s, scale, scale_t, dropout_p, seed, needs_x, needs_a, needs_b = rest
    acc = acc_dtype(x)
    scale, wide = scale_of(scale, scale_t, x), dy.to(acc)
    ds = scale * (wide @ lora_b.to(acc))
    dx, da, db = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    if needs_x:
        weight = _dequantized(arguments, x.shape[1]).to(acc)
        low_rank = ds @ lora_a.to(acc)
        if seed is not None:
            low_rank *= factor_of(x, dropout_p, seed)
        dx = (wide @ weight + low_rank).to(x.dtype)
    if needs_a:
        da = (ds.T @ dropped(x, dropout_p, seed)).to(lora_a.dtype)
    if needs_b:
        db = (scale * (wide.T @ s)).to(lora_b.dtype)
    return dx, da, db


def _fwd_fake(x, *rest):
    n, lora_a = rest[_TENSORS], rest[_COUNT + 1]
    m, r = x.shape[0], lora_a.shape[0]
    return x.new_empty(m, n), x.new_empty(m, r, dtype=acc_dtype(x))


def _bwd_fake(dy, x, *rest):
    (lora_a, lora_b), needs = rest[_COUNT : _COUNT + 2], rest[-3:]
    shapes = zip((x, lora_a, lora_b), needs, strict=True)
    return tuple(like.new_empty(like.shape if needed else (0,)) for like, needed in shapes)


for _name, _schema, _reference, _fake in (
    ("lora_linear_codes", FWD_SCHEMA, _fwd_ref, _fwd_fake),
    ("lora_linear_codes_bwd", BWD_SCHEMA, _bwd_ref, _bwd_fake),
):
    _launcher = f"peft_kernels.triton.lora_linear_codes.launch:{_name}"
    _library.define(_name, _schema, reference=_reference, fake=_fake, triton=_launcher)


def _unsavable(tensors: tuple) -> list:
    """Those made in inference mode, which autograd doesn't save, and None for the others."""
    if torch.compiler.is_compiling():  # which takes none
        return [None for _ in tensors]
    return [one if one is not None and one.is_inference() else None for one in tensors]


class LoRALinearCodes(torch.autograd.Function):
    """y of rows x; the weight has no gradient, and isn't kept but in its codes."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale, scale_t, dropout_p, seed):
        variant, arguments = _variant(weight, x.dtype), arguments_of(weight)
        fwd = _library.get_op("lora_linear_codes", variant)
        y, s = fwd(x, *arguments, bias, lora_a, lora_b, scale, scale_t, dropout_p, seed)
        tensors = arguments[:_TENSORS]
        ctx.aside = _unsavable(tensors)
        saved = [t if other is None else None for t, other in zip(tensors, ctx.aside, strict=True)]
        ctx.save_for_backward(x, lora_a, lora_b, s, scale_t, seed, *saved)
        ctx.options = scale, dropout_p, variant, arguments[_TENSORS:]
        return y

    @staticmethod
    def backward(ctx, dy):
        x, lora_a, lora_b, s, scale_t, seed, *saved = ctx.saved_tensors
        tensors = [t if other is None else other for t, other in zip(saved, ctx.aside, strict=True)]
        scale, dropout_p, variant, numbers = ctx.options
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        d_bias = dy.sum(0) if ctx.needs_input_grad[2] else None
        if wants_gradient_composition(dy):

            def composed(x, lora_a, lora_b):
                options = scale, scale_t, dropout_p, seed
                return _composition(x, *tensors, *numbers, None, lora_a, lora_b, *options)

            dx, da, db = gradients_of(composed, (x, lora_a, lora_b), needs, dy)
            return dx, None, d_bias, da, db, None, None, None, None
        bwd = _library.get_op("lora_linear_codes_bwd", variant)
        found = bwd(
            dy.contiguous(), x, *tensors, *numbers, lora_a, lora_b, s,
            scale, scale_t, dropout_p, seed, *needs,
        )  # fmt: skip
        dx, da, db = (one if needed else None for one, needed in zip(found, needs, strict=True))
        return dx, None, d_bias, da, db, None, None, None, None


def lora_linear_codes(x, weight: QuantizedWeight, *rest) -> Tensor:
    """y of rows x ``[m, k]``; the rest as of :class:`LoRALinearCodes`."""
    learns = torch.is_grad_enabled() and any(
        isinstance(one, Tensor) and one.requires_grad for one in (x, *rest)
    )
    if learns:
        return LoRALinearCodes.apply(x, weight, *rest)
    op = _library.get_op("lora_linear_codes", _variant(weight, x.dtype))
    return op(x, *arguments_of(weight), *rest)[0]


# ---- checks ------------------------------------------------------------------------------------


def check_codes(x, weight: QuantizedWeight, bias, lora_a, lora_b) -> None:
    """Raises a ValueError or TypeError unless these go together."""
    n, k = weight.shape
    if not x.dim() or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must end in weight's k = {k}")
    if lora_a.dim() != 2 or lora_b.dim() != 2:
        raise ValueError(
            f"lora_a and lora_b must be [r, k] and [n, r]; got {tuple(lora_a.shape)} and "
            f"{tuple(lora_b.shape)}"
        )
    if lora_a.shape[1] != k or lora_b.shape != (n, lora_a.shape[0]):
        raise ValueError(
            f"lora_a and lora_b must be [r, {k}] and [{n}, r]; got {tuple(lora_a.shape)} and "
            f"{tuple(lora_b.shape)}"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, but must be [n] = [{n}]")
    check_float("x", x)
    check_same("x", x, [("bias", bias)])
    check_adapter("x", x, [("lora_a", lora_a)])
    check_same("lora_a", lora_a, [("lora_b", lora_b)])
    check_devices("x", x, [("bias", bias), ("lora_a", lora_a), ("weight.codes", weight.codes)])
    check_weight(weight)


_OF_SCALES = ("scales", "book", "offset")


def check_weight(weight: QuantizedWeight) -> None:
    """Raises a ValueError unless its tensors are those of such a weight, on one device."""
    others = {name: getattr(weight, name) for name in ("scales", "shifts", "book")}
    if weight.nested is not None:
        others |= {f"nested.{name}": getattr(weight.nested, name) for name in _OF_SCALES}
    named = [(f"weight.{name}", tensor) for name, tensor in others.items()]
    check_devices("weight.codes", weight.codes, named)
    if weight.layout == PLANES:
        _check_planes(weight)
    elif weight.layout in PACKED:
        check_packed(weight)
    else:
        _check_blocks(weight)


def _check_blocks(weight: QuantizedWeight) -> None:
    codes, (n, k), layout = weight.codes, weight.shape, weight.layout
    if layout not in BLOCKS:
        known = ", ".join((PLANES, *BLOCKS, *PACKED))
        raise ValueError(f"weight.layout must be one of {known}; got {layout!r}")
    elements, size = BLOCKS[layout]
    if k % elements:
        raise ValueError(f"{layout} has blocks of {elements}, by which k = {k} can't be divided")
    _check_codes(codes, torch.uint8, n * k // elements * size, weight.shape)


def _check_codes(codes: Tensor, dtype: torch.dtype, count: int, shape: tuple[int, int]) -> None:
    if codes.dtype is not dtype or codes.numel() != count or not codes.is_contiguous():
        raise ValueError(
            f"weight.codes must be {count} contiguous {dtype} for a weight {list(shape)}; "
            f"got {codes.numel()} of {codes.dtype}"
        )


def _check_planes(weight: QuantizedWeight) -> None:
    codes, scales, (n, k), block, book, _, nested, shifts, _, block_rows = weight
    if block < 1 or block_rows < 1:
        raise ValueError(
            f"weight.block and weight.block_rows must be at least 1; got {block} and {block_rows}"
        )
    blocks = -(-n * k // block) if block_rows == 1 else -(-n // block_rows) * -(-k // block)
    if book is not None:
        _check_codes(codes, torch.uint8, -(-n * k // 2), weight.shape)
        if book.shape != (16,):
            raise ValueError(f"weight.book must be [16]; got {tuple(book.shape)}")
        _check_floats("book", book)
    else:
        in_floats = codes.dtype is torch.float8_e4m3fn
        _check_codes(codes, codes.dtype if in_floats else torch.int8, n * k, weight.shape)
    kind = scales.dtype if nested is None and scales.is_floating_point() else torch.float32
    _check_scales("scales", scales, kind if nested is None else torch.uint8, blocks, block)
    if shifts is not None:
        _check_scales("shifts", shifts, kind, blocks, block)
    if nested is None:
        return
    wanted = -(-blocks // max(nested.block, 1))
    if nested.block < 1 or nested.scales.numel() != wanted or nested.book.shape != (256,):
        raise ValueError(
            f"weight.nested must have a book of 256 and {wanted} scales, one for each "
            f"{nested.block} codes; got {tuple(nested.book.shape)} and {nested.scales.numel()}"
        )
    if nested.offset.numel() != 1:
        got = tuple(nested.offset.shape)
        raise ValueError(f"weight.nested.offset must be one number; got {got}")
    for name in _OF_SCALES:
        _check_floats(f"nested.{name}", getattr(nested, name))


def _check_floats(name: str, given: Tensor) -> None:
    """Kernels read it in no other dtype, and no strides."""
    if given.dtype is not torch.float32 or not given.is_contiguous():
        raise ValueError(
            f"weight.{name} must be contiguous float32; got {given.dtype}, strides {given.stride()}"
        )


def _check_scales(name: str, given: Tensor, dtype: torch.dtype, count: int, block: int) -> None:
    if given.dtype is not dtype or given.numel() != count or not given.is_contiguous():
        raise ValueError(
            f"weight.{name} must be {count} contiguous {dtype}, one for each {block} elements; "
            f"got {given.numel()} of {given.dtype}"
        )
