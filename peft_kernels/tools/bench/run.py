"""``peft-kernels bench``: an op beside its rivals, as ratios to what its suite names.

What is measured, and against what, stands in ``suites/<op>.py``; how, in ``measure.py``.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from peft_kernels._library import backend_of
from peft_kernels.tools import UserError
from peft_kernels.tools.bench import gpu
from peft_kernels.tools.bench.errors import Error, errors_of
from peft_kernels.tools.bench.implementation import Implementation
from peft_kernels.tools.bench.measure import Budget, Clock, Timing, interleaved
from peft_kernels.tools.bench.peak import peak_bytes
from peft_kernels.tools.devices import card, check_device
from peft_kernels.tools.outputs import check_file, unwritable
from peft_kernels.tools.printing import show

LEGEND = (
    "A ratio is the median over rounds of this time / what the title names, in the same round. "
    "In brackets: the error against float64 of the output and, with a backward, of the gradient "
    "to x, whichever is worse: its rms over that of the exact values. "
    "What is saved for the backward is counted beyond x and the parameters."
)
MISSED = "missed"
RECORD, CHART = "bench.json", "bench.png"
NONE = "-"

Cells = tuple[str, list[str], list[list[str]]]


@dataclass(frozen=True)
class Request:
    """What the command line asks for; the fields are its arguments."""

    op: str = "lora_linear"
    shapes: list[tuple[int, int, int]] | None = None
    dtype: torch.dtype = torch.float32
    backward: bool = False
    everything: bool = False
    compiled: bool = False
    device: str = "cpu"
    rounds: int = 15
    seconds: float = 1.0
    out: Path = Path("out/bench")
    markdown: Path | None = None


@dataclass(frozen=True)
class Row:
    """One case, measured: for each implementation its timing, what it saves for the backward,
    its peak above what was there before, and but for the bare layer its error.

    A suite's limits are of CPUs: where it ``has_floor`` not, there is no target."""

    case: Any
    timings: dict[str, Timing]
    saved: dict[str, int]
    peak: dict[str, int | None] = dataclasses.field(default_factory=dict)
    errors: dict[str, Error] = dataclasses.field(default_factory=dict)
    has_floor: bool = True

    @property
    def target(self) -> float | None:
        """The highest ratio allowed, or None where none is set."""
        return self.case.target if self.has_floor else None

    def verdict(self, fused: str) -> str:
        """The target and whether ``fused`` reaches it, or nothing where no target is set."""
        if self.target is None:
            return ""
        reached = self.timings[fused].ratio <= self.target
        return f"≤ {self.target:.2f} {'reached' if reached else MISSED}"

    def ratio(self, name: str) -> str:
        """The ratio of an implementation, and its error."""
        if name not in self.timings:
            return NONE
        error = f" ({self.errors[name].rms:.1e})" if name in self.errors else ""
        return f"{self.timings[name].ratio:.2f}{error}"


def bench(console: Console, request: Request) -> list[Row]:
    """Measures, prints a table a group of cases, and writes ``bench.json`` and ``bench.png``.

    Raises:
        UserError: no such op, or no such device, or outputs that can't be written, which is found
            before anything is measured.
    """
    suite = find_suite(request.op)
    check_device(request.device)
    if gpu.is_gpu(request.device):
        gpu.make_current(request.device)
    if request.rounds < 1:
        raise UserError(f"--rounds must be at least 1; got {request.rounds}")
    if not request.seconds >= 0:
        raise UserError(f"--seconds must be at least 0; got {request.seconds}")
    cases = select_cases(suite, request)
    for name, path in outputs(request):
        check_file(name, path)
    _print_conditions(console, request, cases)
    clock = gpu.event_clock(request.device) if gpu.is_gpu(request.device) else None
    rows = [measure(suite, case, request, clock) for case in _tracked(console, cases, "measuring")]
    rows = [weigh(suite, row, request) for row in _tracked(console, rows, "weighing")]
    rows = [compare(suite, row, request) for row in _tracked(console, rows, "comparing")]
    for title, header, body in tables(suite, rows):
        show(console, to_rich(title, header, body))
    console.print(LEGEND, style="dim")
    write(console, suite, request, rows)
    return rows


