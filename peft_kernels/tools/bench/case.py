"""What the cases of all suites have in common."""

from __future__ import annotations

import torch


class BaseCase:
    """Of a suite's Case, a frozen dataclass with ``dtype`` and ``backward``, and a ``title`` or
    none, that its tables' titles end in."""

    dtype: torch.dtype
    backward: bool
    title: str = ""

    @property
    def group(self) -> str:
        """What a table of cases shares, e.g. ``"float32 forward"``."""
        direction = "forward+backward" if self.backward else "forward"
        return f"{str(self.dtype).removeprefix('torch.')} {direction}{self.title}"
