"""The weight in codes of a layer, whichever library's."""

from __future__ import annotations

from torch import nn

from peft_kernels.codes import bitsandbytes
from peft_kernels.codes.reading import Reader
from peft_kernels.ops import QuantizedWeight

LIBRARIES = (bitsandbytes,)


def is_in_codes(module: nn.Module) -> bool:
    """Whether a layer is of a class whose weight :func:`read_codes` reads."""
    return _reader_of(type(module)) is not None


def read_codes(module: nn.Module, kind: type | None = None) -> QuantizedWeight | str | None:
    """The weight of a layer, over its own tensors.

    Args:
        module: the layer, or another module that has its parameters, buffers and attributes.
        kind: the layer's class, where ``module`` is another one.

    Returns:
        The weight; why it can't be read; or None where no library known here has such a class.
    """
    reader = _reader_of(kind or type(module))
    return None if reader is None else reader(module)


def _reader_of(kind: type) -> Reader | None:
    return next((own[kind] for library in LIBRARIES if kind in (own := library.readers())), None)
