"""The prefix encoders of `adapters`, whose MLP runs on one row for a batch that is all alike."""

from __future__ import annotations

from adapters.methods.prefix_tuning import PrefixTuning as TheirPrefixTuning
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels.integrations.encoded_once import ONCE, kept_or_made
from peft_kernels.integrations.served import count, is_plain


class PrefixTuning(TheirPrefixTuning):
    """Theirs, but for the number of rows that its embedding and its MLP run on."""

    def forward(self, batch_size: int) -> tuple[Tensor, ...]:
        reason = why_not(self)
        if reason is not None:
            count(self, reason)
            return super().forward(batch_size)
        count(self, ONCE)
        pairs = kept_or_made(self, lambda: super(PrefixTuning, self).forward(1))
        return tuple(pair.expand(-1, batch_size, -1, -1, -1) for pair in pairs)


SERVED: dict[type, type] = {TheirPrefixTuning: PrefixTuning}
OWN = {ours: theirs for theirs, ours in SERVED.items()}


def why_not(encoder: TheirPrefixTuning) -> str | None:
    """Why an encoder's calls are theirs, or None."""
    parts = [module for module in encoder.modules() if module is not encoder]
    if not all(map(is_plain, parts)) or _has_any_global_hook():
        return "hooks"
    drops = encoder.dropout.training and encoder.dropout.p > 0.0
    return "dropout by row" if drops else None
