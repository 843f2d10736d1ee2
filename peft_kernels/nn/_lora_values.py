"""Values that a LoRA layer takes over, and what its state dict says of them."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from peft_kernels.nn._sharded import placed_as


def overwritten(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """``parameter`` with new values: the same object where the shape is the same."""
    if parameter.shape == values.shape:
        parameter.copy_(placed_as(parameter, values))
        return parameter
    fresh = parameter.new_empty(values.shape).copy_(values)
    return nn.Parameter(fresh, requires_grad=parameter.requires_grad)


_told: weakref.ref[OrderedDict] | None = None  # the last state dict that was warned of


def warn_of_base_weights(destination: Any) -> None:
    """Once for each state dict."""
    global _told
    if _told is None or destination is not _told():
        if isinstance(destination, OrderedDict):
            _told = weakref.ref(destination)
        warnings.warn(
            "the state dict of a model with merged LoRALinear layers holds their base weights, and "
            "lora_a and lora_b beside them: a plain model that loads it is the base model. "
            "peft_kernels.unload(model, merge=True) first, to save the merged weights; "
            "peft_kernels.save_adapter(model, folder), to save the adapter",
            UserWarning,
            stacklevel=2,
        )
