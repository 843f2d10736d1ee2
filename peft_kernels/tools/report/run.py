"""``peft-kernels report``: what compiler and memory get to see of the GPU kernels.

Four kinds of tables, none of which needs a GPU:

compile   every Triton kernel in every shipped configuration, compiled for every target: registers,
          spills, shared memory against the chip's limit, tensor-core instructions (a T4 has none
          that Triton knows)
objects   the CUDA kernels in the native library, where it was built with nvcc
traffic   bytes and full-size activation passes of every plan, counted from the kernels' own loads
          and stores, against the floor and against the peers
modelled  the time on paper of `lora_linear`'s default plan over its roofline, on every chip
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from rich.console import Console
from rich.table import Table

from peft_kernels.tools.outputs import check_folder
from peft_kernels.tools.printing import show
from peft_kernels.tools.report import cuda_objects, modelled

if TYPE_CHECKING:
    from peft_kernels.tools.report.compile import CompiledRow
    from peft_kernels.tools.report.modelled import ModelledRow
    from peft_kernels.tools.report.traffic.counted import TrafficRow

TARGETS = (
    "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950",
    "other (sm_80)",
)  # fmt: skip
# Several tiles a side with the H100's tiles, and four different numbers.
TRAFFIC_SIZES = (192, 320, 256, 16)
# Full-size activation passes beyond the base GEMMs, forward and backward, of bfloat16 layers,
# read from the peers' sources.
PEERS = {"PEFT": (7.0, 9.0), "Unsloth": (3.0, 7.0), "LoRAFusion": (3.5, 2.5)}

_PARTS = (
    "Gradients of parameters are summed in parts, as many as fill the GPU: with few rows or columns"
    " these are much of what is beyond the floor"
)


def compile_table(
    targets: tuple[str, ...] = TARGETS, workers: int = 2, once: bool = False
) -> list[CompiledRow]:
    """Compiles every kernel x shipped configuration for ``targets``; ``once``, each kernel once.

    Runs in a process of its own: a process with ``TRITON_INTERPRET=1`` can't compile.
    """
    unknown = set(targets) - set(TARGETS)
    if unknown:
        raise ValueError(f"targets must be among {', '.join(TARGETS)}; got {', '.join(unknown)}")
    rows = _run("compile", [str(workers), "once" if once else "all", *targets], interpret=False)
    from peft_kernels.tools.report.compile import CompiledRow

    return [CompiledRow(**row) for row in rows]


def traffic_table(m: int, n: int, k: int, r: int) -> list[TrafficRow]:
    """Counts the traffic of every op's plans, forward and backward; four different sizes.

    The adapters of multi_lora_linear and adapter_fusion have ranks of their own; adapter and
    adapter_fusion have x, of k columns, as a residual or query, and so n = k.
    Runs in a process of its own, under the Triton interpreter.
    """
    rows = _run("traffic.rows", [str(size) for size in (m, n, k, r)], interpret=True)
    from peft_kernels.tools.report.traffic.counted import TrafficRow

    return [TrafficRow(**{**row, "sizes": tuple(row["sizes"])}) for row in rows]


def _run(module: str, arguments: list[str], *, interpret: bool) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", f"peft_kernels.tools.report.{module}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Found:
    """The rows of all tables."""

    traffic: list[TrafficRow]
    compiled: list[CompiledRow]
    objects: list[cuda_objects.CudaObjectRow]
    modelled: list[ModelledRow]

    def verdicts(self) -> list[bool]:
        """For each kernel, whether it is within its budget."""
        kernels: list[CompiledRow | cuda_objects.CudaObjectRow] = [*self.compiled, *self.objects]
        return [kernel.within_budget() for kernel in kernels]

    def outside(self) -> int:
        """How many kernels are outside their budget."""
        return self.verdicts().count(False)

    def to_document(self) -> dict[str, Any]:
        """The rows as JSON can hold them."""
        return {
            "traffic": [asdict(row) for row in self.traffic],
            "compiled": [asdict(r) | {"within_budget": r.within_budget()} for r in self.compiled],
            "objects": [asdict(r) | {"within_budget": r.within_budget()} for r in self.objects],
            "modelled": [asdict(r) | {"ratio": round(r.ratio(), 3)} for r in self.modelled],
            "outside": self.outside(),
        }


def find(console: Console, targets: tuple[str, ...] = TARGETS) -> Found:
    """Counts the traffic and compiles for ``targets``: minutes.

    Raises:
        UserError: Triton's cache can't be written.
    """
    check_folder("Triton's cache (TRITON_CACHE_DIR)", Path(triton.knobs.cache.dir))
    with console.status("counting loads and stores in the interpreter"):
        traffic = traffic_table(*TRAFFIC_SIZES)
    with console.status("compiling for " + ", ".join(targets)):
        compiled = compile_table(targets)
    return Found(traffic, compiled, cuda_objects.rows(), modelled.rows())


# ---- printing --------------------------------------------------------------------------------


def report(console: Console | None = None, targets: tuple[str, ...] = TARGETS) -> bool:
    """Prints the tables; True if every kernel is within its budget."""
    console = console or Console()
    found = find(console, targets)
    print_tables(console, found)
    return not found.outside()


def print_tables(console: Console, found: Found) -> None:
    """Every table, and how many kernels are outside their budget."""
    for op, view in TRAFFIC_VIEWS.items():
        show(console, view([row for row in found.traffic if row.op == op]))
    show(console, modelled.view(found.modelled))
    show(console, _compile_view(found.compiled))
    show(console, cuda_objects.table(found.objects))
    console.print(
        f"{len(found.verdicts())} kernels compiled, {found.outside()} outside the budget (no"
        " spills, shared memory within the chip, 16-bit products on the tensor cores, of which"
        " Triton has no instructions on sm_75). Nothing was run on a GPU."
    )


def _traffic_view(rows: list[TrafficRow]) -> Table:
    m, n, k, r = rows[0].sizes
    table = Table(
        title=f"lora_linear: memory traffic at m={m} n={n} k={k} r={r}, bfloat16 with float32"
        " adapters, dropout",
        caption="extra passes: reads and writes of x, y, dy, dx beyond the base layer's own two",
    )
    _traffic_columns(table, "direction", "plan")
    for row in rows:
        table.add_row(row.direction, row.plan, *_traffic_cells(row))
    table.add_section()
    for index, direction in enumerate(("fwd", "bwd")):
        for peer, passes in PEERS.items():
            table.add_row(direction, peer, "", f"{passes[index]:g}", "", "", "")
    return table


def _codes_traffic_view(rows: list[TrafficRow]) -> Table:
    m, n, k, r = rows[0].sizes
    table = Table(
        title=f"lora_linear over codes: memory traffic at m={m} n={n} k={k} r={r}, bfloat16 with"
        " float32 adapters",
        caption="floor: the codes with their scales, and every other input and output, once",
    )
    _traffic_columns(table, "direction", "plan")
    for row in rows:
        table.add_row(row.direction, row.plan, *_traffic_cells(row))
    return table


def _multi_traffic_view(rows: list[TrafficRow]) -> Table:
    _, n, k = rows[0].sizes
    table = Table(
        title=f"multi_lora_linear: memory traffic at n={n} k={k}, bfloat16 with float32 adapters",
        caption="adapters of mixed ranks, some of which have no rows; a quarter of the rows have no"
        " adapter. floor: weight, bias, x, y, and adapters that have rows, once, at their true"
        " ranks; S, ids and tables come on top",
    )
    _traffic_columns(table, "direction", "plan", "rows")
    for row in rows:
        table.add_row(row.direction, row.plan, str(row.sizes[0]), *_traffic_cells(row))
    return table


def _prefix_traffic_view(rows: list[TrafficRow]) -> Table:
    table = Table(
        title="prefix_attention: memory traffic, bfloat16, tiles of the H100",
        caption="floor: every tensor once; keys and values for all heads that share them, the"
        " prefix for all rows. Decoding is in parts of the keys",
    )
    return _with_sizes(table, "plan", "B Hq S T L D", rows)


def _lookup_traffic_view(rows: list[TrafficRow]) -> Table:
    table = Table(
        title="prompt_lookup: memory traffic, bfloat16 with float32 prompts",
        caption="floor: every tensor once; of the prompts those that rows have",
    )
    return _with_sizes(table, "slots", "B S L P d", rows)


def _with_sizes(table: Table, plan: str, sizes: str, rows: list[TrafficRow]) -> Table:
    """The rows of an op whose activations have more sizes than rows and columns."""
    for column in ("direction", plan, sizes):
        table.add_column(column)
    for column in ("launches", "bytes", "floor", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        launches, _, *cells = _traffic_cells(row)
        found = " ".join(map(str, row.sizes))
        table.add_row(row.direction, row.plan, found, launches, *cells)
    return table


def _adapter_traffic_view(rows: list[TrafficRow]) -> Table:
    m, _, k, r = rows[0].sizes
    table = Table(
        title=f"adapter: memory traffic at m={m} k={k} r={r}, bfloat16 with float32 parameters",
        caption="floor: every input and output once. extra passes: reads and writes of activations"
        f" beyond the floor's. {_PARTS}",
    )
    _traffic_columns(table, "direction", "layout")
    for row in rows:
        table.add_row(row.direction, row.plan, *_traffic_cells(row))
    return table


def _fusion_traffic_view(rows: list[TrafficRow]) -> Table:
    m, n, _ = rows[0].sizes
    table = Table(
        title=f"adapter_fusion: memory traffic at m={m} n={n}, 3 adapters, bfloat16 with float32"
        " parameters",
        caption="floor and extra passes as those of adapter; what a row has of the bottlenecks'"
        f" size goes from launch to launch in float32. {_PARTS}",
    )
    _traffic_columns(table, "direction", "inputs")
    for row in rows:
        table.add_row(row.direction, row.plan, *_traffic_cells(row))
    return table


TRAFFIC_VIEWS = {
    "lora_linear": _traffic_view,
    "lora_linear_codes": _codes_traffic_view,
    "multi_lora_linear": _multi_traffic_view,
    "adapter": _adapter_traffic_view,
    "adapter_fusion": _fusion_traffic_view,
    "prefix_attention": _prefix_traffic_view,
    "prompt_lookup": _lookup_traffic_view,
}


def _traffic_columns(table: Table, *names: str) -> None:
    for column in names:
        table.add_column(column)
    for column in ("launches", "extra passes", "bytes", "floor", "ratio"):
        table.add_column(column, justify="right")


def _traffic_cells(row: TrafficRow) -> tuple[str, ...]:
    return (
        str(row.launches),
        f"{row.extra_passes:g}",
        f"{row.bytes_moved:,}",
        f"{row.bytes_floor:,}",
        f"{row.bytes_moved / row.bytes_floor:.2f}",
    )


def _compile_view(rows: list[CompiledRow]) -> Table:
    table = Table(title="kernels compiled ahead of time")
    for column in ("target", "kernel", "case", "tile"):
        table.add_column(column)
    for column in ("regs", "spills", "shared KB", "of"):
        table.add_column(column, justify="right")
    table.add_column("tensor-core instructions")
    table.add_column("")
    for row in rows:
        table.add_row(
            row.target,
            row.kernel,
            row.case,
            row.tile,
            str(row.registers),
            str(row.spills),
            f"{row.shared / 1024:.1f}",
            f"{row.shared_limit / 1024:.0f}",
            ", ".join(f"{count} {name}" for name, count in row.tensor_core.items()) or "-",
            "ok" if row.within_budget() else "OUTSIDE",
        )
    return table
