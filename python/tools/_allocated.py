"""The most memory that a call has allocated at once, to the byte: by memray, a tool of developers'.

It sees what native code and Python allocate. ``peft_kernels.tools.bench.peak``, which is installed
with the package, asks the system, which counts in pages and what is touched of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import memray


def peak_bytes(call: Callable[[], object]) -> int:
    """The least of three calls, which has nothing that is made once."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(number) for number in range(3)]
        for path in paths:
            with memray.Tracker(path):
                call()
        return min(memray.FileReader(path).metadata.peak_memory for path in paths)
