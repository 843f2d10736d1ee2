"""Parts of a bank by name: their numbers, and the names in state dicts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def numbers_of(names: Iterable[str | None], known: Sequence[str]) -> list[int]:
    """The number of each name among those that are known, -1 for None.

    Raises:
        ValueError: a name that isn't known.
        TypeError: not a sequence of names.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names must be a sequence with a name for each row; got {names!r}")
    numbers = {None: -1} | {name: number for number, name in enumerate(known)}
    names = list(names)
    for name in names:
        if name is not None and name not in known:
            raise ValueError(f"names must be of {', '.join(known)}, or None; got {name!r}")
    return [numbers[name] for name in names]


class Named(nn.Module):
    """A module whose parts have numbers, and whose state dict says which each is.

    A state dict has them as ``_extra_state``, JSON in bytes. One of a bank whose parts are others,
    or in another order, is an error of ``load_state_dict``.
    """

    names: tuple[str, ...]

    def _parts(self) -> dict[str, list[Any]]:
        """What a state dict must agree with."""
        return {"names": list(self.names)}

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(json.dumps(self._parts()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nothing is set: what is loaded has this module's parts."""

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        state = state_dict.get(f"{prefix}_extra_state")
        # set_model_state_dict has an object of torch's in place of one that the state dict lacks.
        if isinstance(state, Tensor):
            theirs = json.loads(bytes(state.tolist()))
            if theirs != self._parts():
                error_msgs.append(
                    f"{prefix or 'the bank'}: the state dict must be of a bank with "
                    f"{self._parts()}; it has {theirs}"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
