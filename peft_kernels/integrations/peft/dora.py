"""DoRA in PEFT's layers: the magnitude of an adapter, and the layer's product with it.

PEFT adds to the base's output what DoRA makes of it, dropout or not:

    y = W x + b + (g - 1) W d(x) + scale g B A d(x)        d(x) is dropout(x), or x
      = g (W + scale B A) d(x) + W (x - d(x)) + b
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from peft_kernels.integrations.peft.whole import is_whole
from peft_kernels.integrations.served import is_plain, what_is_called
from peft_kernels.nn.norms import Norms
from peft_kernels.ops import QuantizedWeight, dora_linear
from peft_kernels.ops.lora_linear import linear_of_codes

NORMS = "_peft_kernels_norms"  # in a layer's __dict__: what is kept of each adapter's norm


def read_magnitude(layer: nn.Module, name: str) -> Tensor | str:
    """The magnitude of an adapter that is a variant, or why a kernel can't take it."""
    variant = layer.__dict__["lora_variant"][name]
    if type(variant) is not DoraLinearVariant:
        return type(variant).__name__
    children: Any = layer._modules["lora_magnitude_vector"]
    module = children._modules[name]
    if type(module) is not DoraLinearLayer or not is_plain(module):
        return f"lora_magnitude_vector: {what_is_called(module, (DoraLinearLayer,))}"
    magnitude: Any = module._parameters.get("weight")
    if not is_whole(magnitude, 1):
        return "lora_magnitude_vector: a weight that isn't whole"
    return magnitude


def dora(layer: nn.Module, x: Tensor, base: Any, adapter: Any) -> Tensor:
    """The output of a layer whose one active adapter is ``adapter``.

    Args:
        base, adapter: what :mod:`peft_kernels.integrations.peft.state` read.
    """
    kept = layer.__dict__.setdefault(NORMS, {}).setdefault(adapter.name, Norms())
    norm = kept.of(base.weight, adapter.a, adapter.b, adapter.scale)
    dropped, bias, rest = x, base.bias, None
    if adapter.dropout_p:
        dropout: Any = layer._modules["lora_dropout"]
        dropped = dropout._modules[adapter.name](x)
        bias, rest = None, _base(x - dropped, base.weight, base.bias)
    y = dora_linear(
        dropped,
        base.weight,
        adapter.a,
        adapter.b,
        adapter.magnitude,
        bias=bias,
        scale=adapter.scale,
        norm=norm,
    )
    return y if rest is None else y + rest


def _base(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        return linear_of_codes(x, weight, bias)
    return F.linear(x, weight, bias)
