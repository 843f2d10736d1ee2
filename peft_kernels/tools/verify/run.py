"""``peft-kernels verify``: which results on this machine are right, in one table."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import peft_kernels
from peft_kernels._library import OPS
from peft_kernels.tools import UserError
from peft_kernels.tools.devices import check_device
from peft_kernels.tools.printing import show
from peft_kernels.tools.verify.cases import cases_of
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
    to_json,
    wanted_of,
)
from peft_kernels.tools.verify.machine import Machine, machine_at
from peft_kernels.tools.verify.subjects import Subject, subjects_of

LEGEND = (
    "A number is the worst error against float64 over what is allowed, which is 1.5 times the eager"
    " path's own or the rounding of the result."
)


@dataclass(frozen=True)
class Row:
    """A subject, and what each check of it found."""

    subject: Subject
    findings: dict[str, Finding]

    def bad(self) -> dict[str, Finding]:
        return {name: found for name, found in self.findings.items() if found.is_bad()}


@dataclass(frozen=True)
class Verified:
    """All rows, and where and in how many seconds they were made."""

    device: str
    seed: int
    seconds: float
    rows: list[Row]

    def bad(self) -> int:
        """How many checks found something wrong, or failed."""
        return sum(len(row.bad()) for row in self.rows)

    def to_document(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "device": self.device,
            "torch": torch.__version__,
            "peft_kernels": peft_kernels.__version__,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "bad": self.bad(),
            "rows": [
                {
                    "op": row.subject.op,
                    "backend": row.subject.backend,
                    "dtype": _short(row.subject.dtype),
                    "plan": row.subject.label,
                    "checks": {name: to_json(found) for name, found in row.findings.items()},
                }
                for row in self.rows
            ],
        }


def verify(
    console: Console,
    *,
    device: str | None = None,
    ops: Sequence[str] | None = None,
    seed: int = 0,
    machine: Machine | None = None,
) -> Verified:
    """Verifies ``ops``, or all, on a device, and says what it is doing.

    Args:
        console: where progress is shown.
        device: a CPU or a GPU; by default the GPU, if there is one.
        ops: names of ops.
        seed: of the values.
        machine: what the device offers, which is found out by default.

    Raises:
        UserError: no such op, or no such device.
    """
    ops = list(dict.fromkeys(ops or sorted(OPS)))
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        known = ", ".join(sorted(OPS))
        raise UserError(f"--op must be among {known}; got {', '.join(unknown)}")
    machine = machine or _machine(device)
    subjects = [subject for op in ops for subject in subjects_of(op, machine.device)]
    started = time.perf_counter()
    # Its small shapes don't belong in the tune cache.
    with warnings.catch_warnings(), patch.dict(os.environ, PEFT_KERNELS_TUNE="0"):
        # torch's own word about the statistics of no rows.
        warnings.filterwarnings("ignore", "var_mean")
        rows = list(_rows(console, subjects, machine, seed))
    name = _name_of(machine.device)
    return Verified(name, seed, time.perf_counter() - started, rows)


def _machine(device: str | None) -> Machine:
    found = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be a CPU or a GPU of CUDA or ROCm; got {device!r}")
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
            yield Row(subject, dict.fromkeys(CHECKS, skipped(lost)))
            continue
        key = subject.op, subject.dtype, subject.kind
        if key not in known and not subject.skipped:
            known = {key: [wanted_of(case, subject.dtype) for case in cases_of(*key, seed)]}
        row = Row(subject, check(subject, known.get(key, []), machine, seed))
        if any(found.verdict == FAILED for found in row.findings.values()) and machine.is_lost():
            lost = f"the device was lost by {_where(row)}; verify the rest with --op"
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
            text = f"{finding.verdict}: {_where(row)}, {name}{case}: {finding.why}"
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
        subject = row.subject
        cells = [_cell(row.findings[name]) for name in checks]
        values = (subject.op, subject.backend, _short(subject.dtype), subject.label, *cells)
        table.add_row(*values, style="red" if row.bad() else None)
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
        place, whole = f"{row.subject.op} {row.subject.label}", _is_skipped(row.findings.values())
        for name, finding in row.findings.items():
            if finding.verdict != SKIPPED:
                continue
            single = name if name in nowhere else f"{place} {name}"
            by_reason.setdefault(finding.why, {})[place if whole else single] = None
    return {why: list(what) for why, what in by_reason.items()}


def _is_skipped(findings: Iterable[Finding]) -> bool:
    return all(finding.verdict == SKIPPED for finding in findings)


def _where(row: Row) -> str:
    subject = row.subject
    return f"{subject.op} {_short(subject.dtype)} {subject.label}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
