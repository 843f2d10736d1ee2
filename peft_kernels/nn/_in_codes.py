"""What layers whose weight is in codes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.codes.kept import Coded, as_tensor, keep_weight, kept_weight, of_tensor
from peft_kernels.nn._coded_weight import CodedWeight
from peft_kernels.ops import QuantizedWeight


class InCodes(nn.Module):
    """A layer that keeps a weight in codes, in buffers that no cast touches."""

    coded: Coded
    _like: Tensor  # empty; casts of the layer, which leave codes as they are, are seen by it

    def _keep(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        keep_weight(self, weight)
        like = torch.empty(0, dtype=dtype, device=weight.codes.device)
        self.register_buffer("_like", like, persistent=False)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight in codes, over the layer's own memory."""
        return kept_weight(self)

    @property
    def weight(self) -> Tensor:
        """The weight as a tensor that is dequantised when it is read, and can't be written."""
        return CodedWeight(kept_weight(self), self._like.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.weight.check_same(value)  # type: ignore[attr-defined]
            return  # what is tied is tied again
        super().__setattr__(name, value)

    def get_extra_state(self) -> Tensor:
        return as_tensor(self.coded)

    def set_extra_state(self, state: Any) -> None:
        found = of_tensor(state)
        if found != self.coded:
            raise ValueError(
                f"the state dict must have codes of the layer's format, {self.coded}; got {found}"
            )

    def _format(self) -> str:
        """The format, for ``extra_repr``."""
        own = self.quantized
        parts = own.codes, own.scales, own.shifts, own.nested and own.nested.scales
        size = sum(part.nbytes for part in parts if part is not None)
        blocks = f"block={own.block}, " if own.layout == "planes" else ""
        return f"layout={own.layout}, {blocks}bits={8 * size / max(1, self.weight.numel()):.2f}"
