"""Prefix-tuning, P-tuning and prompt tuning on one task: how many soft tokens does it take?

The task is a question about docstrings of the standard library that the frozen encoder's vectors
answer badly: does the text say "Returns ..." or "Return ..."? Each method puts L trained tokens
beside the text and trains a linear head on the mean of the text's token vectors:

    prompt tuning   L soft tokens behind [CLS]
    P-tuning        "[P P] {x} [P P] [MASK]", the P's made by an LSTM or an MLP
    prefix-tuning   L keys and values in every attention layer, trained themselves or made by an MLP

All share the text, the head and the optimizer, so what differs is where the soft tokens are and
what makes them. The mean leaves the soft tokens out, and has P-tuning's mask in: this encoder was
trained for such means, and its wheel has no head that says words at a mask. Learning rates are
chosen by the loss on modules that are neither trained on nor tested on. Nothing is downloaded.

    python python/tutorials/04-soft-prompts.py            about four minutes on two cores
    python python/tutorials/04-soft-prompts.py --quick    the same path in under a minute

An encoder of soft tokens is only there to train: it fails if a model that has only its output
answers otherwise than the one trained, beyond the tolerance below.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import _docstrings
import _tasks
import torch
import torch.nn.functional as F
from _chart import save_soft_prompts_chart
from _classifier import (
    DEVICE,
    Batches,
    Classifier,
    Features,
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
from peft_kernels.integrations.transformers import add_prefix, add_prompt, prefix_for, remove_prompt
from peft_kernels.nn import PrefixTuning, PromptTuning, PTuning, Template, vocabulary_prompt
from peft_kernels.tools.bench.measure import synchronize

TASK, WIDTH = "mood", 384
HEAD_RATE = 1e-2
MAX_TOKENS = 24  # of a text; nine in ten of them are shorter
VALIDATION_SHARE = 0.25  # of the texts to train on
WORDS = 1996  # the vocabulary's first ids are special tokens, letters and signs
TOLERANCE = 1e-4  # of logits; a batch computes them in another order than another one


@dataclass(frozen=True)
class Settings:
    """How much of everything."""

    steps: int
    head_steps: int
    lengths: tuple[int, ...]  # L
    examples: int | None  # of each kind


FULL = Settings(40, 300, (1, 4, 16), None)
QUICK = Settings(6, 20, (1, 4), 48)


@dataclass(frozen=True)
class Method:
    """A way to make soft tokens: ``build(length, labels, batches)`` gives a model and them."""

    build: Callable[[int, int, Batches], tuple[Classifier, nn.Module]]
    rates: tuple[float, ...]  # to choose from


@dataclass(frozen=True)
class Data:
    """The task's examples, no module in two of the three lists."""

    task: Task
    train: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass
class Outcome:
    """What a method has come to with L soft tokens."""

    method: str
    length: int
    rate: float
    validation_loss: float
    test: float
    trained: int  # parameters of the soft tokens and what makes them; the head's aren't counted
    kept: int  # how many of these are left where what makes them is dropped
    step_seconds: float  # the median
    losses: list[float]


@dataclass
class Candidate:
    """A trained model, and what tells whether to keep it."""

    model: Classifier
    prompt: nn.Module
    rate: float
    validation_loss: float
    losses: list[float]
    seconds: list[float]


def main() -> None:
    args = parse_arguments()
    settings = QUICK if args.quick else FULL
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    data, batches = load(args.seed, settings.examples), Batches(MAX_TOKENS)
    print_data(console, data)
    head = head_alone(data, batches, settings, args.seed)

    runs = [(name, length) for name in METHODS for length in settings.lengths]
    steps = settings.steps * sum(len(METHODS[name].rates) for name, _ in runs)
    outcomes, differences = [], []
    with counted(console, steps) as on_step:
        for name, length in runs:
            best = best_of_rates(METHODS[name], length, data, batches, settings, args.seed, on_step)
            outcome, difference = finished(name, length, best, batches, data.test)
            outcomes.append(outcome)
            differences.append(difference)
    console.print(outcome_table(data, head, outcomes))
    console.print(
        "without the LSTM and the MLPs, logits on the test differ by at most "
        f"{max(differences):.1e}"
    )

    chart, numbers = args.out / "chart.png", args.out / "results.json"
    lines = {name: [o for o in outcomes if o.method == name] for name in METHODS}
    save_soft_prompts_chart(chart, head, lines)
    record = {
        "question": data.task.question,
        "head alone": head,
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "difference": max(differences),
    }
    numbers.write_text(json.dumps(record, indent=2))
    console.print(f"chart:   {chart}\nnumbers: {numbers}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/04-soft-prompts"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="little of everything")
    return parser.parse_args()


