"""What the cases of all suites have in common."""

from __future__ import annotations

import torch


class BaseCase:
    """Of a suite's Case, a frozen dataclass with ``dtype`` and ``backward``, and a ``title`` or
    none, that its tables' titles end in."""

    dtype: torch.dtype
    backward: bool
    title: str = ""

    def bare_dtype(self, device: torch.device | str) -> torch.dtype:
        """What the bare layer computes in: float32 on a CPU whatever the case's, which is what
        people run there, and on a GPU the case's own."""
        return torch.float32 if torch.device(device).type == "cpu" else self.dtype

    @property
    def group(self) -> str:
        """What a table of cases shares, e.g. ``"float32 forward"``."""
        direction = "forward+backward" if self.backward else "forward"
        return f"{str(self.dtype).removeprefix('torch.')} {direction}{self.title}"
