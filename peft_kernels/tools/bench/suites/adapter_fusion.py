"""What adapter_fusion is measured on: BERT layers with fused adapters, and its rivals.

Every ratio is to the same layers without adapters, in float32 on a CPU and in the case's own dtype
on a GPU; with a backward, to their forward and backward to x. The backward is that of the second
stage: only the fusion trains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from peft_kernels.tools.bench import bert_layers
from peft_kernels.tools.bench.case import BaseCase
from peft_kernels.tools.bench.implementation import Implementation

SHAPE = "adapters, bottleneck, tokens, hidden x layers"
BARE = "without adapters"
FUSED = "peft_kernels"
RIVALS = ("reference", "direct", "adapters")
DROPOUT_P = 0.0  # of scores: with it every implementation computes directly


@dataclass(frozen=True)
class Case(BaseCase):
    """x [batch, seq, hidden] through frozen BERT layers with fusions of ``adapters`` adapters."""

    adapters: int
    size: int = 48
    batch: int = 8
    seq: int = 128
    hidden: int = 768
    layers: int = 2
    dtype: torch.dtype = torch.float32
    backward: bool = False
    title: str = ""

    @property
    def shape(self) -> str:
        tokens, hosts = f"{self.batch}x{self.seq}", f"{self.hidden}x{self.layers}"
        return f"{self.adapters}, {self.size}, {tokens}, {hosts}"

    @property
    def target(self) -> float | None:
        """The highest ratio allowed, or None where none is set."""
        return TARGETS.get(self)


_GROWTH = ", by the number of adapters"
TARGETS: dict[Case, float | None] = {
    Case(3): 1.07,
    Case(8): 1.15,
    Case(3, backward=True): None,
    Case(8, backward=True): None,
    **{Case(count, layers=1, title=_GROWTH): None for count in (2, 4, 8, 16, 32)},
}
CASES = tuple(TARGETS)


def cases(
    shapes: Iterable[tuple[int, int, int]] | None, dtype: torch.dtype, backward: bool
) -> list[Case]:
    """Three adapters for shapes tokens x hidden x bottleneck; or the suite's own cases."""
    if shapes is not None:
        return [
            Case(3, size, 1, tokens, hidden, dtype=dtype, backward=backward)
            for tokens, hidden, size in shapes
        ]
    return [c for c in CASES if c.dtype is dtype and c.backward is backward]


def implementations(
    case: Case,
    *,
    device: torch.device | str = "cpu",
    dropout_p: float = 0.0,
    compiled: bool = False,
) -> dict[str, Implementation]:
    """The layers without adapters, ours and the rivals, on the same values."""
    base, trained, x = _inputs(case, device)
    ours = bert_layers.with_fusion(base, trained)
    bare = case.bare_dtype(device)
    found = {
        BARE: bert_layers.implementation(copy.deepcopy(base).to(bare), x.to(bare)),
        FUSED: bert_layers.implementation(ours, x),
        "reference": bert_layers.implementation(ours, x, "reference"),
        "direct": bert_layers.implementation(bert_layers.computed_directly(ours), x, "reference"),
    }
    if compiled:
        compiled_model = cast(nn.Module, torch.compile(ours))
        found["torch.compile"] = bert_layers.implementation(compiled_model, x, "reference")
    if bert_layers.has_adapters():
        model = bert_layers.theirs(base.to(case.dtype), "pfeiffer", trained, dropout_p)
        bert_layers.copy_fusions(ours, model)
        found["adapters"] = bert_layers.implementation(model, x)
    return found


def exact(case: Case, *, device: torch.device | str = "cpu") -> Implementation:
    """The reference on the same values in float64."""
    base, trained, x = _inputs(case, device)
    ours = bert_layers.with_fusion(base, trained)
    return bert_layers.implementation(ours.double(), x.double(), "reference")


def _inputs(case: Case, device: torch.device | str) -> tuple[nn.Module, list[nn.Module], Tensor]:
    """The layers without adapters, the same with each of the adapters, and x."""
    torch.manual_seed(0)
    base = bert_layers.bert(case.hidden, case.layers, case.dtype, device)
    x = torch.randn(case.batch, case.seq, case.hidden, device=device, dtype=case.dtype)
    trained = [
        bert_layers.with_adapters(base, "pfeiffer", case.size, 0.0) for _ in range(case.adapters)
    ]
    return base, trained, x
