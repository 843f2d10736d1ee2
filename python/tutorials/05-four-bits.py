"""Fine-tunes a sentence model with LoRA over 32, 16, 8 and 4 bits a weight, and compares the cost.

The task and the encoder are those of tutorial 01. Its linear layers are frozen in float32, in
bfloat16, in int8 with a scale for each row, or in nf4 with scales that are in codes themselves
(QLoRA). PEFT puts the same LoRA over each, peft_kernels.accelerate the kernels under it, and all
get the same batches, a step of each in turn. Beside them runs PEFT by itself over the layers that
bitsandbytes makes, if that is installed: its codes are the same, so the losses must be.

    python python/tutorials/05-four-bits.py            some minutes on two cores
    python python/tutorials/05-four-bits.py --quick    the same path in under a minute

The adapter that was trained over nf4 is saved and loaded by PEFT, with none of these kernels, into
models in the same codes. Exits with code 1 if losses or logits over the same codes disagree beyond
the tolerances below. Needs peft. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import _docstrings
import torch
from _bits import KINDS, build_in_bits, installed_kinds, linear_weights, load_in_bits, load_saved
from _chart import save_bits_chart
from _classifier import (
    Batches,
    Classifier,
    Features,
    Trainee,
    head_alone_accuracy,
    train_together,
    training_progress,
)
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model
from torch import Tensor

from peft_kernels.tools.bench.measure import Budget, interleaved
from peft_kernels.tools.bench.peak import peak_bytes

# Rounding differences grow from step to step, so losses get more room than logits of one forward.
LOSS_TOLERANCE = 1e-3
LOGIT_TOLERANCE = 1e-4
BUDGET = Budget(rounds=9, seconds=0.3)
MB = 1e6


@dataclass
class Cost:
    """One kind's bytes and seconds, and what came of its training."""

    bits: float  # a weight's, scales and all
    weight_bytes: int
    peak_bytes: int | None  # of a step, above the weights; None where the system can't tell
    step_seconds: float  # the median
    text_seconds: float  # of one text's forward, alone
    accuracy: float
    same_answers: float  # the share of the test that float32's model answers alike
    losses: list[float]


@dataclass
class Results:
    accuracy_head_alone: float
    costs: dict[str, Cost]
    logit_differences: dict[str, float]
    loss_difference: float | None = field(init=False)  # from PEFT over bitsandbytes' layers

    def __post_init__(self) -> None:
        self.loss_difference = None
        if "bitsandbytes" in self.costs:
            ours, theirs = (self.costs[kind].losses for kind in ("nf4", "bitsandbytes"))
            self.loss_difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))

    def problems(self) -> list[str]:
        found = []
        if self.loss_difference is not None and not self.loss_difference <= LOSS_TOLERANCE:
            found.append(
                f"losses over the same codes differ by {self.loss_difference:.1e}, more than "
                f"{LOSS_TOLERANCE:.0e}"
            )
        for name, difference in self.logit_differences.items():
            if not difference <= LOGIT_TOLERANCE:
                found.append(
                    f"logits of {name} differ by {difference:.1e}, more than {LOGIT_TOLERANCE:.0e}"
                )
        return found


def main() -> int:
    args = parse_arguments()
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = _docstrings.load(args.seed)
    if args.quick:
        train, test = train[:256], test[:96]
    batches = Batches()
    trainees = [
        Trainee(kind, args.steps, args.seed, build=build_in_bits) for kind in installed_kinds()
    ]
    console.print(
        f"{len(train)} docstrings to train on, {len(test)} of other modules to test on; "
        f"{trainees[0].trainable:,} parameters train"
    )
    train_with_progress(console, trainees, batches, train, args)
    results = Results(
        head_alone_accuracy(Features(batches), train, test, steps=args.steps, seed=args.seed),
        costs_of(trainees, batches, train, test, args.seed),
        round_trip(
            next(t.model for t in trainees if t.variant == "nf4"),
            batches,
            test,
            args.out / "adapter",
        ),
    )
    report(console, results, args.out)
    for problem in results.problems():
        console.print(f"[red]{problem}")
    return 1 if results.problems() else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/05-four-bits"))
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 120; 6 with --quick)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps on part of the data")
    args = parser.parse_args()
    if args.steps is None:
        args.steps = 6 if args.quick else 120
    if args.steps < 1:
        parser.error(f"--steps must be at least 1; got {args.steps}")
    return args


def train_with_progress(console, trainees, batches, train, args) -> None:
    with training_progress(console) as progress:
        task = progress.add_task("", total=args.steps, loss=math.nan)
        train_together(
            trainees,
            batches.of_training(train, args.steps, args.seed),
            lambda: progress.update(task, advance=1, loss=trainees[0].losses[-1]),
        )


# ---- what it costs, and what came of it ------------------------------------------------------


def costs_of(trainees: list[Trainee], batches: Batches, train, test, seed: int) -> dict[str, Cost]:
    batch = next(batches.of_training(train, 1, seed))
    answers, labels = {}, None
    for trainee in trainees:
        answers[trainee.variant], labels = answers_of(trainee.model, batches, test)
    seconds = seconds_of_a_text(trainees, batches, test)
    costs = {}
    for trainee in trainees:
        kind = trainee.variant
        count, size = linear_weights(load_in_bits(kind))
        costs[kind] = Cost(
            bits=8 * size / count,
            weight_bytes=size,
            peak_bytes=peak_of_a_step(kind, batch, seed),
            step_seconds=statistics.median(trainee.seconds),
            text_seconds=seconds[kind],
            accuracy=share(answers[kind] == labels),
            same_answers=share(answers[kind] == answers["float32"]),
            losses=trainee.losses,
        )
    return costs