def _tracked(console: Console, items: list[Any], what: str) -> Iterable[Any]:
    """The items, with a bar of how far it is where there is a terminal to see it."""
    hidden = not console.is_terminal
    return track(items, description=what, console=console, transient=True, disable=hidden)


def find_suite(op: str) -> ModuleType:
    """The module ``peft_kernels.tools.bench.suites.<op>``."""
    name = f"peft_kernels.tools.bench.suites.{op}"
    if not op.isidentifier() or importlib.util.find_spec(name) is None:
        folder = Path(__file__).with_name("suites")
        known = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
        raise UserError(f"there is no op {op!r} to measure; there is {', '.join(known)}")
    return importlib.import_module(name)


def select_cases(suite: ModuleType, request: Request) -> list[Any]:
    """The cases that a request names; with ``everything`` all of the suite's, or of a GPU's."""
    if request.everything and gpu.is_gpu(request.device):
        return gpu.cases(suite, request.op)
    if request.everything:
        return list(suite.CASES)
    return suite.cases(request.shapes, request.dtype, request.backward)


def measure(suite: ModuleType, case: Any, request: Request, clock: Clock | None = None) -> Row:
    """Times a case's implementations, interleaved, and weighs what each saves for its backward."""
    plain = _built(suite, case, request)
    dropping = _built(suite, case, request, suite.DROPOUT_P)
    calls = {name: one.call(case.backward) for name, one in plain.items()}
    timings = interleaved(calls, suite.BARE, Budget(request.rounds, request.seconds), clock)
    saved = {name: one.saved_bytes() for name, one in dropping.items()}
    return Row(case, timings, saved, has_floor=not gpu.is_gpu(request.device))


def weigh(suite: ModuleType, row: Row, request: Request) -> Row:
    """The row with each implementation's peak memory, when all the timing is done."""
    found = _built(suite, row.case, request)
    calls = {name: one.call(row.case.backward) for name, one in found.items()}
    return dataclasses.replace(row, peak={name: peak_bytes(call) for name, call in calls.items()})


def compare(suite: ModuleType, row: Row, request: Request) -> Row:
    """The row with each implementation's error, but the bare layer's, which computes less."""
    found = _built(suite, row.case, request)
    others = {name: one for name, one in found.items() if name != suite.BARE}
    exact = suite.exact(row.case, device=request.device)
    return dataclasses.replace(row, errors=errors_of(others, exact, row.case.backward))


def _built(
    suite: ModuleType, case: Any, request: Request, dropout_p: float = 0.0
) -> dict[str, Implementation]:
    """A case's implementations. What was compiled for others is forgotten: a function is compiled
    so many times, and runs uncompiled from then on."""
    if request.compiled and not dropout_p:
        torch._dynamo.reset()
    options = {"device": request.device, "compiled": request.compiled, "dropout_p": dropout_p}
    return suite.implementations(case, **options)


# ---- output ----------------------------------------------------------------------------------


def _print_conditions(console: Console, request: Request, cases: list[Any]) -> None:
    for dtype in dict.fromkeys(case.dtype for case in cases):
        backend = backend_of(request.op, request.device, dtype)
        name = str(dtype).removeprefix("torch.")
        console.print(f"{request.op} of {name} on {request.device} runs on the backend '{backend}'")
    console.print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    if gpu.is_gpu(request.device):
        facts = card(torch.device(request.device))
        told = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        console.print(f"card: {told}", soft_wrap=True)


