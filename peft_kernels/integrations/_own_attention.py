"""Attention modules of transformers' that compute their attention themselves: T5's and BERT's.

An instance's class is set to a subclass whose forward projects and caches as the module does and
attends through :func:`peft_kernels.integrations._attention.attend`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.integrations._attention import Recording, attend, current_state

_T5 = ("T5Attention", "MT5Attention")
_BERT = tuple(
    f"{family}{kind}SelfAttention"
    for family in ("Bert", "Roberta", "XLMRoberta", "Electra", "Camembert")
    for kind in ("", "Sdpa")
)


def is_t5(module: Any) -> bool:
    return type(module).__name__ in _T5 or isinstance(module, _T5Attention)


def is_bert(module: Any) -> bool:
    """A self-attention of BERT's kind, with absolute positions: relative ones add to the scores."""
    known = type(module).__name__ in _BERT or isinstance(module, _BertAttention)
    return known and getattr(module, "position_embedding_type", "absolute") == "absolute"


def take_over(module: Any) -> None:
    """Makes the module attend with a prefix, if it computes its attention itself."""
    if isinstance(module, _Own):
        return
    if is_t5(module):
        module.__class__ = _subclass(_T5Attention, type(module))
    elif is_bert(module):
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
    """What the classes have in common: keys and values through the model's cache."""

    layer_idx: int

    def _cached(self, states: Any, cache: Any, is_cross: bool, positions: Any) -> tuple:
        """The keys and values to attend to; ``states()`` projects those of this forward."""
        both = hasattr(cache, "cross_attention_cache")
        if cache is None:
            return states()
        of_kind = cache
        if both:
            of_kind = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        if both and is_cross and cache.is_updated.get(self.layer_idx):
            layer = of_kind.layers[self.layer_idx]
            return layer.keys, layer.values
        where = {"cache_position": None if is_cross else positions}
        k, v = of_kind.update(*states(), self.layer_idx, where)
        if both and is_cross:
            cache.is_updated[self.layer_idx] = True
        return k, v


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class _T5Attention(_Own):
    """T5's attention: no scale, and a bias by relative position.

    ``_before``, an attribute of the module, says how many places the prefix takes before the text
    as the bias counts them; without it the prefix' scores have no bias.
    """

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        layer_head_mask: Tensor | None = None,
        query_length: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
    ) -> tuple:
        is_cross = key_value_states is not None
        source = key_value_states if is_cross else hidden_states
        q = _heads(self.q(hidden_states), self.n_heads)
        k, v = self._cached(
            lambda: (_heads(self.k(source), self.n_heads), _heads(self.v(source), self.n_heads)),
            past_key_values,
            is_cross,
            cache_position,
        )
        if position_bias is None:
            position_bias = self._position_bias(q, k, mask, query_length, cache_position)
        dropout = self.dropout if self.training else 0.0
        # Reentrant checkpointing marks the bias as requiring a gradient though nothing behind it
        # does; where the bias' weights do train, the module's own formula is what has a gradient.
        trains = self.__dict__["_bias_weight"].requires_grad
        bias = position_bias if trains else position_bias.detach()
        before = bias.shape[-1] - k.shape[2]
        out, weights = attend(
            self,
            q,
            k,
            v,
            bias[..., before:],
            prefix_mask=bias[..., :before] if before else None,
            scale=1.0,
            dropout=dropout,
            head_mask=layer_head_mask,
            need_weights=output_attentions or (trains and torch.is_grad_enabled()),
        )
        outputs = (self.o(out.flatten(2)), position_bias)
        return (*outputs, weights) if output_attentions else outputs

    def _position_bias(
        self: Any, q: Tensor, k: Tensor, mask: Tensor | None, query_length: Any, positions: Any
    ) -> Tensor:
        """By relative position in the first layer, and the mask: ``[B or 1, H, S, T]``.

        With a prefix before the text it is ``[..., L + T]``.
        """
        queries, keys = q.shape[2], k.shape[2]
        before = 0 if isinstance(current_state(), Recording) else self.__dict__.get("_before", 0)
        if self.has_relative_attention_bias:
            length = query_length if query_length is not None else positions[-1] + 1
            bias = self.compute_bias(
                before + length,
                before + keys,
                device=q.device,
                cache_position=None if positions is None else before + positions,
            )
            bias = bias[:, :, -queries:]
        else:
            bias = q.new_zeros(1, self.n_heads, queries, before + keys)
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
        heads, is_cross = self.num_attention_heads, encoder_hidden_states is not None
        source = encoder_hidden_states if is_cross else hidden_states
        q = _heads(self.query(hidden_states), heads)
        k, v = self._cached(
            lambda: (_heads(self.key(source), heads), _heads(self.value(source), heads)),
            past_key_values,
            is_cross,
            cache_position,
        )
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            is_causal=self.is_decoder and not is_cross and attention_mask is None,
            dropout=self.dropout.p if self.training else 0.0,
            head_mask=head_mask,
            need_weights=bool(output_attentions),
        )
        return out.flatten(2), weights
