"""The layer below one of PEFT's, in codes of whatever library."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels.integrations.peft.codes import bitsandbytes
from peft_kernels.integrations.peft.codes.reading import Reader
from peft_kernels.integrations.served import is_plain, what_is_called
from peft_kernels.ops import QuantizedWeight

LIBRARIES = (bitsandbytes,)


class Base(NamedTuple):
    """The layer below."""

    weight: QuantizedWeight
    bias: Tensor | None


def read_base(layer: nn.Module) -> Base | str:
    """The weight in codes and the bias of the layer below, or why a kernel can't take them."""
    module: Any = layer._modules["base_layer"]
    reader = _reader_of(type(module))
    if reader is None or not is_plain(module) or _has_any_global_hook():
        kinds = () if reader is None else (type(module),)
        return f"base_layer: {what_is_called(module, kinds)}"
    found = reader(module)
    return found if isinstance(found, str) else Base(found, module._parameters["bias"])


def _reader_of(kind: type) -> Reader | None:
    return next((own[kind] for library in LIBRARIES if kind in (own := library.readers())), None)
