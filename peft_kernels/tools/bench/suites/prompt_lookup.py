"""What prompt_lookup is measured on: prompt tuning's inputs, and its rivals.

Every ratio is to what PEFT does for the same results: it looks the prompt's tokens up for each row
of the batch, converts them, and concatenates embeddings, masks and labels, four tensors made and
copied. With a backward, the prompt is what is trained, and the embeddings are frozen.

The last table is a whole training step of GPT-2's blocks, whose prompt runs as a prefix, once and
not for each row: "peft_kernels" is that, "in the rows" the prompt looked up for each row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops.prompt_lookup import IGNORED, example_inputs, prompt_lookup
from peft_kernels.tools.bench import gpt2_step
from peft_kernels.tools.bench.case import BaseCase
from peft_kernels.tools.bench.implementation import Forward, Implementation

SHAPE = "batch x text x hidden, prompt"
BARE = "composition in PEFT"
FUSED = "peft_kernels"
RIVALS = ("reference", "expand + cat", "in the rows", "peft")
DROPOUT_P = 0.0  # there is none


@dataclass(frozen=True)
class Case(BaseCase):
    """A float32 prompt of ``length`` before embeddings [batch, seq, hidden], masks and labels.

    With ``layers``: a training step of as many blocks of GPT-2 with it.
    """

    batch: int
    seq: int
    hidden: int
    length: int
    dtype: torch.dtype = torch.float32
    backward: bool = False
    layers: int = 0
    title: str = ""

    @property
    def shape(self) -> str:
        layers = f" x {self.layers} layers" if self.layers else ""
        return f"{self.batch}x{self.seq}x{self.hidden}{layers}, {self.length}"

    @property
    def target(self) -> float | None:
        """The highest ratio allowed, or None where none is set."""
        return TARGETS.get(self)


# One short text is a matter of microseconds around the copy, and has no target.
_LIMITS = {
    (1, 32, 768, 20): None,
    (8, 128, 768, 20): 1.0,
    (8, 256, 2048, 100): 1.0,
    (16, 128, 1024, 100): 1.0,
}
_STEPS = {20: None, 100: 1 / 1.5, 200: None}  # by the prompt's length
TARGETS: dict[Case, float | None] = {
    **{
        Case(*shape, dtype, backward): limit
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
        for shape, limit in _LIMITS.items()
    },
    **{
        Case(16, 128, 768, length, backward=True, layers=4, title=", a training step"): limit
        for length, limit in _STEPS.items()
    },
}
CASES = tuple(TARGETS)


def cases(
    shapes: Iterable[tuple[int, int, int]] | None, dtype: torch.dtype, backward: bool
) -> list[Case]:
    """A batch of 8 for shapes text x hidden x prompt; or the suite's own cases."""
    if shapes is not None:
        return [Case(8, *shape, dtype=dtype, backward=backward) for shape in shapes]
    return [c for c in CASES if c.dtype is dtype and c.backward is backward]


# ---- implementations -------------------------------------------------------------------------


def implementations(
    case: Case,
    *,
    device: torch.device | str = "cpu",
    dropout_p: float = 0.0,
    compiled: bool = False,
) -> dict[str, Implementation]:
    """PEFT's way, ours and the rivals, on the same values; x is the prompt, and no dropout."""
    if case.layers:
        return _step(case, device)
    inputs = _inputs(case, device)
    tokens = torch.arange(case.length, device=device)

    def looked_up(prompt: Tensor) -> Tensor:
        return F.embedding(tokens.unsqueeze(0).expand(case.batch, -1), prompt).to(case.dtype)

    def expanded(prompt: Tensor) -> Tensor:
        return prompt.to(case.dtype).expand(case.batch, -1, -1)

    forwards: dict[str, Forward] = {
        BARE: lambda prompt: _composition(inputs, looked_up(prompt)),
        FUSED: lambda prompt: _ours(inputs, prompt, "auto"),
        "reference": lambda prompt: _ours(inputs, prompt, "reference"),
        "expand + cat": lambda prompt: _composition(inputs, expanded(prompt)),
    }
    if compiled:
        forwards["torch.compile"] = cast(Forward, torch.compile(forwards["expand + cat"]))
    frozen = tuple(tensor for name, tensor in inputs.items() if name != "prompts")
    prompt = inputs["prompts"][0]
    return {
        name: Implementation(forward, prompt, (), (*frozen, tokens))
        for name, forward in forwards.items()
    }


def exact(case: Case, *, device: torch.device | str = "cpu") -> Implementation:
    """The reference, or for a step the composition by hand, on the same values in float64."""
    if case.layers:
        base, batch, prompt = _step_inputs(case, device)
        return gpt2_step.by_hand(base.double(), batch, prompt.double())
    inputs = _inputs(case, device)
    for name in ("embeddings", "prompts"):
        inputs[name] = inputs[name].double()
    prompt = inputs["prompts"][0]
    return Implementation(lambda prompt: _ours(inputs, prompt, "reference"), prompt, ())


def _inputs(case: Case, device: torch.device | str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return example_inputs(
        case.batch, case.seq, case.hidden, case.length,
        dtype=case.dtype, prompt_dtype=torch.float32, device=device,
    )  # fmt: skip


def _step_inputs(case: Case, device: torch.device | str) -> tuple[Any, gpt2_step.Batch, Tensor]:
    torch.manual_seed(0)
    base = gpt2_step.gpt2(case.hidden, case.layers, case.length + case.seq).to(device)
    batch = gpt2_step.a_batch(case.batch, case.seq, device)
    return base, batch, torch.randn(case.length, case.hidden, device=device)


def _step(case: Case, device: torch.device | str) -> dict[str, Implementation]:
    base, batch, prompt = _step_inputs(case, device)
    found = {
        BARE: gpt2_step.by_hand(base, batch, prompt),
        FUSED: gpt2_step.ours(base, batch, prompt, as_prefix=True),
        "in the rows": gpt2_step.ours(base, batch, prompt, as_prefix=False),
    }
    if importlib.util.find_spec("peft"):
        found["peft"] = gpt2_step.theirs(base, batch, prompt)
    return found


def _ours(inputs: dict[str, Tensor], prompt: Tensor, backend: str) -> Tensor:
    with _library.backend(backend):
        return prompt_lookup(**(inputs | {"prompts": prompt})).embeddings


def _composition(inputs: dict[str, Tensor], soft: Tensor) -> Tensor:
    """The embeddings, as ours; the mask, the position ids and the labels are made along."""
    mask, labels = inputs["attention_mask"], inputs["labels"]
    mask = torch.cat((mask.new_ones(soft.shape[:2]), mask), 1)
    (mask.cumsum(1) - 1).clamp_min_(0)
    torch.cat((labels.new_full(soft.shape[:2], IGNORED), labels), 1)
    return torch.cat((soft, inputs["embeddings"]), 1)
