"""Times LoRA over a 4-bit weight beside the bare float32 layer and PEFT over bitsandbytes.

    python python/tools/four_bit.py                      # prints the table
    python python/tools/four_bit.py --json benchmarks/results/four-bit.json

A weight of 2048 x 2048 in nf4 with nested scales, rank 16, float32 x. A ratio is the time over that
of the bare layer with the weight in float32, interleaved in one process; beside it stands the error
of y against float64 over the dequantised weight. PEFT's training form dequantises the weight;
its evaluation, where the processor multiplies bfloat16, packs the codes and computes in bfloat16.
The limits are what was set before anything was measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels
from peft_kernels.tools.bench.measure import Budget, interleaved

N, K, RANK = 2048, 2048, 16
ROWS = (1, 8, 64, 512)
FORWARD, BOTH = "forward", "forward + backward"
LIMITS = {FORWARD: (0.38, 0.48, 0.88, 0.95), BOTH: (0.60, 0.70, 0.95, 1.05)}
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

    is_loaded_in_4bit = True

    def __init__(self) -> None:
        super().__init__()
        self.layer = bitsandbytes.nn.Linear4bit(K, N, bias=False, quant_type="nf4").to("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def models() -> dict[str, nn.Module]:
    """The same layer of PEFT's for each way to compute it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, target_modules=["layer"], init_lora_weights=False)
    model = peft.get_peft_model(Net(), config)
    found = {name: copy.deepcopy(model) for name in (OURS, TRAINING, EVALUATION)}
    peft_kernels.accelerate(found[OURS])
    found[EVALUATION].eval()
    return found


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """y in float64 over the dequantised weight."""
    layer: Any = model.base_model.model.layer
    own = layer.get_base_layer().weight
    weight = bitsandbytes.functional.dequantize_4bit(own.data, own.quant_state).double()
    a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    return x.double() @ weight.T + layer.scaling["default"] * (x.double() @ a.T @ b.T)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def measure(rows: int, budget: Budget) -> list[Row]:
    found, weight = models(), torch.randn(N, K)
    plain, dy = torch.randn(rows, K), torch.randn(rows, N)
    x = plain.clone().requires_grad_()
    expected = exact(found[TRAINING], plain)

    def evaluated(model: nn.Module) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: model(plain))

    def both(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    forwards = {name: evaluated(model) for name, model in found.items()}
    forwards[TRAINING] = lambda: found[TRAINING](x)
    errors = {name: relative_error(call().detach(), expected) for name, call in forwards.items()}
    steps = {BARE: both(lambda: F.linear(x, weight), [x])}
    for name in (OURS, TRAINING):
        leaves = [x, *(p for n, p in found[name].named_parameters() if "lora_" in n)]
        steps[name] = both(lambda model=found[name]: model(x), leaves)
    forwards[BARE] = lambda: F.linear(plain, weight)
    lines = []
    for what, calls in ((FORWARD, forwards), (BOTH, steps)):
        timings = interleaved(calls, BARE, budget)
        ratios = {name: timing.ratio for name, timing in timings.items() if name != BARE}
        lines.append(Row(rows, what, 1e3 * timings[BARE].median, ratios, errors))
    return lines


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the record goes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = [asdict(row) for count in ROWS for row in measure(count, Budget(15, 1.0, 15.0))]
    rows.sort(key=lambda row: row["what"] == BOTH)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
