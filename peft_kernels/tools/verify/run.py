"""``peft-kernels verify``: which results on this machine are right, in one table."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Sequence
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from peft_kernels._library import OPS
from peft_kernels.tools import UserError
from peft_kernels.tools.devices import check_device
from peft_kernels.tools.printing import show
from peft_kernels.tools.verify.cases import DTYPES, cases_of
from peft_kernels.tools.verify.checks import (
    CHECKS,
    FAILED,
    RIGHT,
    SKIPPED,
    WRONG,
    Finding,
    Wanted,
    check,
    skipped,
    wanted_of,
)
from peft_kernels.tools.verify.machine import Machine, machine_at
from peft_kernels.tools.verify.parts import default_jobs, in_processes
from peft_kernels.tools.verify.rows import Row, Verified, alike, row_of
from peft_kernels.tools.verify.subjects import Subject, subjects_of

MOST_SEED = 2**63 - 1
LEGEND = (
    "A number is the worst error against float64 over what is allowed, which is 1.5 times the eager"
    " path's own or the rounding of the result."
)


def verify(
    console: Console,
    *,
    device: str | None = None,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    seed: int = 0,
    jobs: int | None = None,
    machine: Machine | None = None,
) -> Verified:
    """Verifies ``ops``, or all, on a device, and says what it is doing.

    Args:
        console: where progress is shown.
        device: a CPU or a GPU; by default the GPU, if there is one.
        ops: names of ops.
        dtypes: float32, bfloat16 and float16 by default.
        seed: of the values; from 0 to `MOST_SEED`.
        jobs: processes at once; by default one on a CPU, and several on a GPU, which compile.
        machine: what the device offers, which is found out by default; with it there is one
            process, this one.

    Raises:
        UserError: no such op, no such device, no such seed, or no process.
    """
    ops = list(dict.fromkeys(ops or sorted(OPS)))
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        known = ", ".join(sorted(OPS))
        raise UserError(f"--op must be among {known}; got {', '.join(unknown)}")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs must be at least 1; got {jobs}")
    if not 0 <= seed <= MOST_SEED:
        raise UserError(f"--seed must be from 0 to {MOST_SEED}; got {seed}")
    jobs = 1 if machine else jobs
    machine = machine or _machine(device)
    wanted = dtypes or DTYPES
    subjects = [s for op in ops for s in subjects_of(op, machine.device) if s.dtype in wanted]
    started = time.perf_counter()
    # Its small shapes don't belong in the tune cache.
    with warnings.catch_warnings(), patch.dict(os.environ, PEFT_KERNELS_TUNE="0"):
        # torch's own word about the statistics of no rows.
        warnings.filterwarnings("ignore", "var_mean")
        if (jobs := jobs or default_jobs(machine.device)) > 1:
            rows = list(in_processes(console, subjects, machine.device, seed, jobs))
        else:
            rows = list(_rows(console, subjects, machine, seed))
    name = _name_of(machine.device)
    return Verified(name, seed, time.perf_counter() - started, rows)


def _machine(device: str | None) -> Machine:
    found = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be a CPU or a GPU of CUDA or ROCm; got {device!r}")
    if found.index is not None and found.type == "cuda":
        torch.cuda.set_device(found)  # graphs are captured on the current GPU
    return machine_at(found)


def _name_of(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def _rows(console: Console, subjects: list[Subject], machine: Machine, seed: int) -> Iterable[Row]:
    """One at a time. A GPU that an error has stopped computes nothing right any more."""
    hidden = not console.is_terminal
    known: dict[tuple[str, torch.dtype, str], list[Wanted]] = {}
    lost = ""
    for subject in track(subjects, "verifying", console=console, transient=True, disable=hidden):
        if lost:
            yield alike(subject, skipped(lost))
            continue
        key = subject.op, subject.dtype, subject.kind
        if key not in known and not subject.skipped:
            known = {key: [wanted_of(case, subject.dtype) for case in cases_of(*key, seed)]}
        row = row_of(subject, check(subject, known.get(key, []), machine, seed))
        if any(found.verdict == FAILED for found in row.findings.values()) and machine.is_lost():
            lost = f"the device was lost by {row}; verify the rest with --op"
        yield row


# ---- what is printed -------------------------------------------------------------------------


def print_verified(console: Console, found: Verified) -> None:
    """The table, then what is wrong, and what was skipped and why."""
    rows = [row for row in found.rows if not _is_skipped(row.findings.values())]
    shown = [name for name in CHECKS if not _is_skipped(row.findings[name] for row in rows)]
    show(console, _table(f"verified on {found.device}", rows, shown))
    console.print(LEGEND, style="dim")
    for row in rows:
        for name, finding in row.bad().items():
            case = f" ({finding.case})" if finding.case else ""
            text = f"{finding.verdict}: {row}, {name}{case}: {finding.why}"
            console.print(text, style="red", soft_wrap=True, markup=False)
    for why, what in _skipped(found.rows).items():
        console.print(f"skipped, {why}: {', '.join(what)}", soft_wrap=True, markup=False)
    bad, done = found.bad(), sum(len(row.findings) for row in rows)
    summary = f"{bad} wrong or failed" if bad else "nothing wrong"
    console.print(f"{summary}, of {done} checks in {found.seconds:.0f} s", soft_wrap=True)


def _table(title: str, rows: list[Row], checks: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("op", "backend", "dtype", "plan", *checks):
        table.add_column(column, no_wrap=column == "op")
    for row in rows:
        cells = [_cell(row.findings[name]) for name in checks]
        table.add_row(
            row.op, row.backend, row.dtype, row.plan, *cells, style="red" if row.bad() else None
        )
    return table


def _cell(found: Finding) -> str:
    if found.verdict == RIGHT:
        return "right" if found.error is None else f"right {found.share:.2f}"
    if found.verdict == WRONG and found.error is not None:
        return f"WRONG {found.share:.3g}"
    return {WRONG: "WRONG", FAILED: "FAILED", SKIPPED: "-"}[found.verdict]


def _skipped(rows: list[Row]) -> dict[str, list[str]]:
    """What was skipped, by the reason: rows, checks that no row has, and single checks."""
    by_reason: dict[str, dict[str, None]] = {}
    nowhere = [name for name in CHECKS if _is_skipped(row.findings[name] for row in rows)]
    for row in rows:
        place, whole = f"{row.op} {row.plan}", _is_skipped(row.findings.values())
        for name, finding in row.findings.items():
            if finding.verdict != SKIPPED:
                continue
            single = name if name in nowhere else f"{place} {name}"
            by_reason.setdefault(finding.why, {})[place if whole else single] = None
    return {why: list(what) for why, what in by_reason.items()}


def _is_skipped(findings: Iterable[Finding]) -> bool:
    return all(finding.verdict == SKIPPED for finding in findings)
