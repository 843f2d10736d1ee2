"""What prefix_attention is measured on: a layer's attention with a prefix, and its rivals.

Every ratio is to PyTorch's attention over the text alone, in the same dtype and with as many heads.
With a backward, the queries, the keys, the values and the prefix all get gradients, as they do in
every layer but a frozen model's first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops.prefix_attention import example_inputs, prefix_attention
from peft_kernels.tools.bench.case import BaseCase
from peft_kernels.tools.bench.implementation import Forward, Implementation

SHAPE = "batch, queries over keys, heads/KV x dim, prefix"
BARE = "attention without a prefix"
FUSED = "peft_kernels"
RIVALS = ("reference", "composition in PEFT")
DROPOUT_P = 0.0  # there is none
MASKED = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Case(BaseCase):
    """Causal attention of ``seq`` queries over ``keys`` keys, or ``seq``, and ``length`` more."""

    batch: int
    seq: int
    heads: int
    kv_heads: int
    length: int
    keys: int | None = None
    dim: int = 64
    dtype: torch.dtype = torch.float32
    backward: bool = False

    @property
    def shape(self) -> str:
        tokens = f"{self.seq} over {self.keys or self.seq}"
        return f"{self.batch}, {tokens}, {self.heads}/{self.kv_heads}x{self.dim}, {self.length}"

    @property
    def target(self) -> float | None:
        """The highest ratio allowed, or None where none is set."""
        return TARGETS.get(self)


_DECODE = Case(32, 1, 12, 12, 100, 512)
_TRAINING = Case(8, 512, 12, 12, 100)
# Forward, and forward and backward; nobody trains on single queries.
_LIMITS = {
    Case(8, 512, 12, 12, 20): (1.12, 1.10),
    _TRAINING: (1.27, 1.27),
    Case(8, 512, 12, 12, 200): (1.45, 1.33),
    Case(8, 512, 16, 4, 100): (1.20, 1.39),
    Case(16, 128, 12, 12, 100): (1.70, 1.70),
}
TARGETS: dict[Case, float | None] = {
    **{case: limits[0] for case, limits in _LIMITS.items()},
    _DECODE: 1.08,
    **{replace(case, backward=True): limits[1] for case, limits in _LIMITS.items()},
    replace(_TRAINING, dtype=torch.bfloat16): None,
    replace(_DECODE, dtype=torch.bfloat16): None,
    replace(_TRAINING, dtype=torch.bfloat16, backward=True): None,
}
CASES = tuple(TARGETS)


def cases(
    shapes: Iterable[tuple[int, int, int]] | None, dtype: torch.dtype, backward: bool
) -> list[Case]:
    """A batch of 8 for shapes queries x heads x prefix; or the suite's own cases."""
    if shapes is not None:
        return [
            Case(8, seq, heads, heads, length, dtype=dtype, backward=backward)
            for seq, heads, length in shapes
        ]
    return [c for c in CASES if c.dtype is dtype and c.backward is backward]


# ---- implementations -------------------------------------------------------------------------


def implementations(
    case: Case,
    *,
    device: torch.device | str = "cpu",
    dropout_p: float = 0.0,
    compiled: bool = False,
) -> dict[str, Implementation]:
    """PyTorch's attention without the prefix, ours and the rivals, on the same values; x is q."""
    inputs = _inputs(case, device)
    q, *others = (tensor.requires_grad_() for tensor in inputs.values())
    k, v, prefix_k, prefix_v = others
    grouped = case.heads != case.kv_heads
    mask = _mask(case, q)

    def ours(q: Tensor) -> Tensor:
        return prefix_attention(q, k, v, prefix_k, prefix_v)

    def reference(q: Tensor) -> Tensor:
        with _library.backend("reference"):
            return ours(q)

    def composition(q: Tensor) -> Tensor:
        return _composition(q, k, v, prefix_k, prefix_v, mask)

    forwards: dict[str, Forward] = {
        FUSED: ours,
        "reference": reference,
        "composition in PEFT": composition,
    }
    if compiled:
        forwards["torch.compile"] = cast(Forward, torch.compile(composition))

    def bare(q: Tensor) -> Tensor:
        causal = case.keys is None
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    found = {BARE: Implementation(bare, q, (k, v))}
    return found | {
        name: Implementation(forward, q, tuple(others), (mask,))
        for name, forward in forwards.items()
    }


def exact(case: Case, *, device: torch.device | str = "cpu") -> Implementation:
    """The reference on the same values in float64."""
    q, *others = (tensor.double().requires_grad_() for tensor in _inputs(case, device).values())

    def forward(q: Tensor) -> Tensor:
        with _library.backend("reference"):
            return prefix_attention(q, *others)

    return Implementation(forward, q, tuple(others))


def _inputs(case: Case, device: torch.device | str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    inputs = example_inputs(
        case.batch, case.seq, case.heads, case.kv_heads, case.dim, case.length,
        keys=case.keys, dtype=case.dtype, device=device,
    )  # fmt: skip
    if case.keys:  # a cache
        inputs |= {name: inputs[name].contiguous() for name in ("k", "v")}
    return inputs


def _mask(case: Case, q: Tensor) -> Tensor:
    """[B, 1, S, L + T], as models make it: what is added to the scores of prefix and text."""
    keys = case.keys or case.seq
    seen = torch.ones(case.seq, keys, dtype=torch.bool, device=q.device).tril(keys - case.seq)
    text = torch.zeros(seen.shape, device=q.device).masked_fill_(~seen, MASKED)
    mask = F.pad(text, (case.length, 0)).clamp_min(torch.finfo(case.dtype).min).to(case.dtype)
    return mask.expand(case.batch, 1, -1, -1).contiguous()


def _composition(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Tensor
) -> Tensor:
    """The prefix expanded to the batch and put before the keys, which are repeated by group."""

    def whole(prefix: Tensor, text: Tensor) -> Tensor:
        joined = torch.cat((prefix.expand(text.shape[0], -1, -1, -1), text), 2)
        return joined.repeat_interleave(q.shape[1] // text.shape[1], 1)

    return F.scaled_dot_product_attention(q, whole(prefix_k, k), whole(prefix_v, v), mask)
