"""What a linear layer of PEFT's computes with its adapters, over a base in floats or in codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peft_kernels.integrations.peft.codes.bases import Base as BaseInCodes
from peft_kernels.integrations.peft.dora import dora
from peft_kernels.integrations.peft.rows import rows_linear
from peft_kernels.integrations.peft.several import sum_of_biases, together
from peft_kernels.integrations.peft.state import Adapter, Base
from peft_kernels.integrations.served import count
from peft_kernels.ops import LoRAFactors, lora_linear
from peft_kernels.ops._lora_sum import lora_linear_sum

KERNEL, ROWS, DORA = "lora_linear", "multi_lora_linear", "dora_linear"


def linear(
    layer: Any,
    x: Tensor,
    base: Base | BaseInCodes,
    adapters: list[Adapter],
    names: Sequence[str] | None,
) -> Tensor:
    """The layer's output for x, counted as a call of the kernel that it took.

    Args:
        base: what the layer is over, its bias in the dtype of x.
        adapters: those that are active, or that rows name.
        names: the adapter of each row, or None.
    """
    if names is not None:
        layer._check_forward_args(x, adapter_names=names)
        count(layer, ROWS)
        return rows_linear(x, base.weight, base.bias, adapters, names)
    if adapters[0].magnitude is not None:
        count(layer, DORA)
        return dora(layer, x, base, adapters[0])
    count(layer, KERNEL)
    bias = sum_of_biases(base.bias, adapters, x.dtype)
    first, *others = together(adapters)
    if not others:
        return lora_linear(
            x,
            base.weight,
            first.a,
            first.b,
            bias=bias,
            scale=first.scale,
            dropout_p=first.dropout_p,
        )
    several = first, *others
    factors = LoRAFactors(
        [one.a for one in several], [one.b for one in several], [one.scale for one in several]
    )
    return lora_linear_sum(x, base.weight, factors, [one.dropout_p for one in several], bias=bias)