# ---- data ------------------------------------------------------------------------------------


def load(seed: int, count: int | None) -> Data:
    """The task, with at most ``count`` examples in a list."""
    task = next(task for task in _tasks.load(seed) if task.name == TASK)
    held_out = _docstrings.held_out_modules([e.module for e in task.train], VALIDATION_SHARE)
    return Data(
        task,
        [e for e in task.train if e.module not in held_out][:count],
        [e for e in task.train if e.module in held_out][:count],
        task.test[:count],
    )


# ---- the methods -----------------------------------------------------------------------------


class TemplateClassifier(Classifier):
    """A classifier whose texts are laid out by a template."""

    def __init__(self, encoder: nn.Module, labels: int, template: Template) -> None:
        super().__init__(encoder, labels)
        self.template = template

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # Without [CLS] and [SEP], which the template puts around all of a row.
        texts = [
            ids[: count - 1][1:]
            for ids, count in zip(input_ids, attention_mask.sum(1).tolist(), strict=True)
        ]
        batch = self.template.encode(texts).to(input_ids.device)
        hidden = self.encoder(template=batch).last_hidden_state  # the slots' too
        slots = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=DEVICE)
        hidden = hidden[~slots.scatter(1, batch.positions, True)].view(*batch.input_ids.shape, -1)
        mask = batch.attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def prompt_tuning(length: int, labels: int, batches: Batches) -> tuple[Classifier, nn.Module]:
    """Lester et al. 2021: soft tokens behind [CLS] that start as words."""
    model = Classifier(load_encoder(), labels)
    embedding = model.encoder.get_input_embeddings()
    words = vocabulary_prompt(embedding, length, tokens=range(WORDS, embedding.num_embeddings))
    prompt = PromptTuning(length, WIDTH, init=words, position="after_bos", device=DEVICE)
    add_prompt(model.encoder, prompt)
    return model, prompt


def p_tuning(
    length: int, labels: int, batches: Batches, encoder: str
) -> tuple[Classifier, nn.Module]:
    """Liu et al. 2021: soft slots in front of the text, of more than one as many behind."""
    behind = f"[P*{length // 2}]" if length > 1 else ""
    text = f"[P*{length - length // 2}] {{x}} {behind} [MASK]"
    template = Template.parse(text, batches.tokenizer)
    model = TemplateClassifier(load_encoder(), labels, template)
    prompt = PTuning(template, WIDTH, encoder=encoder, device=DEVICE)
    add_prompt(model.encoder, prompt)
    return model, prompt


def prefix_tuning(
    length: int, labels: int, batches: Batches, reparametrization: str
) -> tuple[Classifier, nn.Module]:
    """Li and Liang 2021: keys and values of their own in every layer."""
    model = Classifier(load_encoder(), labels)
    prefix = prefix_for(model.encoder, length, reparametrization=reparametrization)
    add_prefix(model.encoder, prefix)
    return model, prefix


METHODS = {
    "prompt tuning": Method(prompt_tuning, (3e-2, 1e-1)),
    "P-tuning, LSTM": Method(partial(p_tuning, encoder="lstm"), (1e-3, 3e-3)),
    "P-tuning, MLP": Method(partial(p_tuning, encoder="mlp"), (1e-3, 3e-3)),
    "prefix-tuning": Method(partial(prefix_tuning, reparametrization="flat"), (3e-2, 1e-1)),
    "prefix-tuning, MLP": Method(partial(prefix_tuning, reparametrization="mlp"), (3e-4, 1e-3)),
}


@torch.no_grad()
def drop_encoder(model: Classifier, prompt: nn.Module) -> nn.Module:
    """Puts what an encoder gives in its place: the soft tokens that the model then has."""
    if isinstance(prompt, PrefixTuning):
        return prompt.eject()
    if isinstance(prompt, PTuning):
        remove_prompt(model.encoder)
        made = prompt.prompts()[0]
        prompt = PTuning(model.template, WIDTH, encoder=None, init=made, device=DEVICE)
        add_prompt(model.encoder, prompt)
    return prompt


