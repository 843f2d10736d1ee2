"""One model, eight adapters, one batch: trains eight LoRA adapters together and serves them mixed.

Each adapter learns to answer its own question about docstrings of the standard library. All eight
train in one AdapterPool, in batches that have rows of every task. Saved in PEFT's format and loaded
into a fresh pool, they serve a mixed batch, which is compared row by row with eight separate
models, each with one adapter merged into its weights. Then the time of a batch is measured against
the number of different adapters in it. Nothing is downloaded.

    python python/tutorials/02-many-adapters.py            under two minutes on two cores
    python python/tutorials/02-many-adapters.py --quick    the same path in half a minute

It fails if a logit differs from the merged models' by more than the tolerance below.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import _tasks
import torch
import torch.nn.functional as F
from _chart import save_many_adapters_chart
from _classifier import (
    TARGETS,
    Batches,
    Classifier,
    Features,
    accuracy,
    head_alone_accuracy,
    load_encoder,
    mean_pooled,
    training_progress,
)
from _docstrings import Example
from _serving import WAYS, Server, load_merged, time_ways
from _tasks import Task
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model
from torch import Tensor, nn

from peft_kernels import AdapterPool
from peft_kernels.tools.bench.measure import Timing, synchronize

R, ALPHA = 8, 16
ROWS = 8  # of each task, both in a batch to train on and in the one to compare
# Adapters learn at half the rate of the first tutorial, which has twice the rows of a task in a
# batch: at 2e-3 one can break down and map every text to the same vector, for good. Heads learn at
# the rate that they learn at alone.
LEARNING_RATE, HEAD_LEARNING_RATE = 1e-3, 1e-2
MAX_TOKENS = 24  # nine in ten of the texts are shorter
TOLERANCE = 1e-4  # of logits; merging sums in another order, and each order rounds its own way
TIMED_ROWS, TIMED_TOKENS = 32, 48
STAGES = ("guessing", "head alone", "adapter and head")
MB = 1e6


@dataclass(frozen=True)
class Settings:
    """How much of everything."""

    steps: int
    train: int | None  # examples of a task for its head alone
    tests: int | None  # examples of a task to measure accuracy on
    head_steps: int
    counts: tuple[int, ...]  # of different adapters in a timed batch
    rounds: int


FULL = Settings(80, None, None, 300, (1, 2, 4, 8, 16, 32), 5)
QUICK = Settings(4, 64, 32, 20, (1, 8), 2)


@dataclass
class Trained:
    """The encoder in its pool, a head by task, and the loss and duration of each step."""

    encoder: nn.Module
    pool: AdapterPool
    heads: dict[str, nn.Module]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass
class Agreement:
    """A task's rows, from the pool against from the merged model."""

    difference: float  # the largest of the logits
    alike: int  # rows with the same prediction
    rows: int


def main() -> None:
    args = parse_arguments()
    settings = QUICK if args.quick else FULL
    console = Console()
    tasks, batches = _tasks.load(args.seed), Batches(MAX_TOKENS)

    trained = train(console, tasks, batches, settings.steps, args.seed)
    console.print(
        f"{len(tasks)} adapters of rank {R}, batches of {ROWS} rows of each: a step takes "
        f"{1e3 * statistics.median(trained.seconds):.0f} ms"
    )
    accuracies = accuracies_of(trained, tasks, batches, settings, args.seed)
    console.print(accuracy_table(tasks, accuracies))

    folders = save(trained, args.out / "adapters")
    server = Server.load(folders, R)
    memory = server.pool.memory()
    model_bytes = sum(p.nbytes for p in server.encoder.parameters())
    console.print(
        f"the pool's {len(server.pool)} adapters use {memory.used / MB:.1f} of "
        f"{memory.reserved / MB:.1f} MB beside one model of {model_bytes / MB:.0f} MB; "
        f"{len(tasks)} merged models take {len(tasks) * model_bytes / MB:.0f} MB"
    )
    merged = {name: load_merged(folder) for name, folder in folders.items()}
    agreements = compare(server, trained.heads, merged, tasks, batches)
    console.print(agreement_table(agreements))
    console.print("the row without an adapter has the bits of a forward outside of any route")

    timings = time_ways(
        long_batch(tasks[0]), settings.counts, folders, list(merged.values()), R, settings.rounds
    )
    console.print(latency_table(timings))

    chart, numbers = args.out / "chart.png", args.out / "results.json"
    seconds = {way: {n: t.median for n, t in by.items()} for way, by in timings.items()}
    save_many_adapters_chart(chart, WAYS, seconds, accuracies)
    record = {
        "losses": trained.losses,
        "step_seconds": statistics.median(trained.seconds),
        "accuracies": accuracies,
        "agreements": {name: asdict(a) for name, a in agreements.items()},
        "timings": {w: {n: asdict(t) for n, t in by.items()} for w, by in timings.items()},
    }
    numbers.write_text(json.dumps(record, indent=2))
    console.print(f"adapters: {args.out / 'adapters'}\nchart:    {chart}\nnumbers:  {numbers}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/02-many-adapters"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="little of everything")
    return parser.parse_args()


