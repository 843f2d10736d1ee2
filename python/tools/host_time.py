"""Times what a call on a GPU takes of the host, and counts its launches, without a GPU.

    python python/tools/host_time.py                     # prints the table
    python python/tools/host_time.py --json benchmarks/results/host-time.json

Tensors are small and on the CPU, plans are an H100's, and where a kernel would be launched nothing
is: what is left is the public function, autograd, the dispatcher and the launcher. Triton's own
launch and the driver's come on top for each launch. Values that only a CPU's are looked at aren't.
The bare layer is `F.linear` of the same size.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from _record import main

import peft_kernels
from peft_kernels import ops
from peft_kernels.nn.norms import Norms
from peft_kernels.tools.verify.cases import Case, leaves_of

BARE, CHIP, DTYPE = "F.linear", "sm_90", torch.bfloat16
ROWS, SIZE, RANK = 8, 64, 16
ROUNDS, CALLS = 15, 50
ABSORBED = "up_weights", "up_biases", "query_weight", "query_bias", "key_weight", "value_weight"


@dataclass(frozen=True)
class Row:
    """Of one op: microseconds of a call and launches, alone and with its backward."""

    what: str
    forward: float
    forward_backward: float
    launches_forward: int
    launches_forward_backward: int


def example(op: str, *sizes: Any) -> dict[str, Any]:
    module = importlib.import_module(f"peft_kernels.ops.{op}")
    return module.example_inputs(*sizes, dtype=DTYPE)


def linear(op: str, *trained: str) -> Case:
    inputs = example(op, ROWS, SIZE, SIZE, RANK)
    return Case(op, getattr(ops, op), inputs, ("x", "lora_a", "lora_b", *trained))


def dora() -> Case:
    """With the norms as a layer keeps them."""
    case, norms = linear("dora_linear", "magnitude"), Norms()

    def call(**inputs: Any) -> torch.Tensor:
        parts = inputs["weight"], inputs["lora_a"], inputs["lora_b"]
        return ops.dora_linear(**inputs, norm=norms.of(*parts, 1.0))

    return replace(case, call=call)


def bare() -> Case:
    lora = example("lora_linear", ROWS, SIZE, SIZE, RANK)
    inputs = {"input": lora["x"], "weight": lora["weight"], "bias": lora["bias"]}
    return Case(BARE, F.linear, inputs, ("input",))


def multi() -> Case:
    inputs = example("multi_lora_linear", ROWS, SIZE, SIZE, [RANK] * ROWS)
    module = importlib.import_module("peft_kernels.ops.multi_lora_linear")
    inputs["trained"] = [module.example_trained(bank, (0, 1)) for bank in inputs["banks"]]
    return Case("multi_lora_linear", ops.multi_lora_linear, inputs, ("x", "trained"))


def bottleneck() -> Case:
    inputs = example("adapter", ROWS, SIZE, RANK)
    call = partial(ops.adapter, activation="relu")
    return Case("adapter", call, inputs, tuple(inputs))


def fusion() -> Case:
    """Of matrices that are absorbed already; what absorbs them is a row of its own."""
    inputs = example("adapter_fusion", ROWS, SIZE, [RANK, RANK])
    of = [inputs.pop(name) for name in ABSORBED]
    absorbed = vars(ops.absorb(*of))

    def call(
        score_weight: Any, score_bias: Any, mix_weight: Any, mix_bias: Any, **rest: Any
    ) -> Any:
        parts = ops.Absorbed(score_weight, score_bias, mix_weight, mix_bias)
        return ops.adapter_fusion(**rest, absorbed=parts)[0]

    trained = "x", "down_weights", "down_biases", *absorbed
    return Case("adapter_fusion", call, inputs | absorbed, trained)


def absorbing() -> Case:
    """That of `adapter_fusion`'s matrices, in torch's own operations: no launch is counted."""
    found = example("adapter_fusion", ROWS, SIZE, [RANK, RANK])
    inputs = {name: found[name] for name in ABSORBED}

    def call(**given: Any) -> torch.Tensor:
        return ops.absorb(*given.values()).score_weight

    return Case("absorb", call, inputs, ABSORBED)


def attention() -> Case:
    inputs = example("prefix_attention", 1, ROWS, 4, 4, SIZE, 16)
    return Case("prefix_attention", ops.prefix_attention, inputs, tuple(inputs))


def lookup() -> Case:
    inputs = example("prompt_lookup", 1, ROWS, SIZE, 4)
    call = lambda **given: ops.prompt_lookup(**given).embeddings  # noqa: E731
    return Case("prompt_lookup", call, inputs, ("embeddings", "prompts"))


def forward_of(case: Case) -> Callable[[], object]:
    return lambda: case.call(**case.inputs)


def step_of(case: Case) -> Callable[[], object]:
    inputs, leaves = leaves_of(case, case.inputs)
    dy = torch.ones_like(case.call(**inputs))
    return lambda: torch.autograd.grad(case.call(**inputs), leaves, dy, allow_unused=True)


def microseconds(call: Callable[[], object]) -> float:
    """Of the process, by call: the least of the rounds, for what else runs only adds."""
    for _ in range(CALLS):
        call()
    rounds = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        for _ in range(CALLS):
            call()
        rounds.append((time.process_time() - begin) / CALLS)
    return 1e6 * min(rounds)


def launches(call: Callable[[], object]) -> int:
    with patch("peft_kernels.triton.common.launch.run") as run:
        call()
    return run.call_count


def row_of(case: Case) -> Row:
    with torch.no_grad():
        forward = microseconds(forward_of(case))
        count = launches(forward_of(case))
    step = step_of(case)
    return Row(case.name, forward, microseconds(step), count, launches(step))


def measure() -> list[dict[str, Any]]:
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before Triton is imported: launchers take a CPU's tensors
    )
    torch.set_num_threads(1)
    layers = linear("lora_linear"), dora(), multi()
    others = bottleneck(), fusion(), absorbing(), attention(), lookup()
    gpu = patch("peft_kernels.triton.common.chips.arch_name", lambda device: CHIP)
    nothing = patch("peft_kernels.triton.common.launch.run", lambda *launched: None)
    unseen = patch("peft_kernels.ops._lora_banks._bounds", lambda ids: (0, 0))
    with gpu, nothing, unseen, peft_kernels.backend("triton"):
        rows = [row_of(case) for case in (bare(), *layers, *others)]
    return [asdict(row) for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, from the record."""
    bare = Row(**rows[0])
    lines = [
        "| | µs forward | over `F.linear` | launches | µs forward and backward | over `F.linear`"
        " | launches |",
        "| --- |" + " ---: |" * 6,
    ]
    for record in rows:
        row = Row(**record)
        cells = [
            f"{row.forward:.0f}",
            f"{row.forward - bare.forward:+.0f}",
            row.launches_forward,
            f"{row.forward_backward:.0f}",
            f"{row.forward_backward - bare.forward_backward:+.0f}",
            row.launches_forward_backward,
        ]
        lines.append(f"| `{row.what}` | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, measure, table)
