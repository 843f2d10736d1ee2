"""The norms that DoRA divides by, kept while nothing that they are made of changes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft_kernels.nn._kept import Kept
from peft_kernels.ops import QuantizedWeight
from peft_kernels.ops._dora_norm import NormsOnDevice
from peft_kernels.ops._sharded import are_sharded
from peft_kernels.ops.dora_linear import dora_norm, dora_squares


class Norms:
    """The norms of the rows of ``weight + scale * lora_b @ lora_a``. A copy of it holds nothing.

    Of the weight, which is large and frozen, a write through ``.data`` is seen if it changes the
    diagonal, or of codes one in many; of all else, as :class:`Kept` says. On a GPU kernels look,
    and the norms of a call are overwritten by the next that finds a change.
    """

    def __init__(self) -> None:
        self._on_device = NormsOnDevice()
        self._squares: Kept[Tensor] = Kept(_some)
        self._norms: Kept[Tensor] = Kept()

    def __reduce__(self) -> tuple:
        return Norms, ()

    def of(
        self,
        weight: Tensor | QuantizedWeight,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float | Tensor,
    ) -> Tensor:
        """The norms ``[n]``, without a gradient; as of :func:`peft_kernels.ops.dora_norm`."""
        frozen: tuple[Tensor, ...]
        if isinstance(weight, QuantizedWeight):
            frozen = weight.codes, weight.scales
        elif are_sharded(weight, lora_a):
            return dora_norm(weight, lora_a, lora_b, scale)
        elif (norm := self._on_device.of(weight, lora_a, lora_b, scale)) is not None:
            return norm
        else:
            frozen = (weight,)
        squares = self._squares.get(lambda: dora_squares(weight), frozen)
        made_of, settings = [squares, lora_a, lora_b], [scale]
        if isinstance(scale, Tensor):
            made_of, settings = [*made_of, scale], []
        return self._norms.get(
            lambda: dora_norm(weight, lora_a, lora_b, scale, squares), made_of, *settings
        )


@torch.no_grad()
def _some(weight: Tensor) -> Tensor:
    """The diagonal of a weight; of codes or scales as many as a square one would have there."""
    if weight.is_floating_point() and weight.dim() == 2:
        return weight.diagonal().clone()
    values = weight.flatten()
    return values[:: max(math.isqrt(values.numel()), 1)].clone()