# ---- training --------------------------------------------------------------------------------


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def train(
    model: Classifier,
    prompt: nn.Module,
    batches: Iterator,
    steps: int,
    rate: float,
    on_step: Callable[[float], object],
) -> tuple[list[float], list[float]]:
    """Trains soft tokens, at ``rate``, and the head: each step's loss and its seconds."""
    groups = [
        {"params": list(prompt.parameters()), "lr": rate},
        {"params": list(model.head.parameters()), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses, seconds = [], []
    model.train()
    for tokens, labels in batches:
        synchronize()
        start = time.perf_counter()
        loss = F.cross_entropy(model(**tokens), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        schedule.step()
        on_step(losses[-1])
    return losses, seconds


def best_of_rates(
    method: Method,
    length: int,
    data: Data,
    batches: Batches,
    settings: Settings,
    seed: int,
    on_step: Callable[[float], object],
) -> Candidate:
    """Trains at each rate: the model with the least loss on the validation's modules."""
    candidates = []
    for rate in method.rates:
        torch.manual_seed(seed)
        model, prompt = method.build(length, len(data.task.answers), batches)
        rows = batches.of_training(data.train, settings.steps, seed)
        records = train(model, prompt, rows, settings.steps, rate, on_step)
        logits, labels = predictions(model, batches, data.validation)
        loss = F.cross_entropy(logits, labels).item()
        candidates.append(Candidate(model, prompt, rate, loss, *records))
    return min(candidates, key=lambda candidate: candidate.validation_loss)


@torch.no_grad()
def predictions(
    model: Classifier, batches: Batches, examples: list[Example]
) -> tuple[Tensor, Tensor]:
    """The logits and the labels, in the evaluation's order."""
    model.eval()
    found = [(model(**tokens), labels) for tokens, labels in batches.of_evaluation(examples)]
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(labels)


def finished(
    name: str, length: int, best: Candidate, batches: Batches, examples: list[Example]
) -> tuple[Outcome, float]:
    """Tests the model, with its encoder and without: the outcome, and how far logits differ.

    Raises:
        RuntimeError: they differ by more than TOLERANCE.
    """
    logits, labels = predictions(best.model, batches, examples)
    trained = parameters(best.prompt)
    kept = parameters(drop_encoder(best.model, best.prompt))
    without, _ = predictions(best.model, batches, examples)
    difference = (logits - without).abs().max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{name}, {length} tokens: without what makes them logits differ by {difference:.1e}, "
            f"more than {TOLERANCE:.0e}"
        )
    outcome = Outcome(
        name,
        length,
        best.rate,
        best.validation_loss,
        (logits.argmax(1) == labels).float().mean().item(),
        trained,
        kept,
        statistics.median(best.seconds),
        best.losses,
    )
    return outcome, difference


@contextlib.contextmanager
def counted(console: Console, steps: int) -> Iterator[Callable[[float], None]]:
    """A progress bar; what it gives is called with the loss of each step."""
    with training_progress(console) as progress:
        bar = progress.add_task("", total=steps, loss=math.nan)
        yield lambda loss: progress.update(bar, advance=1, loss=loss)


def head_alone(data: Data, batches: Batches, settings: Settings, seed: int) -> float:
    """What the head learns from vectors without soft tokens."""
    return head_alone_accuracy(
        Features(batches),
        data.train,
        data.test,
        steps=settings.head_steps,
        seed=seed,
        labels=len(data.task.answers),
        batch_size=64,
    )


# ---- report ----------------------------------------------------------------------------------


def print_data(console: Console, data: Data) -> None:
    parts = {"train": data.train, "choose a rate": data.validation, "test": data.test}
    counts = ", ".join(
        f"{len(part)} of {len({e.module for e in part})} modules to {what}"
        for what, part in parts.items()
    )
    backends = ", ".join(
        f"{op} on '{peft_kernels.backend_of(op, DEVICE, torch.float32)}'"
        for op in ("prompt_lookup", "prefix_attention")
    )
    console.print(f"{data.task.question}\n{counts}\n{backends}")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def outcome_table(data: Data, head: float, outcomes: list[Outcome]) -> Table:
    table = Table(title="Accuracy on the test's modules", title_justify="left")
    table.add_column("what trains, beside the head")
    for column in ("tokens", "trained", "kept", "rate", "step", "test"):
        table.add_column(column, justify="right")
    table.add_row("nothing", "0", "0", "0", "-", "-", percent(head))
    for outcome in outcomes:
        if outcome.length == outcomes[0].length:
            table.add_section()
        table.add_row(
            outcome.method,
            str(outcome.length),
            f"{outcome.trained:,}",
            f"{outcome.kept:,}",
            str(outcome.rate),
            f"{1e3 * outcome.step_seconds:.0f} ms",
            percent(outcome.test),
        )
    count = len(data.test)
    table.caption = (
        f"standard error of a test of {count}: up to {percent(math.sqrt(0.25 / count))}, at 95 % "
        f"accuracy {percent(math.sqrt(0.0475 / count))}"
    )
    return table


if __name__ == "__main__":
    main()
