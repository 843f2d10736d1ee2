"""Peak memory of one variant's training, in a process of its own.

Run as a script it trains one variant for a few steps and prints the bytes of its peak above what
the loaded model took. A process of its own because memory that one variant has freed stays with the
process, and would be free of charge for the next.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import torch

STEPS = 4


def peak_bytes(variant: str, seed: int) -> int | None:
    """Runs this script for ``variant``; None where the system can't tell the peak."""
    command = [sys.executable, __file__, variant, "--seed", str(seed)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    return None if out == "None" else int(out)


def measure(variant: str, seed: int) -> int | None:
    import _docstrings
    from _classifier import Batches, Trainee

    train, _ = _docstrings.load(seed)
    trainee = Trainee(variant, STEPS, seed)
    batches = list(Batches().of_training(train, STEPS, seed))
    before = _reset_peak()
    for tokens, labels in batches:
        trainee.step(tokens, labels)
    return None if before is None else _peak() - before


def _reset_peak() -> int | None:
    """Sets the peak to the memory in use now, and returns that; None where it can't be set."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, f"/proc/self/status has no {field}"
    return int(match[1]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(measure(arguments.variant, arguments.seed))
