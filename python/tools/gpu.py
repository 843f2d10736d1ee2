"""``make gpu``: measures the GPU of this machine, and leaves a folder that is ready to commit.

    python python/tools/gpu.py            # goes on where it was interrupted
    python python/tools/gpu.py --fresh    # starts anew
    python python/tools/gpu.py --only verify tests

Stages run one after the other, the most valuable first, each in a process of its own: an error that
stops the GPU for one stops it for no other. Each leaves a JSON file in
``benchmarks/results/<card>``, and is not run again while that file is of the same commit, the same
versions and the same card; ``README.md`` there is made from all of them.

The exit code is 0 where all stages are done and nothing is wrong, 1 where something is, and 2
without a GPU, or without git to name the commit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _card
import _stages
from _results import RESULTS
from _stages import Stage

Say = Callable[[str], object]
SAID_LINES = 15  # of what a stage that broke said at last


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: "done", "kept" from an earlier run, or "broken"."""

    stage: str
    became: str
    bad: int  # what it found wrong, where it is done


def measure(
    folder: Path,
    stages: Sequence[Stage],
    made_with: dict[str, Any],
    *,
    fresh: bool = False,
    say: Say = print,
) -> list[Outcome]:
    """Runs what isn't there yet, in order, and writes the page after each stage."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for stage in stages:
        kept = None if fresh else _finished(folder / stage.file, made_with)
        if kept is None:
            say(f"{stage.name} ...")
            record = _run(stage, made_with)
            _write(folder / stage.file, json.dumps(record, indent=1) + "\n")
        else:
            record = kept
        became = "kept" if kept else "done" if "found" in record else "broken"
        bad = stage.bad(record["found"]) if "found" in record else 0
        outcomes.append(Outcome(stage.name, became, bad))
        _write(folder / _card.PAGE, _card.page(folder))
        say(f"{stage.name}: {_told(outcomes[-1], record)}")
    return outcomes


def _finished(file: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a stage that was finished with the same things, or None."""
    record = _card.record(file)
    same = record is not None and "found" in record and record["made_with"] == made_with
    return record if same else None


def _run(stage: Stage, made_with: dict[str, Any]) -> dict[str, Any]:
    """The record of a stage: what it found, or in its place what it said at last."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        command = [part.replace(_stages.SCRATCH, scratch) for part in stage.command]
        try:
            out, err, code = _ended(command, stage.minutes * 60)
            said, found = err + out, _read(stage, Path(scratch), out)
        except (subprocess.TimeoutExpired, OSError) as error:
            said, code, found = str(error), None, None
    record = {"stage": stage.name, "made_with": made_with, "exit": code}
    record["seconds"] = round(time.monotonic() - started, 1)
    if found is None:
        return record | {"said": said.strip().splitlines()[-SAID_LINES:]}
    return record | {"found": found}


def _ended(command: list[str], seconds: float) -> tuple[str, str, int]:
    """What a command printed, and its exit code. What it started ends with it: the GPU is free.

    Raises:
        TimeoutExpired: it took longer.
    """
    with subprocess.Popen(
        command, cwd=_stages.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", env=_stages.environment(), start_new_session=True,
    ) as process:  # fmt: skip
        try:
            return *process.communicate(timeout=seconds), process.returncode
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _read(stage: Stage, scratch: Path, stdout: str) -> Any:
    try:
        return stage.read(scratch, stdout)
    except (ValueError, OSError, SyntaxError):  # no JSON, no file, no XML: it broke before
        return None


def _write(path: Path, text: str) -> None:
    """In one step: an interruption leaves the former file, or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


def _told(outcome: Outcome, record: dict[str, Any]) -> str:
    if outcome.became == "broken":
        last = record["said"][-1] if record["said"] else "it said nothing"
        return f"broken (exit code {record['exit']}): {last}"
    wrong = f", {outcome.bad} wrong" if outcome.bad else ""
    return f"{outcome.became}, {record['seconds']:.0f} s{wrong}"


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 where every stage is there and found nothing wrong."""
    return int(any(outcome.became == "broken" or outcome.bad for outcome in outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in _stages.STAGES]
    parser.add_argument("--fresh", action="store_true", help="run what is there already, too")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE",
                        help=f"of {', '.join(names)}")  # fmt: skip
    options = parser.parse_args(arguments)
    why = _card.why_none()
    if why:
        print(f"make gpu measures a GPU, and there is none: {why}", file=sys.stderr)
        return 2
    try:
        folder, made_with = RESULTS / _card.folder_name(_card.name()), _card.made_with()
    except ValueError as error:
        print(f"make gpu names what it measures, and can't: {error}", file=sys.stderr)
        return 2
    stages = [stage for stage in _stages.STAGES if stage.name in options.only]
    outcomes = measure(folder, stages, made_with, fresh=options.fresh)
    print(f"results: {folder}; commit that folder and send it")
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
