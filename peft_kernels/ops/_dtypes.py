"""The dtypes in which ops take their inputs and keep their sums."""

from __future__ import annotations

import torch
from torch import Tensor


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, and of what is saved of them: float32, or float64 for float64 input."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def scale_of(scale: float, scale_t: Tensor | None, x: Tensor) -> float | Tensor:
    """The factor of a low-rank part, as references multiply with it."""
    return scale if scale_t is None else scale_t.to(x.device, acc_dtype(x))


def autocast(x: Tensor, *others: Tensor | None) -> tuple:
    """Under autocast, these in autocast's dtype; what isn't given, as adapters, stays wide."""
    if not torch._C._is_any_autocast_enabled():  # of no device: the cheapest to ask
        return x, *others
    device = x.device.type
    if x.is_meta or x.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *others))
