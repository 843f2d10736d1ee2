"""The norms that DoRA divides by, kept while nothing that they are made of changes."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.nn._kept import Kept
from peft_kernels.ops._sharded import are_sharded
from peft_kernels.ops.dora_linear import dora_norm, dora_squares


class Norms:
    """The norms of the rows of ``weight + scale * lora_b @ lora_a``. A copy of it holds nothing.

    Of the weight, which is large and frozen, a write through ``.data`` is seen if it changes the
    diagonal; of all else, as :class:`Kept` says.
    """

    def __init__(self) -> None:
        self._squares: Kept[Tensor] = Kept(_diagonal)
        self._norms: Kept[Tensor] = Kept()

    def __reduce__(self) -> tuple:
        return Norms, ()

    def of(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float | Tensor) -> Tensor:
        """The norms ``[n]``, without a gradient; as of :func:`peft_kernels.ops.dora_norm`."""
        if are_sharded(weight, lora_a):
            return dora_norm(weight, lora_a, lora_b, scale)
        squares = self._squares.get(lambda: dora_squares(weight), (weight,))
        made_of, settings = [squares, lora_a, lora_b], [scale]
        if isinstance(scale, Tensor):
            made_of, settings = [*made_of, scale], []
        return self._norms.get(
            lambda: dora_norm(weight, lora_a, lora_b, scale, squares), made_of, *settings
        )


@torch.no_grad()
def _diagonal(weight: Tensor) -> Tensor:
    return weight.diagonal().clone()
