"""What every op checks of its tensors: dtypes, devices, the share of a dropout.

Run on every call, so a message is only put together when it is raised.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from peft_kernels.ops._dtypes import acc_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)

# A tensor by its argument's name; what isn't given has none.
Named = Iterable[tuple[str, Tensor | None]]


def are_alike(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether x can be an op's input and these have its dtype and device, as in most calls.

    It takes less time than the checks below, which know the names and need not run then.
    """
    dtype, device = x.dtype, x.device
    for tensor in tensors:
        if tensor is not None and (tensor.dtype is not dtype or tensor.device != device):
            return False
    return dtype in FLOATS


def check_float(name: str, tensor: Tensor) -> None:
    """Raises a TypeError unless an op can take this as its input."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64; got {tensor.dtype}")


def check_integer(name: str, tensor: Tensor) -> None:
    """Raises a TypeError unless these can be ids, places or lengths."""
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int32 or int64; got {tensor.dtype}")


def check_same(x_name: str, x: Tensor, tensors: Named) -> None:
    """Raises a TypeError unless these have x's dtype."""
    for name, tensor in tensors:
        if tensor is not None and tensor.dtype is not x.dtype:
            raise TypeError(f"{name} must have {x_name}'s dtype {x.dtype}; got {tensor.dtype}")


def check_adapter(x_name: str, x: Tensor, tensors: Named) -> None:
    """Raises a TypeError unless these have x's dtype or that of its sums."""
    acc = acc_dtype(x)
    for name, tensor in tensors:
        if tensor is not None and tensor.dtype is not x.dtype and tensor.dtype is not acc:
            raise TypeError(
                f"{name} must be {acc} or have {x_name}'s dtype {x.dtype}; got {tensor.dtype}"
            )


def check_devices(x_name: str, x: Tensor, tensors: Named) -> None:
    """Raises a ValueError unless these are where x is."""
    device = x.device
    for name, tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {x_name}'s device {device}; got {tensor.device}")


def check_dropout(dropout_p: float) -> None:
    """Raises a ValueError unless this can be the share of elements dropped."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1); got {dropout_p}")
