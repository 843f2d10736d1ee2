"""Values that are made of parameters, and made again when those change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """One value, and what it was made of. A copy of it holds nothing."""

    def __init__(self) -> None:
        self._sources: list[tuple[Tensor, int]] = []
        self._settings: tuple[Hashable, ...] | None = None
        self._value: Any = None

    def __reduce__(self) -> tuple:
        return Kept, ()

    def get(
        self, make: Callable[[], Value], tensors: Sequence[Tensor], *settings: Hashable
    ) -> Value:
        """``make()``, without gradients; of a former call, if nothing changed since.

        Changes are a write to one of the tensors, another memory, dtype or device of it, other
        ``settings``, and autocast. Writes through ``.data`` leave no trace, and nothing is kept of
        inference tensors, whose writes aren't counted, nor while torch.compile traces.
        """
        if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
            return make()
        settings = (*settings, _autocast_dtype(tensors))
        if settings != self._settings or not self._are_sources(tensors):
            # Not an inference tensor, which other modes couldn't use.
            with torch.inference_mode(False), torch.no_grad():
                self._value = make()
            self._sources = [(t.detach(), t._version) for t in tensors]
            self._settings = settings
        return self._value

    def _are_sources(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self._sources) and all(
            t._version == version and _is_alias(t, source)
            for t, (source, version) in zip(tensors, self._sources, strict=True)
        )


class KeepingModule(nn.Module):
    """A module with a value that is kept while nothing trains, until ``train()`` or ``eval()``."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: Kept[Any] = Kept()

    def train(self, mode: bool = True) -> Self:
        # What writes through `.data` leaves no trace in a parameter's count of changes.
        self._kept = Kept()
        return super().train(mode)

    def trains(self) -> bool:
        """Whether a value made of the parameters would need gradients."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())


def _is_alias(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.device == b.device and a.is_set_to(b)


def _autocast_dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    kind = tensors[0].device.type if tensors else "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
