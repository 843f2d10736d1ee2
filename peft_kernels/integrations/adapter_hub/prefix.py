"""The prefixes of `adapters`: their encoder runs on one row, and their attention is our op.

A layer hands the keys and values of its text on as they are where the attention that it is in
takes the prefix beside them, see :mod:`.attention`; else it concatenates, as theirs does.

With ``strict=False`` their layers give sdpa attention the mask that eager attention has. What
transformers hands to sdpa is True where a query may attend, which `adapters` takes for the other
way round, and so leaves out the prefix; and where nothing is padded it is no mask at all, and sdpa
then has query i see the first i + 1 keys of prefix and text together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from adapters.composition import BatchSplit, Stack
from adapters.context import ForwardContext
from adapters.methods.prefix_tuning import FlatPrefixTuning as TheirFlatPrefixTuning
from adapters.methods.prefix_tuning import PrefixTuning as TheirPrefixTuning
from adapters.methods.prefix_tuning import PrefixTuningLayer as TheirPrefixTuningLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels.integrations.encoded_once import ONCE, kept_or_made
from peft_kernels.integrations.served import count, is_autocast, is_plain
from peft_kernels.integrations.transformers.attention.prefixed import (
    Pair,
    Prefixes,
    current_state,
)

# ---- encoders ------------------------------------------------------------------------------------


class Encoded(tuple):
    """What an encoder gives: a layer's keys and values ``[2, B, H, L, D]``, all rows alike."""

    rows: tuple[Tensor, ...]  # the same of one row

    @classmethod
    def of(cls, rows: tuple[Tensor, ...], batch: int) -> Encoded:
        whole = cls([pair.expand(-1, batch, -1, -1, -1) for pair in rows])
        whole.rows = rows
        return whole


class _Once(nn.Module):
    """Theirs, but for the number of rows that its parameters are read for."""

    def forward(self: Any, batch_size: int) -> tuple[Tensor, ...]:
        reason = why_not(self)
        if reason is not None:
            count(self, reason)
            return super().forward(batch_size)  # type: ignore[misc]  # theirs comes after this one
        count(self, ONCE)
        encode: Any = super().forward
        return Encoded.of(kept_or_made(self, lambda: encode(1)), batch_size)


class PrefixTuning(_Once, TheirPrefixTuning):
    """An embedding and an MLP."""


class FlatPrefixTuning(_Once, TheirFlatPrefixTuning):
    """The keys and values themselves."""


ENCODERS = (TheirPrefixTuning, TheirFlatPrefixTuning)


def why_not(encoder: Any) -> str | None:
    """Why an encoder's calls are theirs, or None."""
    parts = [module for module in encoder.modules() if module is not encoder]
    if not all(map(is_plain, parts)) or _has_any_global_hook():
        return "hooks"
    drops = encoder.dropout.training and encoder.dropout.p > 0.0
    return "dropout by row" if drops else None


# ---- layers --------------------------------------------------------------------------------------


class Awaited(Prefixes):
    """The prefix of one call of an attention module, once its layer has been asked for it.

    Args:
        module: the attention module.
        reason: why its prefix is theirs to concatenate, or None.
    """

    def __init__(self, module: nn.Module, reason: str | None) -> None:
        super().__init__({})
        self.module, self.reason = module, reason
        self.rest: tuple = ()  # what theirs takes beside keys and values


class Setting(NamedTuple):
    """What a prefix layer knows of the attention that it is in."""

    reason: str | None  # why that asks for no prefix
    is_causal: bool
    strict: bool  # whether to compute what theirs does, or what is right


SETTING = "_peft_kernels_prefix_setting"  # in a layer's __dict__


