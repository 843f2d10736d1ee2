"""Verifying in several processes: on a GPU most of the time goes into compiling, on one core each.

A part is an op in a dtype. What stops a part's process, or hangs it, is a finding about that part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from rich.console import Console
from rich.progress import track

from peft_kernels.tools.verify.checks import FAILED, Finding
from peft_kernels.tools.verify.rows import Row, alike, rows_from, short
from peft_kernels.tools.verify.subjects import Subject

MOST = 8  # processes by default: each takes a context of the GPU's memory
SECONDS = 900.0

Part = list[Subject]


def default_jobs(device: torch.device) -> int:
    """A CPU's kernels are compiled already."""
    return 1 if device.type == "cpu" else min(MOST, os.cpu_count() or 1)


def parts_of(subjects: Sequence[Subject]) -> list[Part]:
    """The subjects by op and dtype, in their order."""
    found: dict[tuple[str, torch.dtype], Part] = {}
    for subject in subjects:
        found.setdefault((subject.op, subject.dtype), []).append(subject)
    return list(found.values())


def in_processes(
    console: Console, subjects: Sequence[Subject], device: torch.device, seed: int, jobs: int
) -> Iterator[Row]:
    """The rows of all the subjects, in their order."""
    parts = parts_of(subjects)
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(_run, part, device, seed) for part in parts]
        hidden = not console.is_terminal
        for one in track(running, "verifying", console=console, transient=True, disable=hidden):
            yield from one.result()


def command(part: Part, device: torch.device, seed: int) -> list[str]:
    """What verifies a part, and prints JSON."""
    own = ("--op", part[0].op, "--dtype", short(part[0].dtype), "--seed", str(seed))
    program = (sys.executable, "-m", "peft_kernels.cli", "verify", "--device", str(device))
    return [*program, *own, "--jobs", "1", "--json"]


def _run(part: Part, device: torch.device, seed: int) -> list[Row]:
    try:
        done = subprocess.run(
            command(part, device, seed), capture_output=True, text=True, errors="replace",
            timeout=SECONDS,
        )  # fmt: skip
        return list(rows_from(json.loads(done.stdout)))
    except subprocess.TimeoutExpired:
        why = f"its process was ended after {SECONDS:.0f} s"
    except ValueError:
        said = done.stderr.strip().splitlines()[-1:]
        why = ": ".join([f"its process ended with exit code {done.returncode}", *said])
    return [alike(subject, Finding(FAILED, why=why)) for subject in part]
