"""torchao's tensors of int8, int4 in bytes, nf4 and float8, as the weights of nn.Linear.

Its affine weights are (code - zero) scale, in blocks of a row, of rows or of all; with zeros that
aren't 0 each block has the shift -zero scale, in float32. Of NF4Tensor (Dettmers et al. 2023,
"QLoRA: Efficient Finetuning of Quantized LLMs") scales are int8 codes over a factor, plus their
mean; torchao makes them in the tensor's dtype, and rounds them there where that is a half.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.codes.reading import Reader
from peft_kernels.ops import NestedScales, QuantizedWeight

ROUNDS_X = "x in codes as well"
SCALES_X = "x scaled by column"
STRIDED = "codes that don't lie one after another"
BLOCKS = "blocks that don't divide the weight"
FLOAT8 = "a float8 that isn't e4m3fn"


def readers() -> dict[type, Reader]:
    """What reads an nn.Linear with which tensor of the library's as its weight."""
    library: Any = sys.modules.get("torchao.quantization.quantize_.workflows")
    if library is None:
        return {}
    return {
        library.Int8Tensor: _affine_of,
        library.IntxUnpackedToInt8Tensor: _affine_of,
        library.Float8Tensor: _affine_of,
        library.NF4Tensor: _nf4_of,
    }


def _affine_of(module: Any) -> QuantizedWeight | str:
    weight = module._parameters["weight"]
    for name in ("act_quant_kwargs", "activation_quantization"):
        if getattr(weight, name, None) is not None:
            return ROUNDS_X
    if getattr(weight, "act_pre_scale", None) is not None:
        return SCALES_X
    codes, scales, shifts = weight.qdata, weight.scale, None
    zeros = getattr(weight, "zero_point", None)
    if codes.dtype not in (torch.int8, torch.float8_e4m3fn):
        return FLOAT8
    if not (codes.is_contiguous() and scales.is_contiguous()):
        return STRIDED
    (n, k), (rows, block) = codes.shape, weight.block_size
    if n % rows or k % block:
        return BLOCKS
    if zeros is not None and _has_any(zeros):
        scales = scales.float()
        shifts = zeros.to(torch.float32, copy=True).mul_(scales).neg_()
    if rows == n and block == k:
        rows, block = 1, n * k
    return QuantizedWeight(codes, scales, (n, k), block, shifts=shifts, block_rows=rows)


def _has_any(zeros: Tensor) -> bool:
    """Whether any isn't 0; in a graph or on meta, where nobody knows, they may be."""
    if torch.compiler.is_compiling() or zeros.is_meta:
        return True
    low, high = zeros.aminmax()  # much faster than any()
    return bool(low) or bool(high)


def _nf4_of(module: Any) -> QuantizedWeight | str:
    weight = module._parameters["weight"]
    codes, factors = weight.quantized_data, weight.quantization_factor
    if not (codes.is_contiguous() and weight.is_contiguous()):
        return STRIDED
    nested, scales = None, weight.quantized_scalers
    if weight.dtype is factors.dtype is torch.float32:  # float() changes the first alone
        nested = NestedScales(
            factors.reciprocal(),
            _signed(codes.device),
            weight.scaler_block_size,
            weight.scaler_mean,
        )
        scales = scales.view(torch.uint8)
    else:
        scales = weight.dequantize_scalers(scales, factors, weight.scaler_block_size)
    n, k = weight.shape
    return QuantizedWeight(
        codes, scales, (n, k), weight.block_size, weight.nf4.float(), nested=nested
    )


def _signed(device: torch.device) -> Tensor:
    """What the bytes of int8 mean."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.int8).float()


def dtype_of(module: Any) -> torch.dtype:
    """That of the tensor, as it says itself."""
    return module._parameters["weight"].dtype


def requantised(module: Any, kind: type, values: Tensor) -> tuple[nn.Parameter, dict[str, Any]]:
    """By torchao itself, in blocks and bits like the weight's; with zeros where that has any."""
    weight = module._parameters["weight"]
    made = _MAKE[type(weight).__name__](weight, values.to(weight.dtype))
    return nn.Parameter(made, requires_grad=False), {}


def _int8_like(old: Any, values: Tensor) -> Tensor:
    return type(old).from_hp(
        values, _shared_by(old), _mapping_of(old), reduce_range=bool(old.reduce_range)
    )


def _intx_like(old: Any, values: Tensor) -> Tensor:
    return type(old).from_hp(
        values, tuple(old.block_size), old.target_dtype, mapping_type=_mapping_of(old)
    )


def _float8_like(old: Any, values: Tensor) -> Tensor:
    return type(old).from_hp(
        values, old.qdata.dtype, _shared_by(old), kernel_preference=old.kernel_preference
    )


def _nf4_like(old: Any, values: Tensor) -> Tensor:
    return type(old).from_tensor(values, old.block_size, old.scaler_block_size)


_MAKE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8_like,
    "IntxUnpackedToInt8Tensor": _intx_like,
    "Float8Tensor": _float8_like,
    "NF4Tensor": _nf4_like,
}


def _shared_by(weight: Any) -> Any:
    """The granularity that torchao makes blocks like the weight's of."""
    shares: Any = sys.modules["torchao.quantization"].granularity
    (n, k), (rows, block) = weight.shape, weight.block_size
    if (rows, block) == (n, k):
        return shares.PerTensor()
    if rows > 1:
        return shares.PerBlock([rows, block])
    return shares.PerRow() if block == k else shares.PerGroup(block)


def _mapping_of(weight: Any) -> Any:
    kinds = sys.modules["torchao.quantization"].MappingType
    zeros = weight.zero_point
    return kinds.SYMMETRIC if zeros is None or not _has_any(zeros) else kinds.ASYMMETRIC
