"""PEFT's encoders of prompts and prefixes, run once for a batch and kept while nothing trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.p_tuning import PromptEncoder as PeftPromptEncoder
from peft.tuners.prefix_tuning import PrefixEncoder as PeftPrefixEncoder
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels.integrations.encoded_once import ONCE, kept_or_made
from peft_kernels.integrations.served import count, is_plain


class PrefixEncoder(PeftPrefixEncoder):
    """PEFT's prefix encoder: its MLP runs on one of the batch's rows, which are all the same."""

    def forward(self, prefix: Tensor) -> Tensor:
        return _encode(self, prefix, super().forward)


class PromptEncoder(PeftPromptEncoder):
    """PEFT's P-tuning encoder, whose LSTM or MLP runs again only once a parameter has changed."""

    def forward(self, indices: Tensor) -> Tensor:
        return _encode(self, indices, super().forward)


SERVED: dict[type, type] = {PeftPrefixEncoder: PrefixEncoder, PeftPromptEncoder: PromptEncoder}


def why_not(encoder: Any) -> str | None:
    """Why an encoder's calls are PEFT's, or None."""
    if isinstance(encoder, PeftPrefixEncoder) and not encoder.prefix_projection:
        return "no projection"
    parts = [module for module in encoder.modules() if module is not encoder]
    if not all(map(is_plain, parts)) or _has_any_global_hook():
        return "hooks"
    return None


def _encode(encoder: nn.Module, rows: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """``forward(rows)``, of rows ``[B, L]`` that are one row expanded."""
    reason = why_not(encoder)
    if reason is None and (rows.dim() != 2 or (rows.shape[0] != 1 and rows.stride(0) != 0)):
        reason = "an encoder's own rows"
    if reason is not None:
        count(encoder, reason)
        return forward(rows)
    count(encoder, ONCE)
    first = rows[:1]  # which of the encoder's vectors, in which order
    return kept_or_made(encoder, lambda: forward(first), first).expand(rows.shape[0], -1, -1)
