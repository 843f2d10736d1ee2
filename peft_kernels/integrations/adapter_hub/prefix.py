"""The prefixes of `adapters`: their encoder runs on one row for a batch that is all alike.

With ``strict=False`` their layers give sdpa attention the mask that eager attention has. What
transformers hands to sdpa is True where a query may attend, which `adapters` takes for the other
way round, and so leaves out the prefix; and where nothing is padded it is no mask at all, and sdpa
then has query i see the first i + 1 keys of prefix and text together.
"""

from __future__ import annotations

from typing import Any

import torch
from adapters.methods.prefix_tuning import PrefixTuning as TheirPrefixTuning
from adapters.methods.prefix_tuning import PrefixTuningLayer as TheirPrefixTuningLayer
from torch import Tensor, nn
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


# In a layer's __dict__ with strict=False: whether its attention is causal.
CAUSAL = "_peft_kernels_is_causal_prefix"


class PrefixTuningLayer(TheirPrefixTuningLayer):
    """Theirs, with the mask that its attention needs: of ``strict=False`` alone."""

    def forward(
        self,
        key_states: Tensor,
        value_states: Tensor,
        residual_input: Tensor,
        attention_mask: Tensor | None = None,
        invert_mask: bool = True,
    ) -> Any:
        if attention_mask is None and self._wants_mask(residual_input):
            attention_mask = _causal_mask(residual_input.shape[1], key_states)
        if attention_mask is not None and attention_mask.dtype is torch.bool:
            invert_mask = False
        return super().forward(
            key_states, value_states, residual_input, attention_mask, invert_mask
        )

    def _wants_mask(self, x: Tensor) -> bool:
        if not self.__dict__[CAUSAL] or x.shape[1] == 1 or self.get_active_setup() is None:
            return False
        return getattr(self.model_config, "_attn_implementation", None) == "sdpa"


SERVED: dict[type, type] = {TheirPrefixTuning: PrefixTuning}
OWN = {PrefixTuning: TheirPrefixTuning, PrefixTuningLayer: TheirPrefixTuningLayer}


def set_strict(attention: nn.Module, strict: bool) -> None:
    """Has the prefix layer of an attention compute what theirs does, or what is right."""
    layer: Any = attention._modules.get("prefix_tuning")
    if type(layer) not in (TheirPrefixTuningLayer, PrefixTuningLayer):
        return
    layer.__class__ = TheirPrefixTuningLayer if strict else PrefixTuningLayer
    layer.__dict__.pop(CAUSAL, None)
    if not strict:
        crosses = getattr(attention, "is_cross_attention", False)
        decodes = any(getattr(attention, name, False) for name in ("is_causal", "is_decoder"))
        layer.__dict__[CAUSAL] = decodes and not crosses


def why_not(encoder: TheirPrefixTuning) -> str | None:
    """Why an encoder's calls are theirs, or None."""
    parts = [module for module in encoder.modules() if module is not encoder]
    if not all(map(is_plain, parts)) or _has_any_global_hook():
        return "hooks"
    drops = encoder.dropout.training and encoder.dropout.p > 0.0
    return "dropout by row" if drops else None


def _causal_mask(queries: int, keys: Tensor) -> Tensor:
    """``[B, 1, S, T]``, True where a query of the last S may attend."""
    text = keys.shape[2]
    seen = torch.ones(queries, text, dtype=torch.bool, device=keys.device).tril(text - queries)
    return seen.expand(keys.shape[0], 1, queries, text)
