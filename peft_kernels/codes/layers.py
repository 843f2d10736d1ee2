"""The weight in codes of a layer, whichever library's."""

from __future__ import annotations

from torch import nn

from peft_kernels.codes import bitsandbytes, kept, torchao, transformers
from peft_kernels.codes.reading import Reader
from peft_kernels.ops import QuantizedWeight

LIBRARIES = (bitsandbytes, torchao, transformers, kept)


def is_in_codes(module: nn.Module) -> bool:
    """Whether :func:`read_codes` reads such layers: their class, or an nn.Linear's weight."""
    return _reader_of(module, type(module)) is not None


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


def _reader_of(module: nn.Module, kind: type) -> Reader | None:
    if kind is nn.Linear:
        kind = type(module._parameters.get("weight"))
    return next((own[kind] for library in LIBRARIES if kind in (own := library.readers())), None)
