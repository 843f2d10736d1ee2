"""What layers of ours over a weight in codes have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.codes.layers import codes_of, dtype_of, restate, take_scales
from peft_kernels.modules.bases import check_base
from peft_kernels.modules.replaced import Origin
from peft_kernels.ops import QuantizedWeight


class OverCodes(nn.Linear):
    """A layer in the place of another library's, over its tensors and attributes."""

    _origin: Origin

    def _read_base(self, linear: Any) -> tuple[tuple[int, int], torch.dtype]:
        try:
            found = codes_of(linear)
        except TypeError as error:
            raise TypeError(f"linear {error}") from None
        check_base(linear, in_codes=True)
        return found.shape, dtype_of(linear)

    def _codes(self) -> QuantizedWeight:
        """What ``weight`` is in."""
        try:
            return codes_of(self, self._origin.kind)
        except TypeError as error:
            raise TypeError(f"the layer of {self.out_features} outputs {error}") from None

    def _bias_for(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def _base_layer(self) -> nn.Module:
        """The library's layer, over what it had when this took its place."""
        weight: Any = self.weight
        return self._origin.stand_in(self, weight, self.bias)

    def _check_weight(self, value: Any) -> None:
        now = self.weight
        if isinstance(value, nn.Parameter) and (value.shape, value.dtype) != (now.shape, now.dtype):
            raise ValueError(
                f"weight must stay in codes, {list(now.shape)} {now.dtype}; got "
                f"{list(value.shape)} {value.dtype}. The library's layer can be put back first "
                "(unload(), or of a pool detach())"
            )

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        restate(self, self._origin.kind)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._base_layer()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        _, _, _, unexpected, errors = rest
        found, wanted = state_dict.get(f"{prefix}weight"), self.weight.dtype
        if found is not None and found.dtype is not wanted:
            errors.append(f"{prefix}weight must be in codes, {wanted}; got {found.dtype}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)
        take_scales(self, self._origin.kind, state_dict, prefix, unexpected, errors)
