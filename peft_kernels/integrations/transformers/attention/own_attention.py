"""Attention modules of transformers' that compute their attention themselves: T5's and BERT's.

An instance's class is set to a subclass whose forward projects and caches as the module does and
attends through :func:`.prefixed.attend`. In transformers 5 BERT's
modules call the attention that the config names, and T5's do so from some release on: BERT's are
left as they are then, and T5's have only their bias by relative position made longer.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.integrations.transformers.attention.prefixed import (
    Recording,
    attend,
    attend_with_bias,
    current_state,
)

_T5 = ("T5Attention", "MT5Attention")
_BERT = tuple(
    f"{family}{kind}Attention"
    for family in (
        "Bert",
        "BertGeneration",
        "Camembert",
        "Data2VecText",
        "Electra",
        "Ernie",
        "LayoutLM",
        "MegatronBert",
        "RemBert",
        "RoCBert",
        "Roberta",
        "RobertaPreLayerNorm",
        "XLMRoberta",
        "XLMRobertaXL",
    )
    for kind in ("Self", "SdpaSelf", "Cross")
)


@cache
def calls_interface(kind: Any) -> bool:
    """Whether the host's forward takes its attention from the table under the config's name."""
    kind = kind.__bases__[1] if issubclass(kind, _Own) else kind
    forward = inspect.unwrap(kind.forward)
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def is_t5(module: Any) -> bool:
    return type(module).__name__ in _T5 or isinstance(module, _LengthensBias)


def is_bert(module: Any) -> bool:
    """A self-attention of BERT's kind, with absolute positions: relative ones add to the scores."""
    known = type(module).__name__ in _BERT or isinstance(module, _BertAttention)
    return known and getattr(module, "position_embedding_type", "absolute") == "absolute"


def take_over(module: Any) -> None:
    """Makes the module attend with a prefix, if it computes its attention itself."""
    if isinstance(module, _Own):
        return
    calls = calls_interface(module.__class__)
    if is_t5(module):
        module.__class__ = _subclass(_T5Bias if calls else _T5Attention, type(module))
    elif is_bert(module) and not calls:
        module.__class__ = _subclass(_BertAttention, type(module))


def give_back(module: Any) -> None:
    """Undoes :func:`take_over`."""
    if isinstance(module, _Own):
        module.__class__ = type(module).__bases__[1]


_SUBCLASSES: dict[tuple[type, type], type] = {}


def _subclass(own: type, kind: type) -> type:
    """The one class for all modules of a kind."""
    if (own, kind) not in _SUBCLASSES:
        _SUBCLASSES[own, kind] = type(f"Prefix{kind.__name__}", (own, kind), {})
    return _SUBCLASSES[own, kind]


class _Own:
    """What an instance's class is a subclass of once it's taken over, beside its own."""


def _cached(module: Any, states: Any, cache: Any, is_cross: bool, positions: Any) -> tuple:
    """The keys and values to attend to; ``states()`` projects those of this forward."""
    both = hasattr(cache, "cross_attention_cache")
    if cache is None:
        return states()
    of_kind = cache
    if both:
        of_kind = cache.cross_attention_cache if is_cross else cache.self_attention_cache
    if both and is_cross and cache.is_updated.get(module.layer_idx):
        kept = of_kind.layers[module.layer_idx]
        return kept.keys, kept.values
    where = {"cache_position": None if is_cross else positions}
    k, v = of_kind.update(*states(), module.layer_idx, where)
    if both and is_cross:
        cache.is_updated[module.layer_idx] = True
    return k, v


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class _LengthensBias(_Own):
    """T5's bias by relative position, of prefix and text.

    ``_before``, an attribute of the module, says how many places the prefix takes before the text
    as the bias counts them; without it the prefix' scores have no bias. The first layer's bias is
    handed from layer to layer.
    """

    def _places_before(self) -> int:
        return 0 if isinstance(current_state(), Recording) else self.__dict__.get("_before", 0)

    def _relative_bias(self: Any, queries: Tensor, keys: int) -> Tensor:
        """``[1, H, S, L + T]`` for queries at the text's places ``[S]`` and T keys."""
        before = self._places_before()
        distance = torch.arange(-before, keys, device=queries.device) - queries[:, None]
        buckets = self._relative_position_bucket(
            distance,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None]


