"""What the launches of a call have in common with those of every call of its sizes.

It follows from sizes, dtypes and the GPU, and nothing of it from a tensor's values, strides or
place in memory: worked out once, it serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar("Value")

# A launch but for its tensors and their strides: the grid and the options.
Prepared = tuple[tuple[int, ...], dict[str, Any]]


class Layout:
    """Of calls of the same sizes."""

    def __init__(self) -> None:
        self._made: dict[tuple, Any] = {}

    def once(self, make: Callable[..., Value], *settings: Any) -> Value:
        """``make(self, *settings)``, of a former call if there was one."""
        key = make, *settings
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make(self, *settings)
        return found
