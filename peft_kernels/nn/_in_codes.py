"""What layers whose weight is in codes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.codes.kept import Coded, as_tensor, keep_weight, kept_weight, take_scales
from peft_kernels.nn._coded_weight import CodedWeight
from peft_kernels.ops import QuantizedWeight


class InCodes(nn.Module):
    """A layer that keeps a weight in codes, in integers that no cast touches."""

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
        """The weight as a tensor that is dequantised when it is read, and can't be written.

        Where it is sharded, the DTensor of codes.
        """
        codes: Any = self._parameters["weight"]
        if type(codes) is not nn.Parameter:
            return codes
        return CodedWeight(kept_weight(self), self._like.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif isinstance(value, nn.Parameter) and value.dtype is self._parameters[name].dtype:  # type: ignore[union-attr]
            self._parameters[name] = value  # codes, loaded or sharded
        else:
            self.weight.check_same(value)  # type: ignore[attr-defined]  # what is tied is tied again

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}coded"] = as_tensor(self.coded)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        take_scales(self, type(self), state_dict, prefix, *rest[-2:])

    def _format(self) -> str:
        """The format, for ``extra_repr``."""
        own = self.quantized
        parts = own.codes, own.scales, own.shifts, own.nested and own.nested.scales
        size = sum(part.nbytes for part in parts if part is not None)
        blocks = f"block={own.block}, " if own.layout == "planes" else ""
        return f"layout={own.layout}, {blocks}bits={8 * size / max(1, self.weight.numel()):.2f}"
