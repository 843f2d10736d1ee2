"""A GPU's folder of results: its name, what it was made with, and the page of its records."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _results
import torch
from _stages import OPS, ROOT, STAGES

import peft_kernels
from peft_kernels._library import HAS_TRITON
from peft_kernels.tools.devices import card

PAGE = "README.md"
CLOCKS = ("sm_mhz", "sm_mhz_max", "memory_mhz", "memory_mhz_max", "watts_max", "celsius")


def why_none() -> str:
    """Why there is no GPU, or nothing."""
    if torch.cuda.is_available():
        return ""
    build = torch.version.cuda or torch.version.hip
    return f"torch {torch.__version__} {'finds none' if build else 'is built for the CPU alone'}"


def name() -> str:
    return torch.cuda.get_device_name()


def folder_name(card_name: str) -> str:
    """A card's name as that of a folder: small letters, digits and hyphens.

    Raises:
        ValueError: nothing of the name is left.
    """
    found = re.sub(r"[^a-z0-9]+", "-", card_name.lower()).strip("-")
    if not found:
        raise ValueError(f"a card's name must have letters or digits; got {card_name!r}")
    return found


def made_with() -> dict[str, Any]:
    """The card, the source and the versions that a record is of: all that resuming goes by.

    Raises:
        ValueError: git doesn't name the source.
    """
    found = card(torch.device("cuda"))
    versions = {"torch": torch.__version__, "peft_kernels": peft_kernels.__version__}
    if HAS_TRITON:
        import triton

        versions["triton"] = triton.__version__
    fixed = {key: found[key] for key in ("name", "architecture", "cores", "driver")}
    return {"card": fixed, "commit": _commit(), **versions}


def _commit() -> str:
    """The commit, and a digest of what differs from it beside the results."""
    beside = ("--", ".", f":!{_results.RESULTS.relative_to(ROOT)}")
    commit = _git("rev-parse", "--short=12", "HEAD").decode().strip()
    changed = _git("diff", "--no-ext-diff", "--binary", "HEAD", *beside)
    others = _git("ls-files", "-z", "--others", "--exclude-standard", *beside)
    for name in filter(None, others.split(b"\0")):
        changed += name + _digest(ROOT / os.fsdecode(name))
    digest = hashlib.sha256(changed).hexdigest()[:8]
    return f"{commit} + changes {digest}" if changed else commit


def _digest(path: Path) -> bytes:
    """Of a file's content; of anything else, such as a checkout within this one, nothing."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _git(*arguments: str) -> bytes:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError as error:
        raise ValueError("the commit is told by git, which is not installed") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()[:1]
        raise ValueError(f"the commit is told by git, which says: {''.join(said)}") from error


# ---- the page ----------------------------------------------------------------------------------


def page(folder: Path) -> str:
    """What the records in a folder say, in markdown."""
    records = {stage.name: record(folder / stage.file) for stage in STAGES}
    there = {name: one for name, one in records.items() if one is not None}
    if not there:
        return "# no results\n"
    parts = list(_head(there))
    for title, section in (("verify", _verified), ("tests", _tested), ("tune", _tuned)):
        if title in there and "found" in there[title]:
            parts += [f"## {title}", *section(there[title]["found"])]
    for op in OPS:
        found = there.get(f"bench-{op}", {}).get("found")
        if found:
            tables = _results.markdown_of(op, found["rows"]).strip()
            parts += [f"## {op}", *_clocks(found["card"]), tables]
    return "\n\n".join(parts) + "\n"


def record(file: Path) -> dict[str, Any] | None:
    """What a stage left in ``file``; None where that isn't there, is cut off or is another's."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "made_with" in found else None


def _head(records: dict[str, Any]) -> Iterator[str]:
    made = next(iter(records.values()))["made_with"]
    facts = made["card"] | {key: value for key, value in made.items() if key != "card"}
    yield f"# {made['card']['name']}"
    yield "Measured by `make gpu`, which writes this page from the JSON files beside it."
    yield _table(("what", "found"), [(key, value) for key, value in facts.items()])
    yield _table(("stage", "became", "seconds"), [_line(*item) for item in records.items()])


def _line(name: str, record: dict[str, Any]) -> tuple[str, str, str]:
    seconds = f"{record['seconds']:.0f}"
    if "found" not in record:
        last = record["said"][-1] if record["said"] else ""
        return name, f"broken, exit code {record['exit']}: {last.replace('|', '/')}", seconds
    bad = next(stage for stage in STAGES if stage.name == name).bad(record["found"])
    return name, f"done, {bad} wrong" if bad else "done", seconds


def _clocks(found: dict[str, Any] | None) -> Iterator[str]:
    """What the driver told of the clocks, when the benchmark had ended."""
    told = [f"{key} {value}" for key, value in (found or {}).items() if key in CLOCKS and value]
    if told:
        yield f"At the end: {', '.join(told)}."


def _verified(found: dict[str, Any]) -> Iterator[str]:
    """How many checks of an op came out how, and each that is wrong."""
    counts: dict[str, Counter[str]] = {}
    wrong = []
    for row in found["rows"]:
        for check, finding in row["checks"].items():
            counts.setdefault(row["op"], Counter())[finding["verdict"]] += 1
            if finding["verdict"] in ("wrong", "failed"):
                what = f"{row['op']} {row['dtype']} {row['plan']}, {check}"
                wrong.append((what, finding["verdict"], finding["why"].replace("|", "/")))
    verdicts = ("right", "wrong", "failed", "skipped")
    yield _table(("op", *verdicts), [(op, *(n[v] for v in verdicts)) for op, n in counts.items()])
    if wrong:
        yield _table(("what", "verdict", "why"), wrong)


def _tested(found: dict[str, Any]) -> Iterator[str]:
    names = ("tests", "failures", "errors", "skipped")
    yield _table(names, [tuple(found[name] for name in names)])
    if found["failed"]:
        rows = [(test, why.replace("|", "/")) for test, why in found["failed"].items()]
        yield _table(("test", "why"), rows)


def _tuned(found: dict[str, Any]) -> Iterator[str]:
    rows = found["measurements"]
    plans = list(dict.fromkeys(plan for row in rows for plan in row["milliseconds"]))
    lines = [
        (row["bucket"], *(_milliseconds(row, plan) for plan in plans), row["best"]) for row in rows
    ]
    yield _table(("bucket", *(f"{plan}, ms" for plan in plans), "best"), lines)


def _milliseconds(row: dict[str, Any], plan: str) -> str:
    return f"{row['milliseconds'][plan]:.4f}" if plan in row["milliseconds"] else "-"


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
