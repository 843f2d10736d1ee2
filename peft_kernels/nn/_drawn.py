"""Modules whose parameters are drawn at random, also where they are given memory later on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class Drawn(nn.Module):
    """Draws its parameters when they leave the meta device, as ``to_empty`` has them do.

    A base gets its values from a checkpoint then, and new adapters from nowhere else: they would be
    whatever the memory held.
    """

    def _draw(self) -> None:
        """Draws the module's own parameters anew, in place."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        had_none = any(parameter.is_meta for parameter in self.parameters())
        super()._apply(fn, recurse)
        if had_none and not any(parameter.is_meta for parameter in self.parameters()):
            self._draw()
        return self
