"""The layer below one of PEFT's, in codes of whatever library."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels.codes.layers import is_in_codes, name_of, read_codes
from peft_kernels.integrations.served import is_plain, what_is_called
from peft_kernels.ops import QuantizedWeight


class Base(NamedTuple):
    """The layer below."""

    weight: QuantizedWeight
    bias: Tensor | None


def read_base(layer: nn.Module) -> Base | str:
    """The weight in codes and the bias of the layer below, or why a kernel can't take them."""
    module: Any = layer._modules["base_layer"]
    found = None
    if is_plain(module) and not _has_any_global_hook():
        found = read_codes(module)
    if found is None:
        kind = type(module)
        called = what_is_called(module, (kind,)) if is_in_codes(module) else name_of(module, kind)
        return f"base_layer: {called}"
    if isinstance(found, str):
        return f"base_layer: {found}"
    return Base(found, getattr(module, "bias", None))