def grouped(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows of one dtype and direction together, in the order in which these first appear."""
    for group in dict.fromkeys(row.case.group for row in rows):
        yield [row for row in rows if row.case.group == group]


def tables(suite: ModuleType, rows: list[Row]) -> Iterator[Cells]:
    """Title, header and body of each table, for the terminal and for markdown alike."""
    for group in grouped(rows):
        yield _time_table(suite, group)
    yield _saved_table(suite, rows)
    if any(peak is not None for row in rows for peak in row.peak.values()):
        yield _peak_table(suite, rows)


def _time_table(suite: ModuleType, rows: list[Row]) -> Cells:
    rivals = _names(suite, (row.timings for row in rows))
    header = [suite.SHAPE, f"{suite.BARE}, ms", *rivals, "must reach"]
    body = []
    for row in rows:
        milliseconds = f"{1e3 * row.timings[suite.BARE].median:.3g}"
        ratios = [row.ratio(name) for name in rivals]
        body.append([row.case.shape, milliseconds, *ratios, row.verdict(suite.FUSED)])
    return f"{rows[0].case.group}, ratio to the {suite.BARE}", header, body


def _saved_table(suite: ModuleType, rows: list[Row]) -> Cells:
    """Once a shape and dtype: the direction that was timed makes no difference."""
    rivals = _names(suite, (row.saved for row in rows))
    distinct = {(row.case.shape, row.case.dtype): row for row in rows}
    body = []
    for (shape, dtype), row in distinct.items():
        saved = [f"{row.saved[n] / 1e3:.1f}" if n in row.saved else NONE for n in rivals]
        body.append([shape, str(dtype).removeprefix("torch."), *saved])
    title = f"saved for the backward, kB, dropout {suite.DROPOUT_P}"
    return title, [suite.SHAPE, "dtype", *rivals], body


def _peak_table(suite: ModuleType, rows: list[Row]) -> Cells:
    names = [suite.BARE, *_names(suite, (row.peak for row in rows))]
    body = []
    for row in rows:
        found = [row.peak.get(name) for name in names]
        peaks = [NONE if peak is None else f"{peak / 1e6:.1f}" for peak in found]
        body.append([row.case.shape, row.case.group, *peaks])
    return "peak above the inputs and parameters, MB", [suite.SHAPE, "pass", *names], body


def _names(suite: ModuleType, found: Iterable[Iterable[str]]) -> list[str]:
    """Every implementation that took part in some row, but the bare layer, in the first's order."""
    names = dict.fromkeys(name for names in found for name in names)
    return [name for name in names if name != suite.BARE]


def to_rich(title: str, header: list[str], body: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for values in body:
        table.add_row(*values, style="red" if values[-1].endswith(MISSED) else None)
    return table


def to_markdown(suite: ModuleType, rows: list[Row]) -> str:
    """Every table under its title."""
    parts = []
    for title, header, body in tables(suite, rows):
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"**{title}**\n\n{table}\n")
    return "\n".join([*parts, LEGEND]) + "\n"


def to_record(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as JSON can hold them."""
    return [
        {
            "shape": row.case.shape,
            "group": row.case.group,
            "target": row.target,
            "timings": {name: dataclasses.asdict(t) for name, t in row.timings.items()},
            "saved_bytes": row.saved,
            "peak_bytes": row.peak,
            "errors": {name: dataclasses.asdict(error) for name, error in row.errors.items()},
        }
        for row in rows
    ]


def to_document(request: Request, rows: Iterable[Row]) -> dict[str, Any]:
    """What ``--json`` prints: the rows, and what they were measured with; the clocks of a card are
    those after the last one."""
    device = torch.device(request.device)
    return {
        "op": request.op,
        "device": request.device,
        "card": card(device) if gpu.is_gpu(device) else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": to_record(rows),
    }


def outputs(request: Request) -> Iterator[tuple[str, Path]]:
    """The option, and the path, of every file that will be written."""
    yield "--out", request.out / RECORD
    yield "--out", request.out / CHART
    if request.markdown:
        yield "--markdown", request.markdown


def write(console: Console, suite: ModuleType, request: Request, rows: list[Row]) -> None:
    record, chart = request.out / RECORD, request.out / CHART
    _write_text("--out", record, json.dumps(to_record(rows), indent=2))
    console.print(f"numbers: {record}", soft_wrap=True)
    if request.markdown:
        _write_text("--markdown", request.markdown, to_markdown(suite, rows))
        console.print(f"tables:  {request.markdown}", soft_wrap=True)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("chart:   none, for matplotlib is not installed")
        return
    from peft_kernels.tools.bench.chart import save_chart

    try:
        save_chart(chart, suite, list(grouped(rows)))
    except OSError as error:
        raise unwritable("--out", chart, error) from error
    console.print(f"chart:   {chart}", soft_wrap=True)


def _write_text(name: str, path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise unwritable(name, path, error) from error
