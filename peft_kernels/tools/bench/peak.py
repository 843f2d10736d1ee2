"""Peak memory of a call.

On the CPU it is that of the whole process, as the system tells it, so memory that was freed before
must go back to the system first, or it would be free of charge. What a call frees itself counts
once where the next block takes its place, which in a process with a fragmented heap it may not.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(call: Callable[[], object]) -> int | None:
    """What ``call``'s second run adds to the memory in use; None where the system can't tell."""
    call()
    _return_freed()
    before = reset_peak()
    if before is None:
        return None
    held = call()
    added = peak() - before
    del held
    return added


def _return_freed() -> None:
    """Gives the memory that the C library keeps for later back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak() -> int | None:
    """Sets the peak to the memory in use now, and returns that; None where it can't be set."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        _RESET.write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def peak() -> int:
    """The peak since :func:`reset_peak`."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    assert match, f"{_STATUS} has no {field}"
    return int(match[1]) * 1024
