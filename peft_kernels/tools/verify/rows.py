"""What was found, row by row, and the same as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

import peft_kernels
from peft_kernels.tools.verify.checks import CHECKS, Finding
from peft_kernels.tools.verify.subjects import Subject


@dataclass(frozen=True)
class Row:
    """A subject by its names, and what each check of it found."""

    op: str
    backend: str
    dtype: str
    plan: str
    findings: dict[str, Finding]

    def bad(self) -> dict[str, Finding]:
        return {name: found for name, found in self.findings.items() if found.is_bad()}

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {self.plan}"


def row_of(subject: Subject, findings: dict[str, Finding]) -> Row:
    return Row(subject.op, subject.backend, short(subject.dtype), subject.label, findings)


def alike(subject: Subject, finding: Finding) -> Row:
    """A row of which every check found the same."""
    return row_of(subject, dict.fromkeys(CHECKS, finding))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
            "rows": [_to_json(row) for row in self.rows],
        }


def _to_json(row: Row) -> dict[str, Any]:
    """JSON knows no infinity: null stands for it."""
    found = {
        name: {key: None if value == math.inf else value for key, value in vars(finding).items()}
        for name, finding in row.findings.items()
    }
    names = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "findings"}
    return names | {"checks": found}


def rows_from(document: dict[str, Any]) -> Iterable[Row]:
    """The rows of a document again."""
    for row in document["rows"]:
        checks = row.pop("checks")
        yield Row(**row, findings={name: Finding(**found) for name, found in checks.items()})
