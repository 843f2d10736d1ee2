"""The records under benchmarks/results, read back as the rows of ``peft-kernels bench``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from peft_kernels.tools.bench import run as bench
from peft_kernels.tools.bench.errors import Error
from peft_kernels.tools.bench.measure import Timing

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PEFT_MODELS = RESULTS / "peft-models.json"  # python/tools/peft_models.py
FOUR_BIT = RESULTS / "four-bit.json"  # python/tools/four_bit.py
QUANTIZED_MODELS = RESULTS / "quantized-models.json"  # python/tools/quantized_models.py
HOST_TIME = RESULTS / "host-time.json"  # python/tools/host_time.py
VLLM_SERVING = RESULTS / "vllm-serving.json"  # python/tools/vllm_serving.py
PEFT_OVERHEAD = RESULTS / "peft-overhead.json"  # python/tools/peft_overhead.py
# An op that was added and not measured yet has no record.
OPS = (
    "lora_linear",
    "dora_linear",
    "multi_lora_linear",
    "adapter",
    "adapter_fusion",
    "prefix_attention",
    "prompt_lookup",
)


@dataclass(frozen=True)
class Machine:
    """Where a folder of results was measured, and what a reader must know of it."""

    name: str
    folder: Path
    note: str

    def rows(self, op: str) -> list[bench.Row]:
        """The rows of an op's record, in its order."""
        return [_row(record) for record in json.loads(self.record(op).read_text())]

    def record(self, op: str) -> Path:
        return self.folder / f"{op}.json"

    def ops(self) -> tuple[str, ...]:
        """Those that were measured here."""
        return tuple(op for op in OPS if self.record(op).exists())


MACHINES = (
    Machine(
        "AMD Zen 4",
        RESULTS,
        "2 cores of an AMD EPYC, AVX2 kernels, torch 2.13.0. All but dora_linear measured with"
        " earlier kernels: the present ones sum in shorter runs, and have not been timed there.",
    ),
    Machine(
        "Intel Sapphire Rapids",
        RESULTS / "sapphire-rapids",
        "2 cores of an Intel Xeon, AVX-512 kernels, torch 2.13.0. Measured with the present"
        " kernels; the error against float64 stands beside each ratio.",
    ),
)


def _row(record: dict[str, Any]) -> bench.Row:
    group: str = record["group"]
    case = SimpleNamespace(
        shape=record["shape"],
        group=group,
        target=record["target"],
        dtype=getattr(torch, group.split()[0]),
    )
    return bench.Row(
        case,
        {name: Timing(**timing) for name, timing in record["timings"].items()},
        record["saved_bytes"],
        record["peak_bytes"],
        {name: Error(**error) for name, error in record.get("errors", {}).items()},
    )


def markdown(machine: Machine, op: str) -> str:
    """The tables of an op on a machine."""
    return bench.to_markdown(bench.find_suite(op), machine.rows(op))


def markdown_of(op: str, records: list[dict[str, Any]]) -> str:
    """The tables of an op's rows, as ``bench --json`` prints them."""
    return bench.to_markdown(bench.find_suite(op), [_row(record) for record in records])


def cards() -> list[Path]:
    """The folders that ``make gpu`` wrote: they have a page, and the other machines' have none."""
    return sorted(page.parent for page in RESULTS.glob("*/README.md"))


def floors(machine: Machine, op: str) -> tuple[int, int]:
    """How many of an op's floors are reached, and how many it has."""
    suite = bench.find_suite(op)
    verdicts = [row.verdict(suite.FUSED) for row in machine.rows(op)]
    stated = [verdict for verdict in verdicts if verdict]
    return sum(not verdict.endswith(bench.MISSED) for verdict in stated), len(stated)


def times(machine: Machine, op: str, peer: str, group: str) -> Iterator[float]:
    """Our time over a peer's, for each shape of a group that both take part in."""
    fused = bench.find_suite(op).FUSED
    for row in machine.rows(op):
        if row.case.group == group and peer in row.timings:
            yield row.timings[fused].ratio / row.timings[peer].ratio
