"""AdapterFusion in two stages: three adapters learn a task each, then a fourth task combines them.

Every task is a question about docstrings of the standard library. In the first stage, three
bottleneck adapters learn one task each, alone, on the frozen model. In the second, they are frozen
too, and an AdapterFusion at each layer learns from the few examples of a fourth task which of them
to listen to at each token. It is compared with a head alone and with a new adapter; learning rates
are chosen on modules that are neither trained on nor tested on. Nothing is downloaded.

    python python/tutorials/03-adapter-fusion.py            under three minutes on two cores
    python python/tutorials/03-adapter-fusion.py --quick    the same path in half a minute

It fails if the fusion's plans, "absorbed" and "direct", disagree beyond the tolerance below.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import _docstrings
import _tasks
import torch
import torch.nn.functional as F
from _chart import save_fusion_chart
from _classifier import (
    DEVICE,
    Batches,
    Classifier,
    Features,
    accuracy,
    head_alone_accuracy,
    load_encoder,
    training_progress,
)
from _docstrings import Example
from _tasks import Task
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import peft_kernels
from peft_kernels.integrations.transformers import (
    adapters_of,
    fuse_adapters,
    insert_adapters,
)
from peft_kernels.nn import AdapterFusion
from peft_kernels.tools.bench.measure import Budget, Timing, interleaved

SOURCES, TARGET = ("method", "verb", "returns"), "special"
REDUCTION = 16  # of 384 features, to 24
SOURCE_RATE, HEAD_RATE = 1e-3, 1e-2
MAX_TOKENS = 24  # nine in ten of the texts are shorter
VALIDATION_SHARE = 0.25  # of the texts to train on
TOLERANCE = 1e-4  # of logits; the plans sum in another order, and each order rounds its own way


@dataclass(frozen=True)
class Settings:
    """How much of everything."""

    source_steps: int
    target_steps: int
    head_steps: int
    rates: tuple[float, ...]  # to choose from, for the new adapter and for the fusion
    examples: int | None  # of a task, of each kind
    rounds: int  # of timing


FULL = Settings(80, 60, 300, (1e-3, 3e-3), None, 7)
QUICK = Settings(3, 3, 20, (1e-3, 3e-3), 32, 1)


@dataclass(frozen=True)
class Split:
    """A task's examples, no module in two of the three lists."""

    task: Task
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    @property
    def labels(self) -> int:
        return len(self.task.answers)


@dataclass(frozen=True)
class Outcome:
    """What one way to learn a task has come to; ``rate`` is None where the head alone trains."""

    parameters: int
    rate: float | None
    validation: float
    test: float


@dataclass
class Candidate:
    """A trained model, and what tells whether to keep it."""

    model: Classifier
    rate: float
    validation: float


def main() -> None:
    args = parse_arguments()
    settings = QUICK if args.quick else FULL
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    splits, batches = load(args.seed, settings.examples), Batches(MAX_TOKENS)
    sources, target = [splits[name] for name in SOURCES], splits[TARGET]
    print_data(console, target)

    models = train_sources(console, sources, batches, settings, args.seed)
    source_accuracies = {
        s.task.name: accuracy(models[s.task.name], batches, s.test) for s in sources
    }
    console.print(source_table(sources, source_accuracies))

    trained = [adapters_of(model.encoder) for model in models.values()]
    outcomes = {"head alone": head_alone(target, batches, settings, args.seed)}
    ways: dict[str, Callable[[nn.Module], object]] = {
        "new adapter": lambda encoder: None,
        "fusion of three": lambda encoder: fuse_adapters(encoder, trained),
    }
    best: dict[str, Classifier] = {}
    for way, prepare in ways.items():
        chosen = best_of_rates(console, way, prepare, target, batches, settings, args.seed)
        best[way] = chosen.model
        outcomes[way] = Outcome(
            trainable(chosen.model),
            chosen.rate,
            chosen.validation,
            accuracy(chosen.model, batches, target.test),
        )
    console.print(outcome_table(target, outcomes))

    fused = best["fusion of three"]
    difference = compare_plans(fused, batches, target.test)
    console.print(f'plans "absorbed" and "direct": logits differ by at most {difference:.1e}')
    weights = mean_weights(fused, batches, target.test)
    console.print(weight_table(weights))

    tokens, labels = next(batches.of_training(target.train, 1, args.seed))
    timings = time_steps(best, tokens, labels, settings.rounds)
    console.print(time_table(timings, fused, tokens))

    chart, numbers = args.out / "fusion-weights.png", args.out / "results.json"
    save_fusion_chart(chart, weights)
    record = {
        "sources": source_accuracies,
        "outcomes": {way: asdict(outcome) for way, outcome in outcomes.items()},
        "plan_difference": difference,
        "weights": weights,
        "timings": {way: asdict(timing) for way, timing in timings.items()},
    }
    numbers.write_text(json.dumps(record, indent=2))
    console.print(f"chart:   {chart}\nnumbers: {numbers}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/03-adapter-fusion"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="little of everything")
    return parser.parse_args()


