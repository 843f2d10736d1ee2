"""The pages of the site that are made when it is built: a hook of MkDocs.

A page for each op's benchmarks, with its charts, from the records under benchmarks/results; and in
other pages what stands at a line ``<!-- generated: NAME -->``.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import _results
import four_bit
import headline
import host_time
import peft_models
import peft_overhead
import quantized_models
import traffic
import vllm_serving

from peft_kernels import cli
from peft_kernels.tools.bench import run as bench
from peft_kernels.tools.bench.chart import save_chart
from peft_kernels.tools.report.run import PEERS

NOT_MEASURED = "Not measured yet."
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def on_files(files: Files, *, config) -> Files:
    """Adds the benchmarks' pages and charts."""
    for op in _results.OPS:
        _add(files, config, f"benchmarks/{op}.md", benchmark(op))
        for machine in _measured(op):
            _add(files, config, f"benchmarks/{_chart_name(op, machine)}", chart(op, machine))
    return files


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Puts what is generated in the place of its marker; an unknown name is an error."""
    return MARKER.sub(lambda found: GENERATED[found[1]](), markdown)


def _add(files: Files, config, name: str, content: str | bytes) -> None:
    files.append(File.generated(config, name, content=content))


# ---- benchmarks ------------------------------------------------------------------------------


def benchmark(op: str) -> str:
    about = re.sub(r"^What \w+ is measured on", "Measured on", bench.find_suite(op).__doc__ or "")
    parts = [f"# {op}", about]
    if not _measured(op):
        parts.append(NOT_MEASURED)
    for machine in _measured(op):
        reached, stated = _results.floors(machine, op)
        parts += [
            f"## {machine.name}",
            machine.note,
            f"Floors reached: {reached} of {stated}.",
            f"![ratios on {machine.name}]({_chart_name(op, machine)})",
            _results.markdown(machine, op),
        ]
    return "\n\n".join(parts)


def _measured(op: str) -> list[_results.Machine]:
    return [machine for machine in _results.MACHINES if op in machine.ops()]


def _chart_name(op: str, machine: _results.Machine) -> str:
    return f"{op}-{machine.name.lower().replace(' ', '-')}.svg"


def chart(op: str, machine: _results.Machine) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chart.svg"
        save_chart(path, bench.find_suite(op), list(bench.grouped(machine.rows(op))))
        return path.read_bytes()


def _floors() -> str:
    machines = _results.MACHINES
    lines = [f"| op | {' | '.join(machine.name for machine in machines)} |"]
    lines.append("| --- |" + " ---: |" * len(machines))
    for op in _results.OPS:
        measured = _measured(op)
        found = [
            _results.floors(machine, op) if machine in measured else None for machine in machines
        ]
        cells = [f"{counts[0]} of {counts[1]}" if counts else "-" for counts in found]
        lines.append(f"| [{op}]({op}.md) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _machines() -> str:
    return "\n".join(f"- **{machine.name}**: {machine.note}" for machine in _results.MACHINES)


def _cards() -> str:
    """The cards that ``make gpu`` was run on."""
    names = [f"- `benchmarks/results/{folder.name}`" for folder in _results.cards()]
    if not names:
        return "Nothing has been timed on a GPU."
    return "\n".join(["What was measured on GPUs is in the repository:", "", *names])


def _peft_models() -> str:
    """Models of PEFT's under accelerate()."""
    return peft_models.table(json.loads(_results.PEFT_MODELS.read_text()))


def _four_bit() -> str:
    """LoRA over weights of 4 and 8 bits."""
    return four_bit.table(json.loads(_results.FOUR_BIT.read_text()))


def _quantized_models() -> str:
    """A model over its GGUF file."""
    return quantized_models.table(json.loads(_results.QUANTIZED_MODELS.read_text()))


def _peft_overhead() -> str:
    """What one of their layers costs beside its operations."""
    return peft_overhead.table(json.loads(_results.PEFT_OVERHEAD.read_text()))


def _host_time() -> str:
    """What a call on a GPU takes of the host."""
    return host_time.table(json.loads(_results.HOST_TIME.read_text()))


def _vllm_serving() -> str:
    """vLLM without LoRA, with its own, and with ours."""
    record = _results.VLLM_SERVING
    return vllm_serving.table(json.loads(record.read_text())) if record.exists() else NOT_MEASURED


def _traffic() -> str:
    """Whole passes over activations beyond the bare layer's: our plans, and the peers."""
    passes: dict[str, dict[str, float]] = {}
    for row in json.loads(traffic.RECORD.read_text()):
        if row["op"] == "lora_linear" and "parts" not in row["plan"]:
            passes.setdefault(f"plan `{row['plan']}`", {})[row["direction"]] = row["extra_passes"]
    passes |= {name: {"fwd": found[0], "bwd": found[1]} for name, found in PEERS.items()}
    lines = ["| | forward | backward |", "| --- | ---: | ---: |"]
    for name, found in passes.items():
        cells = [f"{found[way]:g}" if way in found else "-" for way in ("fwd", "bwd")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- commands --------------------------------------------------------------------------------


def _commands() -> str:
    """What ``--help`` prints, for the command and each of its own."""
    parser = cli._parser()
    parsers = {"": parser} | parser._subparsers._group_actions[0].choices
    return "\n\n".join(
        f"## peft-kernels {name}\n\n```text\n{one.format_help()}```"
        for name, one in parsers.items()
    )


GENERATED: dict[str, Callable[[], str]] = {
    "headline": headline.table,
    "floors": _floors,
    "machines": _machines,
    "cards": _cards,
    "traffic": _traffic,
    "host_time": _host_time,
    "peft_models": _peft_models,
    "peft_overhead": _peft_overhead,
    "four_bit": _four_bit,
    "quantized_models": _quantized_models,
    "vllm_serving": _vllm_serving,
    "commands": _commands,
}
