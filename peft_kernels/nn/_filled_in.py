"""State dicts that torch has filled up with the Parameters of the very layer that loads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from peft_kernels.modules.bases import is_sharded


class FilledIn(nn.Module):
    """A layer that tells which entries of a state dict bring values.

    torch's ``set_model_state_dict`` lists each layer's Parameters, and has those that a state dict
    lacks stand in it for themselves. Shards stand there too after it has written what the first
    process sent into them, so what counts is whether they were written since they were listed.
    """

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        vars(self)["_listed"] = {
            name: _writes(parameter)
            for name, parameter in self._parameters.items()
            if parameter is not None and is_sharded(parameter)
        }
        return super().named_parameters(*args, **options)

    def _brings(self, state_dict: Mapping[str, Any], prefix: str, name: str) -> bool:
        """Whether a state dict has values for a Parameter, other than those that it has anyway."""
        value = state_dict.get(f"{prefix}{name}")
        if value is None:
            return False
        # The base weight of a merged layer has another name in the layer.
        own = next((n for n, parameter in self._parameters.items() if parameter is value), None)
        if own is None:
            return True
        listed: dict[str, int] = vars(self).get("_listed", {})
        return own in listed and _writes(value) > listed[own]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        vars(self).pop("_listed", None)


def _writes(shard: Any) -> int:
    return shard.to_local()._version  # what detach() gives counts its own
