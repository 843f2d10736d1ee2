"""An encoder of prompts or prefixes: what it makes of one row, until a parameter changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from peft_kernels.nn._kept import Kept

Made = TypeVar("Made")
ONCE = "encoded once"
KEPT = "_peft_kernels_encoded"  # in an encoder's __dict__


def kept_or_made(encoder: nn.Module, make: Callable[[], Made], *inputs: Tensor) -> Made:
    """``make()``, or in eval mode what it gave before, while nothing trains and nothing changed.

    Args:
        encoder: its parameters are what is looked at.
        inputs: and these.
    """
    parameters = list(encoder.parameters())
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    if trains or encoder.training:
        return make()
    kept: Kept[Made] = encoder.__dict__.setdefault(KEPT, Kept())
    return kept.get(make, [*parameters, *inputs])