def share(hits: Tensor) -> float:
    return hits.float().mean().item()


@torch.no_grad()
def answers_of(model: Classifier, batches: Batches, examples) -> tuple[Tensor, Tensor]:
    """The labels that the model gives and the right ones, in the evaluation's order."""
    model.eval()
    found = [
        (model(**tokens).argmax(1), labels) for tokens, labels in batches.of_evaluation(examples)
    ]
    answers, labels = zip(*found, strict=True)
    return torch.cat(answers), torch.cat(labels)


def seconds_of_a_text(trainees: list[Trainee], batches: Batches, examples) -> dict[str, float]:
    """The median of a forward of the shortest text, of each model in turn."""
    tokens, _ = batches.collate([min(examples, key=lambda e: len(e.text))])
    calls = {t.variant: torch.no_grad()(lambda t=t: t.model.eval()(**tokens)) for t in trainees}
    return {kind: found.median for kind, found in interleaved(calls, "float32", BUDGET).items()}


def peak_of_a_step(kind: str, batch: tuple[dict[str, Tensor], Tensor], seed: int) -> int | None:
    """The bytes that a step of a new model adds to its weights, its batch and its optimizer."""
    trainee = Trainee(kind, 2, seed, build=build_in_bits)
    return peak_bytes(lambda: trainee.step(*batch))


@torch.no_grad()
def round_trip(model: Classifier, batches: Batches, test, folder: Path) -> dict[str, float]:
    """Saves the adapter, loads it by PEFT alone, and gives the largest difference of the logits.

    The head, which PEFT has no part in, lies beside.
    """
    model.eval().encoder.save_pretrained(folder)
    save_model(model.head, str(folder / "head.safetensors"))
    tokens, _ = batches.collate(test[:64])
    expected = model(**tokens)
    differences = {}
    for kind in ("nf4", "bitsandbytes"):
        if kind not in installed_kinds():
            continue
        # An evaluation of bitsandbytes' layers would compute in bfloat16; the model has no dropout.
        other = type(model)(load_saved(kind, folder).train())
        other.head = model.head
        with torch.enable_grad():
            logits = other(**tokens)
        differences[f"PeftModel.from_pretrained, {OVER[kind]}"] = (
            (logits - expected).abs().max().item()
        )
    return differences


OVER = {"nf4": "over quantize_linear", "bitsandbytes": "over load_in_4bit"}


# ---- report ----------------------------------------------------------------------------------


def report(console: Console, results: Results, out: Path) -> None:
    chart, numbers = out / "chart.png", out / "results.json"
    save_bits_chart(chart, KINDS, results.costs)
    numbers.write_text(json.dumps(asdict(results), indent=2))
    console.print(cost_table(results), learning_table(results), agreement_table(results))
    console.print(f"adapter: {out / 'adapter'}\nchart:   {chart}\nnumbers: {numbers}")


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("linear layers", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def cost_table(results: Results) -> Table:
    table = new_table(
        "Memory and time",
        "bits",
        "weights\nMB",
        "peak\nMB",
        "step\nms",
        "ratio",
        "text\nms",
        "ratio",
    )
    base = results.costs["float32"]
    for kind, name in KINDS.items():
        cost = results.costs.get(kind)
        if cost is None:
            table.add_row(name, "not installed")
            continue
        table.add_row(
            name,
            f"{cost.bits:.2f}",
            f"{cost.weight_bytes / MB:.1f}",
            "-" if cost.peak_bytes is None else f"{cost.peak_bytes / MB:.0f}",
            f"{1e3 * cost.step_seconds:.0f}",
            f"{cost.step_seconds / base.step_seconds:.2f}",
            f"{1e3 * cost.text_seconds:.1f}",
            f"{cost.text_seconds / base.text_seconds:.2f}",
        )
    table.caption = (
        "weights: of the linear layers, scales and all; peak: what a training step adds; "
        "step, text: medians of a training step, and of an evaluation of the shortest text"
    )
    return table


def learning_table(results: Results) -> Table:
    table = new_table("Learning", "last loss", "accuracy", "answers as float32")
    table.add_row("head alone, float32", "-", percent(results.accuracy_head_alone), "-")
    for kind, cost in results.costs.items():
        table.add_row(
            KINDS[kind],
            f"{cost.losses[-1]:.3f}",
            percent(cost.accuracy),
            percent(cost.same_answers),
        )
    return table


def agreement_table(results: Results) -> Table:
    table = Table(title="Differences over the same codes", title_justify="left")
    table.add_column("what")
    for column in ("largest", "tolerance"):
        table.add_column(column, justify="right")
    if results.loss_difference is not None:
        table.add_row(
            "losses, PEFT alone over load_in_4bit",
            f"{results.loss_difference:.1e}",
            f"{LOSS_TOLERANCE:.0e}",
        )
    for name, difference in results.logit_differences.items():
        table.add_row(f"logits, {name}", f"{difference:.1e}", f"{LOGIT_TOLERANCE:.0e}")
    return table


def percent(part: float) -> str:
    return f"{100 * part:.1f} %"


if __name__ == "__main__":
    raise SystemExit(main())
