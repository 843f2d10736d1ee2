"""A weight in codes that a module keeps itself, in integers that no cast can touch.

Codes are its Parameter ``weight``, frozen, and the tensors that go with them buffers, the bits of
each as they are: ``model.half()`` and the like would else round scales, and codes of float8 with
them. ``coded`` says what they stand for; a state dict has it as a tensor.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.codes.reading import Reader
from peft_kernels.ops import NestedScales, QuantizedWeight, quantize

_OWNER = "peft_kernels.nn.quantized_linear"
_PREFIX = "weight_"  # of the buffers
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Coded(NamedTuple):
    """What a weight is beside its tensors."""

    shape: tuple[int, int]
    block: int
    block_rows: int
    unit: float
    layout: str
    nested_block: int | None
    dtypes: dict[str, str]  # of the tensors by name


def readers() -> dict[type, Reader]:
    """What reads this package's own layer."""
    owner: Any = sys.modules.get(_OWNER)
    return {} if owner is None else {owner.QuantizedLinear: kept_weight}


def keep_weight(module: nn.Module, weight: QuantizedWeight) -> None:
    """Makes the tensors of a weight those of the module, over the same memory."""
    tensors = _tensors_of(weight)
    bits = {name: own.detach().view(_INTEGERS[own.element_size()]) for name, own in tensors.items()}
    codes = bits.pop("codes")
    # In a shape that no dense weight has: nobody takes codes for values.
    codes = codes.view(-1, 1) if codes.shape == weight.shape else codes
    module._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
    for name, tensor in bits.items():
        module.register_buffer(_PREFIX + name, tensor)
    nested = weight.nested
    module.coded = Coded(  # type: ignore[assignment]
        (weight.shape[0], weight.shape[1]),
        weight.block,
        weight.block_rows,
        weight.unit,
        weight.layout,
        None if nested is None else nested.block,
        {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
    )


def kept_weight(module: nn.Module) -> QuantizedWeight:
    """The weight that :func:`keep_weight` put there."""
    coded: Any = module.__dict__["coded"]
    parameters: Any = module._parameters
    buffers: Any = module._buffers
    own = {}
    for name, dtype in coded.dtypes.items():
        tensor = parameters["weight"] if name == "codes" else buffers[_PREFIX + name]
        own[name] = tensor.detach().view(getattr(torch, dtype))
    nested = None
    if coded.nested_block is not None:
        nested = NestedScales(
            own["nested_scales"], own["nested_book"], coded.nested_block, own["nested_offset"]
        )
    return QuantizedWeight(
        own["codes"],
        own["scales"],
        coded.shape,
        coded.block,
        own.get("book"),
        coded.unit,
        nested,
        own.get("shifts"),
        coded.layout,
        coded.block_rows,
    )


def dtype_of(module: Any) -> torch.dtype:
    """The one in which the layer's weight is read."""
    return module._buffers["_like"].dtype


def requantised(module: Any, kind: type, values: Tensor) -> tuple[nn.Parameter, dict[str, Any]]:
    """By :func:`peft_kernels.ops.quantize`, or over a GGUF file's blocks by ``gguf``."""
    made = nn.Module()
    keep_weight(made, _quantised_like(kept_weight(module), values.to(dtype_of(module))))
    codes: Any = made._parameters["weight"]
    return codes, {"_buffers": {**module._buffers, **made._buffers}}


def _quantised_like(old: QuantizedWeight, values: Tensor) -> QuantizedWeight:
    if old.layout != "planes":
        return _blocks_like(old, values)
    if old.codes.dtype is torch.int8:
        return quantize(values, "int8")
    if old.codes.dtype is torch.float8_e4m3fn:
        row = old.shape[1]
        shared = "block" if old.block_rows > 1 else "row" if old.block == row else "tensor"
        return quantize(values, "fp8", by=shared)
    for kind in ("nf4", "fp4"):
        made = quantize(values, kind, block=old.block, nested=old.nested is not None)
        if old.book is not None and made.book is not None and torch.equal(made.book, old.book):
            return made
    raise TypeError("requantize must be False over codes with a book of their own")


def _blocks_like(old: QuantizedWeight, values: Tensor) -> QuantizedWeight:
    """By the ``gguf`` package, in blocks like a file's."""
    gguf: Any = importlib.import_module("gguf")
    kind = gguf.GGMLQuantizationType[old.layout.upper()]
    try:
        made = gguf.quantize(values.float().cpu().numpy(), kind)
    except NotImplementedError:
        raise TypeError(
            f"requantize must be False over {old.layout}: gguf reads its blocks and writes none"
        ) from None
    codes = torch.from_numpy(made).to(old.codes.device).view_as(old.codes)
    return old._replace(codes=codes)


def take_scales(
    module: Any,
    kind: type,
    state_dict: Mapping[str, Any],
    prefix: str,
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Scales are buffers; what is looked at is whether codes mean there what they mean here."""
    key = f"{prefix}coded"
    if key in state_dict:
        found = of_tensor(state_dict[key])
        if found != module.coded:
            errors.append(f"{prefix}weight must be in the codes {module.coded}; got {found}")
    elif f"{prefix}weight" in state_dict:
        errors.append(f"{prefix}weight is in codes, and the state dict must have {key} too")
    unexpected[:] = [one for one in unexpected if one != key]


def _tensors_of(weight: QuantizedWeight) -> dict[str, Tensor]:
    named = {name: getattr(weight, name) for name in ("codes", "scales", "shifts", "book")}
    if weight.nested is not None:
        scales, book, _, offset = weight.nested
        named |= {"nested_scales": scales, "nested_book": book, "nested_offset": offset}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def as_tensor(coded: Coded) -> Tensor:
    """What a weight is, for a state dict that holds tensors alone."""
    return torch.frombuffer(bytearray(json.dumps(coded).encode()), dtype=torch.uint8)


def of_tensor(tensor: Tensor) -> Coded:
    """What :func:`as_tensor` made a tensor of."""
    shape, *rest = json.loads(bytes(tensor.cpu().tolist()))
    return Coded(tuple(shape), *rest)