# ---- data ------------------------------------------------------------------------------------


def load(seed: int, count: int | None) -> dict[str, Split]:
    """The tasks by name, with at most ``count`` examples in a list."""
    tasks = [task for task in _tasks.load(seed) if task.name in (*SOURCES, TARGET)]
    modules = {e.text: e.module for task in tasks for e in task.train}
    held_out = _docstrings.held_out_modules(list(modules.values()), VALIDATION_SHARE)
    return {
        task.name: Split(
            task,
            [e for e in task.train if e.module not in held_out][:count],
            [e for e in task.train if e.module in held_out][:count],
            task.test[:count],
        )
        for task in tasks
    }


def guess(split: Split) -> float:
    """The accuracy on the test of always giving the answer that is most common in training."""
    most_common, _ = Counter(e.label for e in split.train).most_common(1)[0]
    return sum(e.label == most_common for e in split.test) / len(split.test)


# ---- training --------------------------------------------------------------------------------


def adapted_classifier(labels: int, seed: int) -> Classifier:
    """The frozen encoder with a new adapter at each layer, and a new head."""
    torch.manual_seed(seed)
    encoder = load_encoder()
    insert_adapters(encoder, "pfeiffer", reduction=REDUCTION)
    return Classifier(encoder, labels)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def loss_of(model: Classifier, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy; a fusion's value projections are also kept near the identity."""
    loss = F.cross_entropy(model(**tokens), labels)
    for fusion in fusions_of(model):
        loss = loss + fusion.regularization()
    return loss


def train(
    model: Classifier, data: Iterator, steps: int, rate: float, on_step: Callable[[float], object]
) -> None:
    """Trains what isn't frozen in the encoder, at ``rate``, and the head."""
    adapters = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [
        {"params": adapters, "lr": rate},
        {"params": list(model.head.parameters()), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for tokens, labels in data:
        loss = loss_of(model, tokens, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(loss.item())


def train_sources(
    console: Console, sources: Sequence[Split], batches: Batches, settings: Settings, seed: int
) -> dict[str, Classifier]:
    """Stage 1: an adapter and a head for each task, by name, none of which knows of the others."""
    models = {}
    for split in sources:
        model = models[split.task.name] = adapted_classifier(split.labels, seed)
        data = batches.of_training(split.train, settings.source_steps, seed)
        with counted(console, settings.source_steps) as on_step:
            train(model, data, settings.source_steps, SOURCE_RATE, on_step)
    return models


def best_of_rates(
    console: Console,
    way: str,
    prepare: Callable[[nn.Module], object],
    split: Split,
    batches: Batches,
    settings: Settings,
    seed: int,
) -> Candidate:
    """Stage 2, once at each rate: the model that does best on the validation's modules.

    ``prepare`` turns an encoder with new adapters into what is to be trained.
    """
    candidates = []
    for rate in settings.rates:
        model = adapted_classifier(split.labels, seed)
        prepare(model.encoder)
        data = batches.of_training(split.train, settings.target_steps, seed)
        with counted(console, settings.target_steps) as on_step:
            train(model, data, settings.target_steps, rate, on_step)
        found = accuracy(model, batches, split.validation)
        console.print(f"{way}, learning rate {rate}: {100 * found:.1f} % of the validation")
        candidates.append(Candidate(model, rate, found))
    return max(candidates, key=lambda candidate: candidate.validation)


@contextlib.contextmanager
def counted(console: Console, steps: int) -> Iterator[Callable[[float], None]]:
    """A progress bar; what it gives is called with the loss of each step."""
    with training_progress(console) as progress:
        bar = progress.add_task("", total=steps, loss=math.nan)
        yield lambda loss: progress.update(bar, advance=1, loss=loss)


def head_alone(split: Split, batches: Batches, settings: Settings, seed: int) -> Outcome:
    """A head on the frozen model: the gain that is neither the adapter's nor the fusion's."""
    features = Features(batches)
    validation, test = (
        head_alone_accuracy(
            features,
            split.train,
            examples,
            steps=settings.head_steps,
            seed=seed,
            labels=split.labels,
            batch_size=64,
        )
        for examples in (split.validation, split.test)
    )
    head = Classifier(nn.Identity(), split.labels).head
    return Outcome(trainable(head), None, validation, test)


# ---- the fusion ------------------------------------------------------------------------------


def fusions_of(model: Classifier) -> list[AdapterFusion]:
    """The fusions, first layer first; none where adapters aren't fused."""
    return [m for m in adapters_of(model.encoder).values() if isinstance(m, AdapterFusion)]


@contextlib.contextmanager
def plan_set(model: Classifier, plan: str) -> Iterator[None]:
    """Within, the fusions follow this plan, whatever would cost the least."""
    for fusion in fusions_of(model):
        fusion.plan = lambda rows: plan
    try:
        yield
    finally:
        for fusion in fusions_of(model):
            del fusion.plan


@torch.no_grad()
def compare_plans(model: Classifier, batches: Batches, examples: list[Example]) -> float:
    """The largest difference of the logits between both plans.

    Raises:
        RuntimeError: a fusion doesn't take "absorbed" by itself, or the difference is too large.
    """
    model.eval()
    taken = {fusion.plan(rows=1) for fusion in fusions_of(model)}
    if taken != {"absorbed"}:
        raise RuntimeError(f"where nothing trains, fusions must be absorbed; got {sorted(taken)}")
    difference = 0.0
    for tokens, _ in batches.of_evaluation(examples):
        absorbed = model(**tokens)
        with plan_set(model, "direct"):
            direct = model(**tokens)
        difference = max(difference, (absorbed - direct).abs().max().item())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f'logits of the plans "absorbed" and "direct" differ by {difference:.1e}, more than '
            f"{TOLERANCE:.0e}"
        )
    return difference


@torch.no_grad()
def mean_weights(
    model: Classifier, batches: Batches, examples: list[Example]
) -> dict[int, dict[str, float]]:
    """By layer, from 1, and source: the mean of its attention over all tokens but padding."""
    model.eval()
    fusions = fusions_of(model)
    total = torch.zeros(len(fusions), len(SOURCES), device=DEVICE)
    count = 0
    for tokens, _ in batches.of_evaluation(examples):
        model(**tokens)
        mask = tokens["attention_mask"].bool()
        count += int(mask.sum())
        for layer, fusion in enumerate(fusions):
            assert fusion.attention is not None
            total[layer] += fusion.attention[mask].sum(0)
    rows = (total / count).tolist()
    return {layer: dict(zip(SOURCES, row, strict=True)) for layer, row in enumerate(rows, 1)}


# ---- time ------------------------------------------------------------------------------------


def time_steps(
    models: dict[str, Classifier], tokens: dict[str, Tensor], labels: Tensor, rounds: int
) -> dict[str, Timing]:
    """A forward and backward of the same batch, each way; ratios are to the new adapter."""

    def step(model: Classifier) -> None:
        loss_of(model, tokens, labels).backward()
        model.zero_grad()

    def direct() -> None:
        with plan_set(models["fusion of three"], "direct"):
            step(models["fusion of three"])

    def theirs() -> None:
        loss = F.cross_entropy(their_model(**tokens), labels)
        (loss + their_model.encoder.get_fusion_regularization_loss()).backward()
        their_model.zero_grad()

    calls: dict[str, Callable[[], object]] = {
        "new adapter": lambda: step(models["new adapter"]),
        "fusion of three": lambda: step(models["fusion of three"]),
        'fusion of three, plan "direct"': direct,
    }
    if importlib.util.find_spec("adapters"):
        their_model = fused_by_adapters(models["new adapter"].head.out_features)
        calls["fusion of three, adapters"] = theirs
    for model in models.values():
        model.train()
    return interleaved(calls, base="new adapter", budget=Budget(rounds=rounds, seconds=0))


def fused_by_adapters(labels: int) -> Classifier:
    """The same architecture from the library `adapters`, its values drawn at random."""
    import adapters
    from adapters.composition import Fuse

    # It warns of adapters that aren't active, which they are once the fusion is set to train.
    logging.getLogger("adapters").setLevel(logging.ERROR)
    encoder = load_encoder()
    adapters.init(encoder)
    for name in SOURCES:
        encoder.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=REDUCTION))
    encoder.add_adapter_fusion(
        list(SOURCES), adapters.AdapterFusionConfig.load("dynamic", dropout_prob=0.0)
    )
    encoder.train_adapter_fusion(Fuse(*SOURCES))
    return Classifier(encoder.to(DEVICE), labels).train()


# ---- report ----------------------------------------------------------------------------------


def print_data(console: Console, target: Split) -> None:
    parts = {"train": target.train, "choose a rate": target.validation, "test": target.test}
    counted = ", ".join(
        f"{len(part)} of {len({e.module for e in part})} modules to {what}"
        for what, part in parts.items()
    )
    backend = peft_kernels.backend_of("adapter_fusion", DEVICE, torch.float32)
    console.print(
        f'the fourth task, "{target.task.question}": {counted}; the fusions run on the backend '
        f"'{backend}'"
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def source_table(sources: Sequence[Split], accuracies: dict[str, float]) -> Table:
    table = Table(title="Stage 1: accuracy on the test's modules", title_justify="left")
    for column in ("task", "question"):
        table.add_column(column)
    for column in ("examples", "guessing", "adapter"):
        table.add_column(column, justify="right")
    for split in sources:
        task = split.task
        shares = (percent(guess(split)), percent(accuracies[task.name]))
        table.add_row(task.name, task.question, str(len(split.train)), *shares)
    return table


def outcome_table(target: Split, outcomes: dict[str, Outcome]) -> Table:
    table = Table(
        title=f"Stage 2: accuracy on the task {TARGET}, from {len(target.train)} examples",
        title_justify="left",
    )
    table.add_column("what trains")
    for column in ("parameters", "rate", "validation", "test"):
        table.add_column(column, justify="right")
    table.add_row("nothing, a guess", "0", "-", "-", percent(guess(target)))
    for way, outcome in outcomes.items():
        rate = "-" if outcome.rate is None else str(outcome.rate)
        shares = (percent(outcome.validation), percent(outcome.test))
        table.add_row(way, f"{outcome.parameters:,}", rate, *shares)
    error = math.sqrt(0.25 / len(target.test))
    table.caption = f"standard error of a test of {len(target.test)}: up to {percent(error)}"
    return table


def weight_table(weights: dict[int, dict[str, float]]) -> Table:
    table = Table(title="Mean weight of each adapter in the fusion", title_justify="left")
    table.add_column("layer", justify="right")
    for name in SOURCES:
        table.add_column(name, justify="right")
    for layer, row in weights.items():
        table.add_row(str(layer), *(f"{row[name]:.2f}" for name in SOURCES))
    means = (statistics.mean(row[name] for row in weights.values()) for name in SOURCES)
    table.add_section()
    table.add_row("mean", *(f"{mean:.2f}" for mean in means))
    return table


def time_table(timings: dict[str, Timing], fused: Classifier, tokens: dict[str, Tensor]) -> Table:
    rows, length = tokens["input_ids"].shape
    plan = fusions_of(fused)[0].plan(rows * length)
    table = Table(
        title=f"Forward and backward of {rows} texts of {length} tokens", title_justify="left"
    )
    table.add_column("what trains")
    for column in ("median", "ratio"):
        table.add_column(column, justify="right")
    for way, timing in timings.items():
        table.add_row(way, f"{1e3 * timing.median:.0f} ms", f"{timing.ratio:.2f}")
    table.caption = f'the fusion\'s own plan here: "{plan}"'
    return table


if __name__ == "__main__":
    main()
