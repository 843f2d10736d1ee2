"""Values that are made of parameters, and made again when those change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from peft_kernels.ops._transforms import is_recorded, wants_composition

if TYPE_CHECKING:
    from typing_extensions import Self

Value = TypeVar("Value")
_Source = tuple[Tensor, int, Tensor]  # an alias, its version, its mark
_FEW = 4096


class Kept(Generic[Value]):
    """One value, and what it was made of. A copy of it holds nothing.

    Args:
        mark: of a tensor, what differs when its values do.
    """

    def __init__(self, mark: Callable[[Tensor], Tensor] | None = None) -> None:
        self._mark = mark or mark_of
        # The settings, the tensors as they were, and the value: together, for other threads.
        self._kept: tuple[tuple[Hashable, ...], list[_Source], Value] | None = None

    def __reduce__(self) -> tuple:
        return Kept, ()

    def get(
        self, make: Callable[[], Value], tensors: Sequence[Tensor], *settings: Hashable
    ) -> Value:
        """``make()``, without gradients; of a former call, if nothing changed since.

        Changes are a write to one of the tensors, another memory, dtype or device of it, other
        ``settings``, and autocast. Writes through ``.data`` aren't counted by torch, so the values
        are looked at too: each call reads the tensors once. Nothing is kept of tensors that can't
        be looked at so: see :func:`can_keep`.
        """
        if not all(map(can_keep, tensors)):
            return make()
        settings = (*settings, _autocast_dtype(tensors))
        kept = self._kept
        if kept is None or settings != kept[0] or not self._are_as(kept[1], tensors):
            # Not an inference tensor, which other modes couldn't use.
            with torch.inference_mode(False), torch.no_grad():
                value = make()
                sources = [(t.detach(), t._version, self._mark(t)) for t in tensors]
            self._kept = kept = settings, sources, value
        return kept[2]

    def _are_as(self, sources: list[_Source], tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(sources) and all(
            t._version == version and _is_alias(t, source) and torch.equal(self._mark(t), mark)
            for t, (source, version, mark) in zip(tensors, sources, strict=True)
        )


class KeepingModule(nn.Module):
    """A module with a value that is kept while nothing trains, until ``train()`` or ``eval()``."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: Kept[Any] = Kept()

    def train(self, mode: bool = True) -> Self:
        # A step of training has changed the parameters, however little.
        self._kept = Kept()
        return super().train(mode)

    def trains(self) -> bool:
        """Whether a value made of the parameters would need gradients."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())


def can_keep(tensor: Tensor) -> bool:
    """Whether a value of this tensor may be kept: each call can afford to look at its values.

    It can't on a GPU, for which the host would have to wait, nor while something records the call
    or transforms it. Writes to inference tensors aren't counted at all.
    """
    if torch.compiler.is_compiling():  # the rest isn't traced
        return False
    if is_recorded() or wants_composition():
        return False
    return tensor.device.type == "cpu" and not tensor.is_inference()


@torch.no_grad()
def mark_of(tensor: Tensor) -> Tensor:
    """What differs when the values do: all of a few, or of many a random sum of each row.

    A row whose values change by less than its sum is rounded by counts as the same.
    """
    values = tensor.detach()
    if values.numel() <= _FEW:
        return values.clone()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    rows = values.reshape(-1, values.shape[-1])
    with torch.autocast("cpu", enabled=False):
        return torch.mv(rows, _summands(rows.shape[1], rows.dtype))


@cache
def _summands(size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.rand(size, generator=generator).add(0.5).to(dtype)


def _is_alias(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.device == b.device and a.is_set_to(b)


def _autocast_dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    kind = tensors[0].device.type if tensors else "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
