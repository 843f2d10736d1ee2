"""Fine-tunes a pretrained sentence model with LoRA, three times over, and compares what it costs.

The task is real: from which package of the standard library does a docstring come? The same
training (same weights, same batches, no dropout) runs on peft_kernels' fused layers, on its
pure-PyTorch fallback, and on Hugging Face PEFT if that is installed. Then the adapter is saved in
PEFT's format and loaded back, by peft_kernels and by PEFT. Nothing is downloaded.

    python python/tutorials/01-lora-fine-tuning.py            a few minutes on two cores
    python python/tutorials/01-lora-fine-tuning.py --quick    the same path in well under a minute

It exits with code 1 if losses or logits disagree beyond the tolerances below.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import _docstrings
import _memory
import torch
from _chart import save_chart
from _classifier import (
    VARIANTS,
    Batches,
    Classifier,
    Features,
    R,
    Trainee,
    accuracy,
    head_alone_accuracy,
    installed_variants,
    load_encoder,
    load_in_peft,
    train_together,
    training_progress,
)
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model

import peft_kernels

# Rounding differences grow from step to step, so losses get more room than logits of one forward.
LOSS_TOLERANCE = 1e-3
LOGIT_TOLERANCE = 1e-4
DROPOUT = 0.1
MB = 1e6


@dataclass
class Cost:
    """One variant: seconds of a step, bytes, and how far its losses are from the fused ones.

    ``saved_bytes_dropout`` is what a forward saves when LoRA's dropout is on, as it often is.
    """

    step_seconds: float
    saved_bytes: int
    saved_bytes_dropout: int
    peak_bytes: int | None
    accuracy: float
    loss_difference: float


@dataclass
class Results:
    accuracy_before: float
    accuracy_head_alone: float
    accuracy_after: float
    costs: dict[str, Cost] = field(default_factory=dict)
    logit_differences: dict[str, float] = field(default_factory=dict)

    def problems(self) -> list[str]:
        losses = {VARIANTS[v]: cost.loss_difference for v, cost in self.costs.items()}
        return [
            *_beyond("losses", losses, LOSS_TOLERANCE),
            *_beyond("logits", self.logit_differences, LOGIT_TOLERANCE),
        ]


def _beyond(what: str, differences: dict[str, float], tolerance: float) -> list[str]:
    return [
        f"{what} of {name} differ by {difference:.1e}, more than {tolerance:.0e}"
        for name, difference in differences.items()
        if not difference <= tolerance
    ]


def main() -> int:
    args = parse_arguments()
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = _docstrings.load(args.seed)
    if args.quick:
        train, test = train[:256], test[:96]
    print_data(console, train, test)
    batches = Batches()
    trainees = [Trainee(v, args.steps, args.seed) for v in installed_variants()]
    fused = trainees[0]
    print_models(console, fused)

    results = Results(
        accuracy_before=accuracy(fused.model, batches, test),
        accuracy_head_alone=head_alone_accuracy(
            Features(batches), train, test, steps=args.steps, seed=args.seed
        ),
        accuracy_after=math.nan,
    )
    train_with_progress(console, trainees, batches, train, args)
    for trainee in trainees:
        results.costs[trainee.variant] = cost_of(trainee, fused, batches, train, test, args)
    results.accuracy_after = results.costs["fused"].accuracy
    results.logit_differences = round_trip(fused.model, batches, test, args.out / "adapter")

    report(console, results, trainees, args.out)
    for problem in results.problems():
        console.print(f"[red]{problem}")
    return 1 if results.problems() else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/01-lora-fine-tuning"))
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 120; 8 with --quick)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps on part of the data, no peak memory"
    )
    args = parser.parse_args()
    if args.steps is None:
        args.steps = 8 if args.quick else 120
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


def cost_of(trainee, fused, batches, train, test, args) -> Cost:
    tokens, labels = next(batches.of_training(train, 1, args.seed))
    with_dropout = Trainee(trainee.variant, args.steps, args.seed, DROPOUT)
    pairs = zip(trainee.losses, fused.losses, strict=True)
    with trainee.backend():
        after = accuracy(trainee.model, batches, test)
    return Cost(
        step_seconds=statistics.median(trainee.seconds),
        saved_bytes=trainee.saved_bytes(tokens, labels),
        saved_bytes_dropout=with_dropout.saved_bytes(tokens, labels),
        peak_bytes=None if args.quick else _memory.peak_bytes(trainee.variant, args.seed),
        accuracy=after,
        loss_difference=max(abs(a - b) for a, b in pairs),
    )


@torch.no_grad()
def round_trip(model: Classifier, batches: Batches, test, folder: Path) -> dict[str, float]:
    """Saves the adapter, loads it elsewhere, and gives the largest difference of the logits.

    The folder is PEFT's format for the encoder; the head, which PEFT has no part in, lies beside.
    """
    peft_kernels.save_adapter(model.encoder, folder)
    save_model(model.head, str(folder / "head.safetensors"))
    tokens, _ = batches.collate(test[:64])
    expected = model(**tokens)
    loaded = {"peft_kernels.load_adapter": peft_kernels.load_adapter(load_encoder(), folder)}
    if "peft" in installed_variants():
        loaded["PeftModel.from_pretrained"] = load_in_peft(folder)
    differences = {}
    for name, encoder in loaded.items():
        other = Classifier(encoder)
        other.head = model.head
        differences[name] = (other(**tokens) - expected).abs().max().item()
    return differences


# ---- report ----------------------------------------------------------------------------------


def print_data(console: Console, train, test) -> None:
    modules = [len({e.module for e in split}) for split in (train, test)]
    console.print(
        f"{len(train)} docstrings of {modules[0]} modules to train on, {len(test)} of "
        f"{modules[1]} other modules to test on, {len(_docstrings.LABELS)} packages"
    )


def print_models(console: Console, trainee: Trainee) -> None:
    total = sum(p.numel() for p in trainee.model.parameters())
    backend = peft_kernels.backend_of(
        "lora_linear", next(trainee.model.parameters()).device, torch.float32
    )
    console.print(
        f"all-MiniLM-L6-v2 with LoRA of rank {R}: {trainee.trainable:,} of {total:,} parameters "
        f"train; the fused layers run on the backend '{backend}'"
    )


def report(console: Console, results: Results, trainees: list[Trainee], out: Path) -> None:
    chart = out / "chart.png"
    draw(chart, results, trainees)
    record = asdict(results) | {"losses": {t.variant: t.losses for t in trainees}}
    (out / "results.json").write_text(json.dumps(record, indent=2))
    console.print(accuracy_table(results), cost_table(results), agreement_table(results))
    console.print(f"adapter: {out / 'adapter'}\nchart:   {chart}\nnumbers: {out / 'results.json'}")


def accuracies(results: Results) -> dict[str, float]:
    return {
        "before\n(new head)": results.accuracy_before,
        "head alone\ntrained": results.accuracy_head_alone,
        "LoRA and head\ntrained": results.accuracy_after,
    }


def accuracy_table(results: Results) -> Table:
    table = Table(title="Accuracy on the held-out modules", title_justify="left")
    for name in accuracies(results):
        table.add_column(name, justify="right")
    table.add_row(*(f"{100 * a:.1f} %" for a in accuracies(results).values()))
    return table


def cost_table(results: Results) -> Table:
    table = Table(title="The same training, three ways", title_justify="left")
    table.add_column("layers", no_wrap=True)
    columns = ("step", "ratio", "saved", f"saved, dropout {DROPOUT}", "peak", "accuracy")
    for column in columns:
        table.add_column(column, justify="right")
    base = results.costs["fused"].step_seconds
    for variant, name in VARIANTS.items():
        cost = results.costs.get(variant)
        if cost is None:
            table.add_row(name, "not installed")
            continue
        table.add_row(
            name,
            f"{1e3 * cost.step_seconds:.0f} ms",
            f"{cost.step_seconds / base:.2f}",
            f"{cost.saved_bytes / MB:.1f} MB",
            f"{cost.saved_bytes_dropout / MB:.1f} MB",
            "-" if cost.peak_bytes is None else f"{cost.peak_bytes / MB:.0f} MB",
            f"{100 * cost.accuracy:.1f} %",
        )
    table.caption = (
        "step: median; saved: activations kept for the backward; "
        "peak: above the loaded model, each in a process of its own"
    )
    return table


def agreement_table(results: Results) -> Table:
    table = Table(title="Differences from the fused training, over all steps", title_justify="left")
    table.add_column("what")
    for column in ("largest", "tolerance"):
        table.add_column(column, justify="right")
    for variant, cost in results.costs.items():
        if variant != "fused":
            name = f"losses, {VARIANTS[variant]}"
            table.add_row(name, f"{cost.loss_difference:.1e}", f"{LOSS_TOLERANCE:.0e}")
    for name, difference in results.logit_differences.items():
        table.add_row(f"logits, {name}", f"{difference:.1e}", f"{LOGIT_TOLERANCE:.0e}")
    return table


def draw(path: Path, results: Results, trainees: list[Trainee]) -> None:
    costs = results.costs
    memory = {
        "saved for\nbackward": {v: c.saved_bytes / MB for v, c in costs.items()},
        f"saved, LoRA\ndropout {DROPOUT}": {
            v: c.saved_bytes_dropout / MB for v, c in costs.items()
        },
    }
    if all(c.peak_bytes is not None for c in costs.values()):
        memory["peak"] = {v: (c.peak_bytes or 0) / MB for v, c in costs.items()}
    save_chart(
        path,
        VARIANTS,
        {t.variant: t.losses for t in trainees},
        accuracies(results),
        {v: c.step_seconds for v, c in costs.items()},
        memory,
    )


if __name__ == "__main__":
    raise SystemExit(main())
