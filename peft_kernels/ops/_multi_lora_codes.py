"""Multi-LoRA linear over a weight in codes: the base from the codes, the update added to it.

Neither pass keeps anything of the weight's size, nor writes it but where a GPU has many rows. y is
rounded to the dtype of x twice, before the update and after it. A row's result doesn't depend on
its batch on a CPU, as over a dense weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
    y = _base_of(rows, weight, bias)
    return in_shape_of(x, add(y, rows, banks, ids, trained=trained, **options))


# lora_linear sums in one order from so many rows on; fewer it reads codes for in another.
_IN_ONE_ORDER = 9


def _base_of(rows: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    count = rows.shape[0]
    if not 0 < count < _IN_ONE_ORDER:
        return linear_of_codes(rows, weight, bias)
    filled = F.pad(rows, (0, 0, 0, _IN_ONE_ORDER - count))
    # Not a view: the update is added to it in place, and its gradients aren't a view's.
    return linear_of_codes(filled, weight, bias)[:count].clone()