# ---- 1. training -----------------------------------------------------------------------------


def train(console: Console, tasks: list[Task], batches: Batches, steps: int, seed: int) -> Trained:
    """Trains all adapters and their heads: one pool, one optimizer, every batch mixed."""
    torch.manual_seed(seed)
    encoder = load_encoder()
    pool = AdapterPool.attach(encoder, TARGETS, capacity=R * len(tasks))
    heads, groups = {}, []
    for task in tasks:
        pool.create(task.name, R, alpha=ALPHA)
        heads[task.name] = Classifier(encoder, len(task.answers)).head
        groups += [
            {"params": list(pool.parameters(task.name)), "lr": LEARNING_RATE},
            {"params": list(heads[task.name].parameters()), "lr": HEAD_LEARNING_RATE},
        ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    trained = Trained(encoder, pool, heads)

    with training_progress(console) as progress:
        bar = progress.add_task("", total=steps, loss=math.nan)
        for examples in mixed_batches(tasks, steps, seed):
            tokens, labels = batches.collate(examples)
            synchronize()
            start = time.perf_counter()
            with pool.route([task.name for task in tasks for _ in range(ROWS)]):
                vectors = mean_pooled(encoder, **tokens)
            # Each row goes through its own task's head, and counts as much as any other row.
            own = zip(heads.values(), vectors.split(ROWS), labels.split(ROWS), strict=True)
            loss = torch.stack([F.cross_entropy(head(v), y) for head, v, y in own]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trained.losses.append(loss.item())
            trained.seconds.append(time.perf_counter() - start)
            schedule.step()
            progress.update(bar, advance=1, loss=trained.losses[-1])
    return trained


def mixed_batches(tasks: list[Task], steps: int, seed: int) -> Iterator[list[Example]]:
    """ROWS examples of each task after the other, all about as long: little is padding."""
    by_length = [sorted(task.train, key=lambda e: len(e.text)) for task in tasks]
    for step in random.Random(seed).sample(range(steps), steps):
        batch = []
        for examples in by_length:
            first = round((len(examples) - ROWS) * step / max(1, steps - 1))
            batch += examples[first : first + ROWS]
        yield batch


def accuracies_of(
    trained: Trained, tasks: list[Task], batches: Batches, settings: Settings, seed: int
) -> dict[str, dict[str, float]]:
    """By stage and task: guessing, the head on the frozen model, the adapter with its head."""
    features = Features(batches)
    found: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    guess, head_alone, adapted = found.values()
    for task in tasks:
        test = task.test[: settings.tests]
        most_common, _ = Counter(e.label for e in task.train).most_common(1)[0]
        guess[task.name] = sum(e.label == most_common for e in test) / len(test)
        head_alone[task.name] = head_alone_accuracy(
            features,
            task.train[: settings.train],
            test,
            steps=settings.head_steps,
            seed=seed,
            labels=len(task.answers),
            batch_size=64,
        )
        model = Classifier(trained.encoder, len(task.answers))
        model.head = trained.heads[task.name]
        with trained.pool.route([task.name]):  # one entry serves all rows
            adapted[task.name] = accuracy(model, batches, test)
    return found


# ---- 2. files --------------------------------------------------------------------------------


def save(trained: Trained, folder: Path) -> dict[str, Path]:
    """Writes each adapter as PEFT does, and its head, which PEFT has no part in, beside it."""
    folders = {name: folder / name for name in trained.heads}
    for name, head in trained.heads.items():
        trained.pool.save(name, folders[name])
        save_model(head, str(folders[name] / "head.safetensors"))
    return folders


# ---- 3. serving ------------------------------------------------------------------------------


@torch.no_grad()
def compare(
    server: Server,
    heads: Mapping[str, nn.Module],
    merged: Mapping[str, nn.Module],
    tasks: list[Task],
    batches: Batches,
) -> dict[str, Agreement]:
    """Serves one mixed batch, and each task's rows by the model that has its adapter merged."""
    rows = [(task.name, e) for task in tasks for e in task.test[:ROWS]]
    rows.append((None, tasks[0].test[ROWS]))
    random.Random(0).shuffle(rows)
    names = [name for name, _ in rows]
    tokens, _ = batches.collate([example for _, example in rows])
    with server.pool.route(names):
        mixed = mean_pooled(server.encoder, **tokens)

    found = {}
    for name, head in heads.items():
        own = [i for i, asked in enumerate(names) if asked == name]
        ours = head(mixed[own])
        theirs = head(mean_pooled(merged[name], **{key: t[own] for key, t in tokens.items()}))
        found[name] = Agreement(
            difference=(ours - theirs).abs().max().item(),
            alike=(ours.argmax(1) == theirs.argmax(1)).sum().item(),
            rows=len(own),
        )
        if not found[name].difference <= TOLERANCE:
            raise RuntimeError(
                f"logits of {name} differ by {found[name].difference:.1e} from those of the merged "
                f"model, more than {TOLERANCE:.0e}"
            )
    unrouted = mean_pooled(server.encoder, **tokens)
    if not torch.equal(mixed[names.index(None)], unrouted[names.index(None)]):
        raise RuntimeError("the row without an adapter isn't served by the base model, bit by bit")
    return found


# ---- 4. time ---------------------------------------------------------------------------------


def long_batch(task: Task) -> dict[str, Tensor]:
    """TIMED_ROWS rows of TIMED_TOKENS tokens, without padding: several docstrings in each."""
    texts = [" ".join(e.text for e in task.test[i::TIMED_ROWS]) for i in range(TIMED_ROWS)]
    tokens, _ = Batches(TIMED_TOKENS).collate([Example(text, 0, "") for text in texts])
    assert tokens["attention_mask"].all()
    return tokens


# ---- report ----------------------------------------------------------------------------------


def accuracy_table(tasks: list[Task], accuracies: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Accuracy on modules that no task was trained on", title_justify="left")
    for column in ("task", "question"):
        table.add_column(column)
    for column in ("answers", *accuracies):
        table.add_column(column, justify="right")
    for task in tasks:
        shares = [f"{100 * by_task[task.name]:.1f} %" for by_task in accuracies.values()]
        table.add_row(task.name, task.question, str(len(task.answers)), *shares)
    return table


def agreement_table(agreements: dict[str, Agreement]) -> Table:
    table = Table(title="Rows of one mixed batch", title_justify="left")
    table.add_column("task")
    for column in ("largest difference of logits", "same prediction"):
        table.add_column(column, justify="right")
    for name, agreement in agreements.items():
        alike = f"{agreement.alike} of {agreement.rows}"
        table.add_row(name, f"{agreement.difference:.1e}", alike)
    return table


def latency_table(timings: dict[str, dict[int, Timing]]) -> Table:
    table = Table(
        title=f"{TIMED_ROWS} rows of {TIMED_TOKENS} tokens: ms, and ratio to the base model",
        title_justify="left",
        caption=f"base model without adapters: {1e3 * timings['base'][0].median:.0f} ms",
        caption_justify="left",
    )
    ways = [way for way in WAYS if way in timings and way != "base"]
    table.add_column("adapters", justify="right")
    for way in ways:
        table.add_column(WAYS[way], justify="right")
    for count in timings["pool"]:
        row = [timings[way][count] for way in ways]
        table.add_row(str(count), *(f"{1e3 * t.median:.0f}  ({t.ratio:.2f})" for t in row))
    return table


if __name__ == "__main__":
    main()
