"""The weight in codes of a layer, whichever library's.

A library's file may say more than how it reads: ``dtype_of`` a layer, in which its values were
before; ``requantised``, how new values are put into codes like a layer's; ``take_scales``, how a
state dict's beside the codes are taken over; ``restate``, how a weight that was made anew says what
its codes mean; ``keep_codes`` and ``give_back``, how a layer's own calls are kept from changing its
codes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.codes import bitsandbytes, gptqmodel, hqq, kept, torchao, transformers
from peft_kernels.codes.reading import NOT_YET, Reader
from peft_kernels.ops import QuantizedWeight
from peft_kernels.ops._quantized import check_weight

LIBRARIES = (bitsandbytes, torchao, transformers, kept, hqq, gptqmodel)
# Of whose layers ours with adapters take the place: they have a Parameter of codes.
OTHERS = (bitsandbytes, torchao, transformers, kept)


def is_in_codes(module: nn.Module) -> bool:
    """Whether :func:`read_codes` reads such layers: their class, or an nn.Linear's weight."""
    return _reader_of(module, type(module)) is not None


def is_of_others(module: nn.Module) -> bool:
    """:func:`is_in_codes`, by another library."""
    found = _library_of(module, type(module))
    return found is not None and found[0] in OTHERS


def read_codes(module: nn.Module, kind: type | None = None) -> QuantizedWeight | str | None:
    """The weight of a layer, over its own tensors.

    Args:
        module: the layer, or another module that has its parameters, buffers and attributes.
        kind: the layer's class, where ``module`` is another one.

    Returns:
        The weight; why it can't be read; or None where no library known here has such a layer.
    """
    reader = _reader_of(module, kind or type(module))
    return None if reader is None else reader(module)


def codes_of(module: nn.Module, kind: type | None = None) -> QuantizedWeight:
    """:func:`read_codes`, or a TypeError that says why not."""
    found = read_codes(module, kind)
    if isinstance(found, QuantizedWeight):
        return found
    name = name_of(module, kind or type(module))
    advice = _ADVICE.get(found or "", "load the model without this quantization config")
    raise TypeError(f"has, as a {name}, {found or 'a weight in no codes known'}: {advice}")


def name_of(module: nn.Module, kind: type) -> str:
    """The layer's class, and of a plain layer its weight's too."""
    weight = module._parameters.get("weight")
    return f"Linear of {type(weight).__name__}" if kind is nn.Linear else kind.__name__


_ADVICE = {
    NOT_YET: "move the model to the device that it runs on, where the library quantises it",
    bitsandbytes.PACKED: (
        "bitsandbytes did that in place as the layer was evaluated, and rounded its scales; load "
        "the quantised model again, and give it adapters before it is evaluated"
    ),
    bitsandbytes.OUTLIERS: "load the model with llm_int8_threshold=0.0",
    bitsandbytes.LOST: "bitsandbytes keeps them at the weight alone; shard a model of 4 bits",
}


def readable(layers: Mapping[str, nn.Module]) -> set[nn.Module]:
    """Those of the layers, of other libraries', whose weights are in codes.

    Raises:
        TypeError: one can't be read; the layer's name is in it.
        ValueError: one's tensors don't go together, or are on several devices.
    """
    found = {name: layer for name, layer in layers.items() if is_of_others(layer)}
    for name, layer in found.items():
        try:
            check_weight(codes_of(layer))
        except TypeError as error:
            raise TypeError(f"{name or 'model'} {error}") from None
        except ValueError as error:
            raise ValueError(f"{name or 'model'} can't be read: {error}") from None
    return set(found.values())


def _reader_of(module: nn.Module, kind: type) -> Reader | None:
    found = _library_of(module, kind)
    return None if found is None else found[1]


def _library_of(module: nn.Module, kind: type) -> tuple[ModuleType, Reader] | None:
    """The file of a layer's library, and its reader of such layers."""
    if kind is nn.Linear:
        kind = type(module._parameters.get("weight"))
    if (found := _FOUND.get(kind)) is not None:
        return found
    for library in LIBRARIES:
        if (reader := library.readers().get(kind)) is not None:
            return _FOUND.setdefault(kind, (library, reader))
    return None


_FOUND: dict[type, tuple[ModuleType, Reader]] = {}  # a layer looks its own up in each call


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a layer's weight before it was put into codes; float32 if that isn't known."""
    say = _of_library(module, type(module), "dtype_of")
    return torch.float32 if say is None else say(module)


def keep_codes(model: nn.Module) -> None:
    """Has evaluation of the libraries' own layers leave their codes as they are.

    bitsandbytes packs them in place there on some CPUs, for a product in bfloat16: training that
    follows has no gradient for the layer's input, silently, and what lies below learns nothing.
    Those that are packed already are unpacked, and a RuntimeWarning says so.
    """
    unpacked = []
    for name, module in model.named_modules():
        keep = _of_library(module, type(module), "keep_codes")
        if keep is not None and keep(module):
            unpacked.append(name)
    if unpacked:
        warnings.warn(
            f"{len(unpacked)} layers, such as {unpacked[0]}, had their codes packed for bfloat16 "
            "by an evaluation, and would give their inputs no gradient; they were unpacked, and "
            "their scales stay rounded to bfloat16. Give a model adapters, or accelerate() it, "
            "before it is evaluated",
            RuntimeWarning,
            stacklevel=4,
        )


def give_back(model: nn.Module) -> None:
    """Lets them do as they do without adapters."""
    for module in model.modules():
        if (give := _of_library(module, type(module), "give_back")) is not None:
            give(module)


def requantised(module: nn.Module, kind: type, values: Tensor) -> tuple[nn.Parameter, dict]:
    """Values ``[n, k]`` in codes as a layer's are: the weight, and the attributes that go with it.

    Raises:
        TypeError: layers of this class can't be.
    """
    make = _of_library(module, kind, "requantised")
    if make is None:
        raise TypeError(
            f"requantize must be False over {name_of(module, kind)}: codes are only read"
        )
    return make(module, kind, values)


def restate(module: nn.Module, kind: type) -> None:
    """Has a weight that was made anew, as fully_shard does, say again what its codes mean.

    ``module`` is as of :func:`read_codes`.
    """
    say = _of_library(module, kind, "restate")
    if say is not None:
        say(module, kind)


def take_scales(
    module: nn.Module,
    kind: type,
    state_dict: Mapping[str, Any],
    prefix: str,
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Takes over what a state dict has beside the codes, which torch has taken over by then.

    ``module`` is as of :func:`read_codes`, the rest as of ``nn.Module._load_from_state_dict``.
    """
    take = _of_library(module, kind, "take_scales")
    if take is not None:
        take(module, kind, state_dict, prefix, unexpected, errors)


def _of_library(module: nn.Module, kind: type, name: str) -> Any:
    """What the file of a layer's library has by this name, if it has anything."""
    found = _library_of(module, kind)
    return None if found is None else getattr(found[0], name, None)
