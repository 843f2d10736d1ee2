"""Where the PTX of launches waits, loads and stores; `found` asks a process that compiles.

Run as a program, ``python dependent_ptx.py TARGET...``, it prints what `Ptx` has of each launch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass

from peft_kernels.tools.report import compile as report
from peft_kernels.tools.report.compile_cases import Case, CodesCase, MultiCase, PartsCase, TilesCase
from peft_kernels.tools.report.compile_prefix import PrefixCase

PLANS = ("i", "ii", "library", "persistent")
CASES = (
    Case(64, 16, "bfloat16", "float32", False, PLANS),
    Case(64, 16, "float16", "float16", False, ("library",)),
    PartsCase(Case(64, 16, "bfloat16", "float32", False, ("library",))),
    TilesCase(Case(64, 16, "bfloat16", "float32", False, ("i", "ii")), (1, 2)),
    MultiCase(64, 16, (1024,), "bfloat16", "float32", False, "grouped"),
    MultiCase(16, 16, (1024,), "bfloat16", "bfloat16", False, "decode"),
    CodesCase(16, 16, "bfloat16", "float32", False, ("fused",), "4-bit nested"),
    PrefixCase(1, 16384, 32, 64, "bfloat16", "bfloat16", "", backward=False),
)


@dataclass
class Ptx:
    """Of one launch, the numbers of the lines; ``loads`` by the pointer that they read from.

    ``early``: the lines that some way from the start comes to without a wait.
    """

    target: str
    kernel: str
    dtype: str
    constants: dict[str, object]
    options: dict[str, object]
    begins: list[int]
    waits: list[int]
    stores: list[int]
    ends: list[int]
    early: list[int]
    loads: dict[str, list[int]]

    def is_second(self) -> bool:
        return bool(self.options.get("launch_pdl"))


def found(*targets: str) -> list[Ptx]:
    """In a process without the interpreter, under which nothing is compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, *targets]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Ptx(**one) for one in json.loads(done.stdout)]


def compiled(target: str) -> list[Ptx]:
    """One launch of each kernel and set of its constants but for the sizes of its tile."""
    jobs: dict[str, report.Launch] = {}
    for job in report.launches(target, CASES):
        if job.kernel not in ("from_dy", "grad_a", "multi_grad", "sum_parts"):
            constants = {k: v for k, v in _constants(job).items() if not k.startswith("BLOCK")}
            jobs.setdefault(f"{job.kernel} {constants} {job.dtype}", job)
    return [_ptx(job) for job in jobs.values()]


def _constants(job: report.Launch) -> dict[str, object]:
    names = list(job.signature)
    return {names[place]: value for (place, *_), value in job.constexprs.items()}


def _ptx(job: report.Launch) -> Ptx:
    made = report.compiled(job)
    lines = made.asm.get("ptx", made.asm.get("amdgcn", "")).splitlines()
    kinds = [(name, kind) for name, kinds in job.signature.items() for kind in _flat(kinds)]
    passed = [(name, kind) for name, kind in kinds if kind != "constexpr"]
    return Ptx(
        target=job.target,
        kernel=job.kernel,
        dtype=job.dtype,
        constants=_constants(job),
        options=job.options,
        begins=_lines(lines, r"griddepcontrol\.launch_dependents"),
        waits=_lines(lines, r"griddepcontrol\.wait"),
        stores=_lines(lines, r"\bst\.global"),
        ends=_lines(lines, r"^\s*(@\S+\s+)?(ret|exit);"),
        early=sorted(_early(lines)),
        loads={
            name: _loads(lines, place)
            for place, (name, kind) in enumerate(passed)
            if kind.startswith("*")
        },
    )


def _flat(kinds: str | tuple) -> list[str]:
    """Of an argument, or of a tuple of one item, as that of one bank.

    A matrix's descriptor is passed with two sizes and two strides.
    """
    if isinstance(kinds, str):
        return [kinds] * (5 if kinds.startswith("tensordesc") else 1)
    return [kind for one in kinds for kind in _flat(one)]


def _lines(lines: list[str], pattern: str) -> list[int]:
    return [number for number, line in enumerate(lines) if re.search(pattern, line)]


def _early(lines: list[str]) -> set[int]:
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if "$L" in line[:3]}
    found: set[int] = set()
    ways = [0]
    while ways:
        at = ways.pop()
        if at in found or at >= len(lines) or "griddepcontrol.wait" in lines[at]:
            continue
        found.add(at)
        jump = re.match(r"\s*(@\S+\s+)?(?:bra\S*\s+(\$\w+)|ret|exit)\s*;", lines[at])
        if jump and jump.group(2):
            ways.append(labels[jump.group(2)])
        if not jump or jump.group(1):
            ways.append(at + 1)
    return found


def _loads(lines: list[str], place: int) -> list[int]:
    """Those from an address that is made of the parameter in this place."""
    addresses: set[str] = set()
    loads = []
    for number, line in enumerate(lines):
        if re.search(rf"ld\.param\.b64\s.*_param_{place}\]", line):
            addresses.add(re.findall(r"%rd\d+", line)[0])
        read = re.search(r"(?:ld\.global|cp\.async\S*global).*?\[ *(%rd\d+)[^\[]*$", line)
        if read and read.group(1) in addresses:
            loads.append(number)
        made, *of = re.findall(r"%rd\d+", line) or [""]
        if not re.search(r"\b(ld|st|cp)\.", line) and addresses & set(of):
            addresses.add(made)
    return loads


if __name__ == "__main__":
    json.dump([asdict(ptx) for target in sys.argv[1:] for ptx in compiled(target)], sys.stdout)
