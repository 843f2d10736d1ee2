"""Encoders of transformers' whose attention modules compute their attention themselves.

DistilBERT's, ALBERT's and ModernBERT's in transformers 4, and MPNet's in all releases: an
instance's class is set to one whose forward projects as the module does, and attends through
:func:`.prefixed.attend`. What a module adds to the scores by relative
position is of the text: a prefix has no position, and its scores have nothing added.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor

from peft_kernels.integrations.transformers.attention.own_attention import (
    _heads,
    _Own,
    _subclass,
    calls_interface,
)
from peft_kernels.integrations.transformers.attention.prefixed import attend, attend_with_bias


def own_sizes(module: Any) -> tuple[int, int] | None:
    """Heads and their size, or None if it isn't one of these modules."""
    return None if _kind_of(module) is None else (_count(module), _size(module))


def take_over(module: Any) -> None:
    """Makes the module attend with a prefix, if it is one of these."""
    kind = _kind_of(module)
    if kind is not None and not isinstance(module, _Own):
        module.__class__ = _subclass(kind, type(module))


def _kind_of(module: Any) -> type | None:
    if isinstance(module, _Encoder):
        return type(module)
    kind = _KINDS.get(type(module).__name__)
    absolute = getattr(module, "position_embedding_type", "absolute") == "absolute"
    return None if calls_interface(module.__class__) or not absolute else kind


def _count(module: Any) -> int:
    names = ("num_attention_heads", "num_heads", "n_heads")
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _size(module: Any) -> int:
    names = ("attention_head_size", "head_dim")
    return next(getattr(module, name) for name in names if hasattr(module, name))


class _Encoder(_Own):
    """What they have in common."""

    def _split(self, *projected: Tensor) -> tuple[Tensor, ...]:
        return tuple(_heads(x, _count(self)) for x in projected)


class _DistilBert(_Encoder):
    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple:
        q, k, v = self._split(self.q_lin(query), self.k_lin(key), self.v_lin(value))
        if mask is not None and mask.dim() == 2:
            mask = mask != 0
        rate = self.dropout.p if self.training else 0.0
        out, weights = attend(
            self, q, k, v, mask, dropout=rate, head_mask=head_mask, need_weights=output_attentions
        )
        out = self.out_lin(out.flatten(2))
        return (out, weights) if output_attentions else (out,)


class _Albert(_Encoder):
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple:
        x = hidden_states
        q, k, v = self._split(self.query(x), self.key(x), self.value(x))
        rate = self.attention_dropout.p if self.training else 0.0
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=rate,
            head_mask=head_mask,
            need_weights=output_attentions,
        )
        out = self.LayerNorm(x + self.output_dropout(self.dense(out.flatten(2))))
        return (out, weights) if output_attentions else (out,)


class _MPNet(_Encoder):
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple:
        names = tuple(inspect.signature(type(self).__bases__[1].forward).parameters)[1:]  # type: ignore[attr-defined]
        given = dict(zip(names, args, strict=False)) | kwargs
        x, asked = given["hidden_states"], bool(given.get("output_attentions"))
        q, k, v = self._split(self.q(x), self.k(x), self.v(x))
        options: dict[str, Any] = {
            "dropout": self.dropout.p if self.training else 0.0,
            "head_mask": given.get("head_mask"),
            "need_weights": asked,
        }
        mask, bias = given.get("attention_mask"), given.get("position_bias")
        if bias is None:
            out, weights = attend(self, q, k, v, mask, **options)
        else:
            out, weights = attend_with_bias(self, q, k, v, mask, bias, **options)
        out = self.o(out.flatten(2))
        return (out, weights) if asked else (out,)


class _ModernBert(_Encoder):
    def forward(
        self: Any, hidden_states: Tensor, output_attentions: bool | None = False, **kwargs: Any
    ) -> tuple:
        if hidden_states.dim() != 3:
            raise ValueError(
                "ModernBertAttention takes a prefix in rows [B, S] alone, and its flash attention "
                "packs them: build the model with attn_implementation='sdpa'"
            )
        qkv = self.Wqkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        cos, sin = self.rotary_emb(qkv, position_ids=kwargs.get("position_ids"))
        home = sys.modules[type(self).__bases__[1].__module__]
        q, k = home.apply_rotary_pos_emb(q, k, cos, sin)
        local = self.local_attention != (-1, -1)
        out, weights = attend(
            self,
            q,
            k,
            v,
            kwargs.get("sliding_window_mask" if local else "attention_mask"),
            dropout=self.attention_dropout if self.training else 0.0,
            need_weights=bool(output_attentions),
        )
        out = self.out_drop(self.Wo(out.flatten(2)))
        return (out, weights) if output_attentions else (out,)


_KINDS: dict[str, type] = {
    "MultiHeadSelfAttention": _DistilBert,
    "DistilBertSdpaAttention": _DistilBert,
    "AlbertAttention": _Albert,
    "AlbertSdpaAttention": _Albert,
    "MPNetSelfAttention": _MPNet,
    "ModernBertAttention": _ModernBert,
}
