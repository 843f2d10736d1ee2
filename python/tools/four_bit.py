"""Times LoRA over 4 and 8 bits beside the bare float32 layer and PEFT over bitsandbytes.

    python python/tools/four_bit.py                      # prints the table
    python python/tools/four_bit.py --json benchmarks/results/four-bit.json

A weight of 2048 x 2048 in nf4 with nested scales, or in int8 by rows, rank 16, float32 x but where
it says bfloat16. A ratio is the time over that of the bare layer with weight and x in float32,
interleaved in one process; beside it stands the error of y against float64 over the dequantised
weight and the same x. PEFT's training form dequantises the weight;
its evaluation, where the processor multiplies bfloat16, packs the codes and computes in bfloat16.
The limits are what was set before anything was measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import bitsandbytes
import peft
import torch
import torch.nn.functional as F
from _record import main
from torch import Tensor, nn

import peft_kernels
from peft_kernels.tools.bench.measure import Budget, interleaved

N, K, RANK = 2048, 2048, 16
ROWS = (1, 8, 64, 512)
FORWARD, BOTH = "forward", "forward + backward"
IN_HALVES, BYTES = "forward, bfloat16 x", "int8, forward"
BYTES_BOTH = "int8, forward + backward"
LIMITS = {
    FORWARD: (0.38, 0.48, 0.88, 0.95),
    BOTH: (0.60, 0.70, 0.95, 1.05),
    IN_HALVES: (0.40, 0.40, 0.50, 0.70),
    BYTES: (0.40, 0.48, 0.88, 0.95),
    BYTES_BOTH: (0.60, 0.70, 0.95, 1.05),
}
BARE, OURS, TRAINING, EVALUATION = (
    "bare float32",
    "accelerate",
    "PEFT, training",
    "PEFT, evaluation",
)


@dataclass(frozen=True)
class Row:
    """What was measured of a number of rows: ratios to the bare layer, and errors of y."""

    rows: int
    what: str
    bare_ms: float
    ratios: dict[str, float]
    errors: dict[str, float]

    @property
    def limit(self) -> float:
        return LIMITS[self.what][ROWS.index(self.rows)]


class Net(nn.Module):
    """One layer in codes, as PEFT wants a model."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = bits == 4, bits == 8
        own = bitsandbytes.nn
        if bits == 4:
            self.layer = own.Linear4bit(K, N, bias=False, quant_type="nf4").to("cpu")
        else:
            self.layer = own.Linear8bitLt(K, N, bias=False, has_fp16_weights=False).to("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def models(bits: int) -> dict[str, nn.Module]:
    """The same layer of PEFT's for each way to compute it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, target_modules=["layer"], init_lora_weights=False)
    model = peft.get_peft_model(Net(bits), config)
    found = {name: copy.deepcopy(model) for name in (OURS, TRAINING, EVALUATION)}
    peft_kernels.accelerate(found[OURS])
    found[EVALUATION].eval()
    return found


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """y in float64 over the dequantised weight."""
    layer: Any = model.base_model.model.layer
    own = layer.get_base_layer().weight
    if isinstance(own, bitsandbytes.nn.Params4bit):
        weight = bitsandbytes.functional.dequantize_4bit(own.data, own.quant_state).double()
    else:
        weight = own.CB.double() * own.SCB.double()[:, None] / 127
    a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    return x.double() @ weight.T + layer.scaling["default"] * (x.double() @ a.T @ b.T)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def measure(rows: int, budget: Budget) -> list[Row]:
    return [*in_nibbles(rows, budget), *in_bytes(rows, budget)]


class Problem:
    """A number of rows through the layer, as each model computes them."""

    def __init__(self, rows: int, bits: int) -> None:
        self.rows, self.found, self.weight = rows, models(bits), torch.randn(N, K)
        self.plain, self.dy = torch.randn(rows, K), torch.randn(rows, N)
        self.x = self.plain.clone().requires_grad_()
        self.calls = {BARE: lambda: F.linear(self.plain, self.weight)}
        self.steps = {BARE: self.step(lambda: F.linear(self.x, self.weight), [self.x])}

    def forward(self, name: str, x: Tensor | None = None) -> float:
        """Has a model take part in its forward, and returns the error of y."""
        model, x = self.found[name], self.plain if x is None else x
        self.calls[name] = torch.no_grad()(lambda: model(x))
        if name == TRAINING:
            self.calls[name] = lambda: model(self.x)
        expected = exact(self.found[OURS], x)
        return relative_error(self.calls[name]().detach(), expected)

    def both(self, name: str) -> None:
        model = self.found[name]
        leaves = [self.x, *(p for n, p in model.named_parameters() if "lora_" in n)]
        self.steps[name] = self.step(lambda: model(self.x), leaves)

    def step(self, forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), leaves, self.dy)

    def row(self, what: str, calls: dict, errors: dict[str, float], budget: Budget) -> Row:
        timings = interleaved(calls, BARE, budget)
        ratios = {name: timing.ratio for name, timing in timings.items() if name != BARE}
        return Row(self.rows, what, 1e3 * timings[BARE].median, ratios, errors)


def in_nibbles(rows: int, budget: Budget) -> Iterator[Row]:
    problem = Problem(rows, 4)
    errors = {name: problem.forward(name) for name in (OURS, TRAINING, EVALUATION)}
    for name in (OURS, TRAINING):
        problem.both(name)
    yield problem.row(FORWARD, problem.calls, errors, budget)
    yield problem.row(BOTH, problem.steps, errors, budget)
    error = {OURS: problem.forward(OURS, problem.plain.bfloat16())}
    peers = {name: problem.calls[name] for name in (BARE, OURS, EVALUATION)}
    yield problem.row(IN_HALVES, peers, error | {EVALUATION: errors[EVALUATION]}, budget)


def in_bytes(rows: int, budget: Budget) -> Iterator[Row]:
    problem = Problem(rows, 8)
    errors = {name: problem.forward(name) for name in (OURS, TRAINING)}
    for name in (OURS, TRAINING):
        problem.both(name)
    yield problem.row(BYTES, problem.calls, errors, budget)
    yield problem.row(BYTES_BOTH, problem.steps, errors, budget)


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, from the record."""
    names = (OURS, TRAINING, EVALUATION)
    lines = [
        f"| | rows | bare, ms | {OURS} | must reach | {TRAINING} | {EVALUATION} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in rows:
        row = Row(**record)
        ours, *peers = (
            f"{row.ratios[name]:.2f} ({row.errors[name]:.0e})" if name in row.ratios else "-"
            for name in names
        )
        verdict = "reached" if row.ratios[OURS] <= row.limit else "missed"
        cells = row.what, str(row.rows), f"{row.bare_ms:.3g}", ours, f"≤ {row.limit:.2f} {verdict}"
        lines.append(f"| {' | '.join((*cells, *peers))} |")
    return "\n".join(lines)


def measured() -> list[dict[str, Any]]:
    rows = [asdict(row) for count in ROWS for row in measure(count, Budget(15, 1.0, 15.0))]
    return sorted(rows, key=lambda row: list(LIMITS).index(row["what"]))


if __name__ == "__main__":
    main(__doc__, measured, table)
