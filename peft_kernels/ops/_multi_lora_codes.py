"""Multi-LoRA linear over a weight in codes: the base from the codes, the update added to it.

Neither pass writes or keeps anything of the weight's size. y is rounded to the dtype of x twice,
before the update and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels.ops._dtypes import autocast
from peft_kernels.ops._lora_banks import LoRABank
from peft_kernels.ops._lora_factors import LoRAFactors, bank_of, check_factors, trained_of
from peft_kernels.ops._quantized import QuantizedWeight
from peft_kernels.ops._rows import in_shape_of, rows_of
from peft_kernels.ops.lora_linear import linear_of_codes


def multi_lora_over_codes(
    add: Callable[..., Tensor],
    x: Tensor,
    weight: QuantizedWeight,
    banks: LoRABank | Sequence[LoRABank] | LoRAFactors,
    ids: Any,
    *,
    bias: Tensor | None,
    trained: Any,
    **options: Any,
) -> Tensor:
    """:func:`peft_kernels.ops.multi_lora_linear`; ``add`` is multi_lora_add_."""
    x, bias = autocast(x, bias)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., k] for weight [n, k]; got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if isinstance(banks, LoRAFactors):
        check_factors(x, weight.shape[0], banks)
        if trained is not None:
            raise ValueError("trained must be None with LoRAFactors: their own tensors are trained")
        trained = trained_of(banks) if torch.is_grad_enabled() else None
        banks = bank_of(banks)
    rows = rows_of(x)
    y = linear_of_codes(rows, weight, bias)
    return in_shape_of(x, add(y, rows, banks, ids, trained=trained, **options))