class PrefixTuningLayer(TheirPrefixTuningLayer):
    """Theirs, whose attention may take the prefix beside the text."""

    def forward(
        self,
        key_states: Tensor,
        value_states: Tensor,
        residual_input: Tensor,
        attention_mask: Tensor | None = None,
        invert_mask: bool = True,
    ) -> Any:
        rest = (residual_input, attention_mask, invert_mask)
        if self.get_active_setup() is None:
            return key_states, value_states, attention_mask
        awaited = current_state()
        if not isinstance(awaited, Awaited) or awaited.module._modules["prefix_tuning"] is not self:
            count(self, setting_of(self).reason or "another forward")
            return self.concatenated(key_states, value_states, *rest)
        found = awaited.reason or read(self, key_states)
        if isinstance(found, str):
            count(self, found)
            return self.concatenated(key_states, value_states, *rest)
        pair, awaited.ids = found
        awaited.pairs, awaited.rest = {awaited.module: pair}, rest
        return key_states, value_states, attention_mask

    def concatenated(
        self,
        keys: Tensor,
        values: Tensor,
        residual_input: Tensor,
        attention_mask: Tensor | None,
        invert_mask: bool,
    ) -> Any:
        """What theirs returns: keys, values and mask of prefix and text."""
        if not setting_of(self).strict:
            if attention_mask is None and self._wants_mask(residual_input):
                attention_mask = _causal_mask(residual_input.shape[1], keys)
            if attention_mask is not None and attention_mask.dtype is torch.bool:
                invert_mask = False
        return super().forward(keys, values, residual_input, attention_mask, invert_mask)

    def _wants_mask(self, x: Tensor) -> bool:
        if not setting_of(self).is_causal or x.shape[1] == 1:
            return False
        return getattr(self.model_config, "_attn_implementation", None) == "sdpa"


SERVED: dict[type, type] = {
    TheirPrefixTuning: PrefixTuning,
    TheirFlatPrefixTuning: FlatPrefixTuning,
    TheirPrefixTuningLayer: PrefixTuningLayer,
}
OWN = {ours: their for their, ours in SERVED.items()}


def setting_of(layer: nn.Module) -> Setting:
    return layer.__dict__[SETTING]


def read(layer: Any, x: Tensor) -> tuple[Pair, Tensor | None] | str:
    """A call's prefixes, and which row of x takes which of a bank, or why they are theirs.

    Args:
        x: anything with the rows and the dtype of the text's keys.
    """
    if not is_plain(layer):
        return "prefix_tuning: hooks"
    setup = layer.get_active_setup()
    names = _names(layer, setup, x.shape[0])
    if isinstance(names, str):
        return names
    if any(name in layer.prefix_gates for name in names):
        return "gating"
    context = ForwardContext.get_context()
    states = getattr(context, "prefix_states", {})
    found = [states[name][layer.location_key] for name in names if name in states]
    if len(found) < len(names) or not all(isinstance(each, Encoded) for each in found):
        return "a prefix for each row"
    index = [layer.prefixes[name] for name in names]
    if any(each[i].shape[1] != x.shape[0] for each, i in zip(found, index, strict=True)):
        return "rows that a Parallel repeats"
    pairs = [each.rows[i] for each, i in zip(found, index, strict=True)]
    if not is_autocast(x) and any(pair.dtype is not x.dtype for pair in pairs):
        return f"x in {x.dtype} for a prefix in {pairs[0].dtype}"
    if type(setup) is not BatchSplit:
        whole = pairs[0] if len(pairs) == 1 else torch.cat(pairs[::-1], 3)
        return (whole[0, 0], whole[1, 0]), None
    if len({pair.shape[3] for pair in pairs}) > 1:
        return "BatchSplit of several lengths"
    bank = torch.cat(pairs, 1)
    ids = [i for i, size in enumerate(setup.batch_sizes) for _ in range(size)]
    return (bank[0], bank[1]), torch.tensor(ids, device=bank.device)


def _names(layer: Any, setup: Any, rows: int) -> list[str] | str:
    """The prefixes of a setup in the order in which they are put before the text, or why not."""
    kind = type(setup).__name__
    if type(setup) not in (Stack, BatchSplit) or not all(isinstance(part, str) for part in setup):
        return f"{kind} of compositions" if type(setup) in (Stack, BatchSplit) else kind
    here = [name for name in setup if name in layer.prefixes]
    if type(setup) is BatchSplit and (len(here) < len(setup) or sum(setup.batch_sizes) != rows):
        return "BatchSplit of others than prefixes"
    return here


def _causal_mask(queries: int, keys: Tensor) -> Tensor:
    """``[B, 1, S, T]``, True where a query of the last S may attend."""
    text = keys.shape[2]
    seen = torch.ones(queries, text, dtype=torch.bool, device=keys.device).tril(text - queries)
    return seen.expand(keys.shape[0], 1, queries, text)
