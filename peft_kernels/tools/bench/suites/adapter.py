"""What adapter is measured on: BERT layers with adapters, and its rivals.

Every ratio is to the same layers without adapters, in float32 on a CPU and in the case's own dtype
on a GPU; with a backward, to their forward and backward to x. An op alone would be compared with
nothing that anybody runs.
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

SHAPE = "preset, bottleneck, tokens, hidden x layers"
BARE = "without adapters"
FUSED = "peft_kernels"
RIVALS = ("reference", "adapters")
DROPOUT_P = 0.1


@dataclass(frozen=True)
class Case(BaseCase):
    """x [batch, seq, hidden] through frozen BERT layers with a preset's adapters."""

    preset: str
    size: int
    batch: int = 8
    seq: int = 128
    hidden: int = 768
    layers: int = 2
    dtype: torch.dtype = torch.float32
    backward: bool = False

    @property
    def shape(self) -> str:
        tokens, hosts = f"{self.batch}x{self.seq}", f"{self.hidden}x{self.layers}"
        return f"{self.preset}, {self.size}, {tokens}, {hosts}"

    @property
    def target(self) -> float | None:
        """The highest ratio allowed, or None where none is set."""
        return TARGETS.get(self)


TARGETS: dict[Case, float | None] = {
    Case("pfeiffer", 48): 1.02,
    Case("houlsby", 48): 1.03,
    Case("parallel", 384): None,
    Case("pfeiffer", 48, backward=True): None,
    Case("houlsby", 48, backward=True): None,
    Case("parallel", 384, backward=True): None,
}
CASES = tuple(TARGETS)


def cases(
    shapes: Iterable[tuple[int, int, int]] | None, dtype: torch.dtype, backward: bool
) -> list[Case]:
    """Pfeiffer's adapters for shapes tokens x hidden x bottleneck; or the suite's own cases."""
    if shapes is not None:
        return [
            Case("pfeiffer", size, 1, tokens, hidden, dtype=dtype, backward=backward)
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
    base, ours, x = _inputs(case, device, dropout_p)
    bare = case.bare_dtype(device)
    found = {
        BARE: bert_layers.implementation(copy.deepcopy(base).to(bare), x.to(bare)),
        FUSED: bert_layers.implementation(ours, x),
        "reference": bert_layers.implementation(ours, x, "reference"),
    }
    if compiled:
        compiled_model = cast(nn.Module, torch.compile(ours))
        found["torch.compile"] = bert_layers.implementation(compiled_model, x, "reference")
    if bert_layers.has_adapters():
        model = bert_layers.theirs(base.to(case.dtype), case.preset, [ours], dropout_p)
        found["adapters"] = bert_layers.implementation(model, x)
    return found


def exact(case: Case, *, device: torch.device | str = "cpu") -> Implementation:
    """The reference on the same values in float64."""
    _, ours, x = _inputs(case, device, 0.0)
    return bert_layers.implementation(ours.double(), x.double(), "reference")


def _inputs(
    case: Case, device: torch.device | str, dropout_p: float
) -> tuple[nn.Module, nn.Module, Tensor]:
    """The layers without adapters and with them, and x."""
    torch.manual_seed(0)
    base = bert_layers.bert(case.hidden, case.layers, case.dtype, device)
    x = torch.randn(case.batch, case.seq, case.hidden, device=device, dtype=case.dtype)
    return base, bert_layers.with_adapters(base, case.preset, case.size, dropout_p), x
