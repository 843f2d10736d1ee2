"""What nvcc made of the CUDA kernels in the native library: registers, spills, shared memory.

Needs no GPU: ``cuobjdump`` reads it out of the library. It comes with the CUDA toolkit and with
Triton's wheel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from peft_kernels._library import NATIVE_LIBRARY

_ARCHITECTURE = re.compile(r"arch = (sm_\w+)")
_FUNCTION = re.compile(r"Function (\S+):")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# name<arguments> as the compilers mangle it: booleans, integers, and types by letter or by name.
_NAME = re.compile(
    r"4cuda\d+([A-Za-z]\w*?)I((?:L[bij]\d+E|S\d*_|\d+(?:__half|__nv_bfloat16)|f)+)EE"
)
_ARGUMENT = re.compile(r"L(b|i|j)(\d+)E|(S\d*_)|\d+(__half|__nv_bfloat16)|(f)")


@dataclass(frozen=True)
class CudaObjectRow:
    """One kernel for one architecture."""

    architecture: str
    kernel: str
    registers: int
    spills: int  # bytes of local memory and stack a thread
    shared: int  # bytes a block, beyond what the launch asks for

    def within_budget(self) -> bool:
        return self.spills == 0


def why_none(library: Path = NATIVE_LIBRARY) -> str | None:
    """Why :func:`rows` finds nothing, or None if it does."""
    if not library.exists():
        return "the native library isn't built"
    if _cuobjdump() is None:
        return "cuobjdump was not found: it comes with the CUDA toolkit, and with Triton"
    if not parse(_read(library)):
        return "the native library was built without nvcc"
    return None


def rows(library: Path = NATIVE_LIBRARY) -> list[CudaObjectRow]:
    """Every kernel for every architecture that the library holds machine code for."""
    return parse(_read(library)) if library.exists() and _cuobjdump() else []


def table(rows: list[CudaObjectRow]) -> Table:
    """The rows as a table, a line a kernel; without any, it says why."""
    view = Table(title="CUDA C++ kernels: registers a thread (spilled bytes)")
    view.add_column("kernel")
    if not rows:
        view.add_row(f"none: {why_none()}")
        return view
    view.caption = (
        "multi_lora_decode<with the base product, whole vectors, rows, dtype of x, of the adapters>"
        " prompt_lookup<elements moved at once, dtype of the embeddings, of the prompts>"
    )
    architectures = sorted({row.architecture for row in rows}, key=_number)
    for architecture in architectures:
        view.add_column(architecture, justify="right")
    view.add_column("")
    for kernel in sorted({row.kernel for row in rows}):
        own = {row.architecture: row for row in rows if row.kernel == kernel}
        cells = [_cell(own[name]) if name in own else "" for name in architectures]
        good = all(row.within_budget() for row in own.values())
        view.add_row(kernel, *cells, "ok" if good else "OUTSIDE")
    return view


def _cell(row: CudaObjectRow) -> str:
    return f"{row.registers} ({row.spills})" if row.spills else str(row.registers)


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture))


def _cuobjdump() -> Path | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [Path(home, "bin") for home in homes]
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parent)
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    found = shutil.which("cuobjdump", path=path)
    return Path(found) if found else None


def _read(library: Path) -> str:
    tool = _cuobjdump()
    assert tool is not None
    command = [str(tool), "-res-usage", str(library)]
    # it may start tools that lie beside it
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    # a library without device code is an error of its own
    return done.stdout


def parse(text: str) -> list[CudaObjectRow]:
    """The rows of what ``cuobjdump -res-usage`` printed."""
    found, architecture, function = [], "", ""
    for line in text.splitlines():
        if match := _ARCHITECTURE.match(line):
            architecture = match.group(1)
        elif match := _FUNCTION.search(line):
            function = match.group(1)
        elif match := _USAGE.search(line):
            registers, stack, shared, local = map(int, match.groups())
            name = _readable(function)
            found.append(CudaObjectRow(architecture, name, registers, stack + local, shared))
    return sorted(found, key=lambda row: (_number(row.architecture), row.kernel))


def _readable(mangled: str) -> str:
    """``name<arguments>`` of one of this library's kernels; other names as they are."""
    match = _NAME.search(mangled)
    if match is None:
        return mangled
    arguments: list[str] = []
    for kind, number, repeated, half, _ in _ARGUMENT.findall(match.group(2)):
        if kind == "b":
            arguments.append("true" if number == "1" else "false")
        elif kind:
            arguments.append(number)
        elif repeated:  # of the types, only the one before can recur
            arguments.append(arguments[-1])
        else:
            arguments.append({"__half": "half", "__nv_bfloat16": "bfloat16"}.get(half, "float"))
    return f"{match.group(1)}<{', '.join(arguments)}>"
