"""What ``make gpu`` runs, in the order of what it is worth, and how each stage's result is read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
SCRATCH = "{scratch}"  # in a command: a folder for what is thrown away
OPS = (
    "lora_linear",
    "multi_lora_linear",
    "prefix_attention",
    "adapter",
    "adapter_fusion",
    "dora_linear",
    "prompt_lookup",
)
COMPILED = ("lora_linear",)  # beside torch.compile of the composition, which takes its time


@dataclass(frozen=True)
class Stage:
    """A command, and what is made of it.

    ``read`` takes the scratch folder and what was printed, and raises a ValueError or an OSError
    where there is no result. ``bad`` counts in a result what is wrong.
    """

    name: str
    command: tuple[str, ...]
    read: Callable[[Path, str], Any]
    bad: Callable[[Any], int] = lambda found: 0
    minutes: float = 15

    @property
    def file(self) -> str:
        """Of a benchmark, the name that the site looks for."""
        return f"{self.name.removeprefix('bench-')}.json"


def environment() -> dict[str, str]:
    """The package is the one here, and its kernels are compiled."""
    own = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return own | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def _printed(scratch: Path, stdout: str) -> Any:
    return json.loads(stdout)


def _junit(scratch: Path, stdout: str) -> dict[str, Any]:
    """The counts of pytest's report, and the tests that failed with the first line of why."""
    (suite,) = ElementTree.parse(scratch / "tests.xml").getroot().iter("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    if not counts["tests"] - counts["skipped"]:
        raise ValueError("no test ran")
    failed = {}
    for case in suite.iter("testcase"):
        for why in (*case.iter("failure"), *case.iter("error")):
            line = (why.get("message") or "").strip().splitlines()[:1]
            failed[f"{case.get('classname')}::{case.get('name')}"] = "".join(line)
    return counts | {"failed": failed}


def _command(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "peft_kernels.cli", *arguments)


def _bench(op: str) -> Stage:
    compiled = ("--compile",) if op in COMPILED else ()
    flags = ("--all", *compiled, "--rounds", "10", "--seconds", "0.2", "--out", SCRATCH)
    command = _command("bench", op, "--device", "cuda", "--json", *flags)
    return Stage(f"bench-{op}", command, _printed)


STAGES = (
    Stage(
        "verify",
        _command("verify", "--device", "cuda", "--json"),
        _printed,
        lambda found: found["bad"],
    ),
    Stage(
        "tests",
        (
            *(sys.executable, "-m", "pytest", "tests/devices", "--device", "cuda"),
            *("-p", "no:cacheprovider", f"--junitxml={SCRATCH}/tests.xml"),
        ),
        _junit,
        lambda found: found["failures"] + found["errors"],
    ),
    Stage("tune", (sys.executable, str(Path(__file__).with_name("tune_models.py"))), _printed),
    *(_bench(op) for op in OPS),
)
