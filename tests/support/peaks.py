"""The most memory that a call has out at once, where the system's count in pages is too coarse.

``peft_kernels.tools.bench.peak`` is that count: of all memory, and of large things.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile

TOOLS = Path(__file__).parents[2] / "python" / "tools"


def of_torch(call: Callable[[], object]) -> int:
    """Bytes of torch's allocator alone, so that models of few bytes can be told apart.

    Not of what kernels allocate for themselves; Python's objects, which would be most, neither.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most > 0
    return most


def of_all(call: Callable[[], object]) -> int:
    """Bytes of everything, kernels' own buffers too; skips the test where memray isn't there."""
    pytest.importorskip("memray")
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    import _allocated

    return _allocated.peak_bytes(call)
