"""Inputs of any number of dimensions as the rows that kernels take, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """``x [..., k]`` as ``[m, k]``."""
    return x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)


def in_shape_of(x: Tensor, y: Tensor) -> Tensor:
    """``y [m, n]`` as ``[..., n]``, for the rows of ``x [..., k]``."""
    if x.dim() == 2:
        return y
    shape = (*x.shape[:-1], y.shape[-1])
    if torch.jit.is_tracing():
        return y.reshape(shape)  # a method, or the graph has the sizes that it was traced with
    # Not .view(): FSDP2 warns of a module whose output is a view, and y is nobody else's.
    return torch.ops.aten._unsafe_view.default(y, shape)
