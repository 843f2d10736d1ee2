"""What configures a LoRA adapter: its scale, how it is drawn, its dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peft_kernels.modules.bases import HALF_DTYPES
from peft_kernels.modules.checks import check_share

INITS = ("kaiming_uniform", "gaussian")


def scaling(alpha: float, r: int, use_rslora: bool) -> float:
    """``alpha / r`` (Hu et al. 2021), or ``alpha / sqrt(r)`` (rsLoRA, Kalajdzievski 2023)."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def alpha_of(scale: float, r: int, use_rslora: bool) -> float:
    """The alpha whose :func:`scaling` is ``scale``; an int where rounding alone made it none."""
    alpha = scale * (math.sqrt(r) if use_rslora else r)
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-14) else alpha


def check_settings(r: int, alpha: float, dropout: float, init: str) -> None:
    """Raises a TypeError or ValueError unless these can configure a :class:`LoRALinear`."""
    if not isinstance(r, int) or isinstance(r, bool):
        raise TypeError(f"r must be an int; got {r!r}")
    if r < 1:
        raise ValueError(f"r must be at least 1; got {r}")
    if not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha must be a number; got {alpha!r}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite; got {alpha}")
    check_share("dropout", dropout)
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")


def adapter_dtype_for(base: torch.dtype, requested: torch.dtype | None) -> torch.dtype:
    """``requested``, once it can be mixed with the base's; by default at least float32."""
    wide = torch.float32 if base in HALF_DTYPES else base
    if requested not in (None, wide, base):
        raise TypeError(f"adapter_dtype must be {wide} or the base's {base}; got {requested}")
    return requested or wide


def init_adapter_(lora_a: Tensor, lora_b: Tensor, init: str) -> None:
    """Draws A [r, k] and sets B to zero, in place, so that the update is zero."""
    if init == "gaussian":
        nn.init.normal_(lora_a, std=1.0 / lora_a.shape[0])
    else:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    nn.init.zeros_(lora_b)