class _T5Bias(_LengthensBias):
    """T5's attention that calls the attention which the config names."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple:
        if position_bias is None and self.has_relative_attention_bias and self._places_before():
            count, past, keys = hidden_states.shape[1], 0, hidden_states.shape[1]
            if past_key_values is not None:
                past = past_key_values.get_seq_length(self.layer_idx)
                keys = past_key_values.get_mask_sizes(count, self.layer_idx)[0]
            queries = past + torch.arange(count, device=hidden_states.device)
            position_bias = self._relative_bias(queries, keys)
        return super().forward(  # type: ignore[misc]  # the host's class comes after this one
            hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs
        )


class _T5Attention(_LengthensBias):
    """T5's attention: no scale, and a bias by relative position."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        layer_head_mask: Tensor | None = None,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
        **_: Any,
    ) -> tuple:
        is_cross = key_value_states is not None
        source = key_value_states if is_cross else hidden_states
        q = _heads(self.q(hidden_states), self.n_heads)
        if cache_position is None and position_bias is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
            cache_position = past + torch.arange(q.shape[2], device=q.device)
        k, v = _cached(
            self,
            lambda: (_heads(self.k(source), self.n_heads), _heads(self.v(source), self.n_heads)),
            past_key_values,
            is_cross,
            cache_position,
        )
        if position_bias is None:
            position_bias = self._position_bias(q, k, mask, cache_position)
        out, weights = attend_with_bias(
            self,
            q,
            k,
            v,
            None,  # the mask is in the bias
            position_bias,
            scale=1.0,
            dropout=self.dropout if self.training else 0.0,
            head_mask=layer_head_mask,
            need_weights=output_attentions,
        )
        outputs = (self.o(out.flatten(2)), position_bias)
        return (*outputs, weights) if output_attentions else outputs

    def _position_bias(
        self: Any, q: Tensor, k: Tensor, mask: Tensor | None, positions: Tensor
    ) -> Tensor:
        """By relative position in the first layer, and the mask: ``[B or 1, H, S, L + T]``."""
        before, keys = self._places_before(), k.shape[2]
        if self.has_relative_attention_bias:
            bias = self._relative_bias(positions, keys)
        else:
            bias = q.new_zeros(1, self.n_heads, q.shape[2], before + keys)
        return bias if mask is None else bias + F.pad(mask[..., :keys], (before, 0))


class _BertAttention(_Own):
    """BERT's self-attention, and its cross-attention, which is the same module."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
    ) -> tuple:
        return bert_attention(
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            past_key_values,
            cache_position,
            is_causal=self.is_decoder and encoder_hidden_states is None and attention_mask is None,
            dropout=bert_dropout(self),
            head_mask=head_mask,
            need_weights=bool(output_attentions),
        )


def bert_dropout(module: Any) -> float:
    """The rate that a module of BERT's kind drops probabilities at, now.

    That of sdpa has the rate of its config, whatever its nn.Dropout, which it doesn't call, says.
    """
    if not module.training:
        return 0.0
    return module.dropout_prob if hasattr(module, "dropout_prob") else module.dropout.p


def bert_attention(
    module: Any,
    hidden_states: Tensor,
    mask: Tensor | None,
    encoder_hidden_states: Tensor | None,
    cache: Any,
    cache_position: Tensor | None,
    **options: Any,
) -> tuple:
    """What a module of BERT's kind returns, with the prefix of the running forward.

    Args:
        options: of :func:`.prefixed.attend`.
    """
    heads, is_cross = module.num_attention_heads, encoder_hidden_states is not None
    source = encoder_hidden_states if is_cross else hidden_states
    q = _heads(module.query(hidden_states), heads)
    k, v = _cached(
        module,
        lambda: (_heads(module.key(source), heads), _heads(module.value(source), heads)),
        cache,
        is_cross,
        cache_position,
    )
    out, weights = attend(module, q, k, v, mask, **options)
    return out.flatten(2), weights
