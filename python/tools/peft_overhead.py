"""Times what a LoRA layer of PEFT's adds to the operations that it calls, and what ours adds.

    python python/tools/peft_overhead.py                      # prints the table
    python python/tools/peft_overhead.py --json benchmarks/results/peft-overhead.json

One row through a layer of 256 x 256, rank 16, on one thread. A layer's overhead is the time of a
call less that of its operations alone: for PEFT torch's, for ours the op; in training both as
autograd records them. The limit is what was set before anything was measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
import torch.nn.functional as F
from _record import main
from torch import Tensor, nn

import peft_kernels
from peft_kernels.ops.lora_linear import _call, _LoRALinear
from peft_kernels.tools.bench.measure import Budget, interleaved

LIMIT = 0.5
WIDTH, RANK = 256, 16
PEFT, PEFT_OPS, OURS, OURS_OP = "PEFT", "PEFT's operations", "accelerate", "the op"


def layers() -> tuple[Any, Any]:
    """A layer of PEFT's, and its copy under accelerate()."""
    config = peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH)), config)
    ours = copy.deepcopy(theirs)
    peft_kernels.accelerate(ours)
    return theirs.base_model.model[0], ours.base_model.model[0]


def calls(training: bool) -> dict[str, Callable[[], object]]:
    theirs, ours = layers()
    x = torch.randn(1, WIDTH, requires_grad=training)
    base, scale = theirs.base_layer, theirs.scaling["default"]
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight

    def operations() -> Tensor:
        low_rank = F.linear(F.linear(x, a), b) * scale
        return F.linear(x, base.weight, base.bias) + low_rank

    def op() -> Tensor:
        arguments = x, base.weight, base.bias, a, b, scale, None, 0.0, None
        return _LoRALinear.apply(*arguments, "") if training else _call(*arguments)

    found = {PEFT: lambda: theirs(x), PEFT_OPS: operations, OURS: lambda: ours(x), OURS_OP: op}
    return {name: torch.set_grad_enabled(training)(call) for name, call in found.items()}


def measure(training: bool, budget: Budget) -> dict[str, Any]:
    found = interleaved(calls(training), PEFT, budget)
    return {"training": training} | {name: 1e6 * one.median for name, one in found.items()}


def ratio(row: dict[str, Any]) -> float:
    """Our overhead over PEFT's."""
    return (row[OURS] - row[OURS_OP]) / (row[PEFT] - row[PEFT_OPS])


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, from the record."""
    lines = [
        "| | PEFT's layer, us | its operations | accelerated, us | its op | ratio of the overheads"
        " | must reach |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = (f"{row[name]:.1f}" for name in (PEFT, PEFT_OPS, OURS, OURS_OP))
        verdict = "reached" if ratio(row) <= LIMIT else "missed"
        name = "forward in training" if row["training"] else "forward without gradients"
        numbers = f"{' | '.join(cells)} | {ratio(row):.2f} | ≤ {LIMIT:.2f} {verdict}"
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


def measured() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [measure(training, Budget(31, 2.0)) for training in (False, True)]


if __name__ == "__main__":
    main(__doc__, measured, table)
