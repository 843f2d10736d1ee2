"""A module's factor that is no Parameter, kept in its state dict."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class KeptFactor(nn.Module):
    """A module whose factor, a float or a 0-d tensor, is in its state dict as ``_extra_state``.

    A state dict without one, as of a plain layer or of an earlier version, leaves it as it is, with
    ``strict=True`` too. A factor that is a Parameter has its own entry and no other.
    """

    _factor: ClassVar[str]  # the attribute

    def get_extra_state(self) -> Tensor:
        return torch.as_tensor(getattr(self, self._factor), dtype=torch.float64).detach().clone()

    def set_extra_state(self, state: Any) -> None:
        present = getattr(self, self._factor)
        # set_model_state_dict has an object of torch's in place of one that the state dict lacks.
        if isinstance(present, nn.Parameter) or type(state).__name__ == "_EXTRA_STATE":
            return
        tensor = isinstance(present, Tensor)
        setattr(self, self._factor, state.clone().to(present) if tensor else float(state))

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(getattr(self, self._factor), nn.Parameter):
            del destination[f"{prefix}_extra_state"]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [key for key in missing if key != f"{prefix}_extra_state"]
