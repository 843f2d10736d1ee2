"""Attention modules of `adapters` that take a prefix beside their text, by our op.

Those that call the attention function which ``config._attn_implementation`` names are told of
:func:`attend_beside` there, by a view of their config, for the rest of a call in which a prefix
layer has handed one over. Those of BERT's kind, which compute attention themselves, have a forward
of ours. No key, value or mask is concatenated.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

import torch
from adapters.context import ForwardContext
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_kernels.integrations.adapter_hub import prefix
from peft_kernels.integrations.adapter_hub.prefix import Awaited, Setting
from peft_kernels.integrations.adapter_hub.stand_in import StandIn, own_class, served_class
from peft_kernels.integrations.served import count
from peft_kernels.integrations.transformers.attention.own_attention import (
    bert_attention,
    bert_dropout,
)
from peft_kernels.integrations.transformers.attention.pinned import view_of
from peft_kernels.integrations.transformers.attention.prefixed import (
    Prefixes,
    attend,
    current_state,
    scale_of,
    using,
)

KERNEL = "prefix_attention"
NAME = "peft_kernels_adapters_prefix"
_EAGER = "eager_attention_forward"  # in the module that a class is in
LEFT_OUT = "sdpa, whose mask leaves out the prefix or text"
DROPOUT = "dropout of attention"
_CALLERS = (
    "LlamaAttention",
    "MistralAttention",
    "GPT2Attention",
    "BartAttention",
    "MBartAttention",
    "PLBartAttention",
    "WhisperAttention",
    "ViTSelfAttention",
)
_BERT = tuple(
    f"{family}{kind}Attention"
    for family in ("Bert", "BertGeneration", "Roberta", "XLMRoberta", "Xmod")
    for kind in ("Self", "SdpaSelf")
)


class _Served(StandIn, nn.Module):
    """What both kinds have in common."""

    def _why_not(self: Any, given: dict[str, Any]) -> str | None:
        """Why a call's prefix is for theirs to concatenate, or None."""
        config = self.__dict__.get("config")
        if "forward" in self.__dict__:
            return "another forward"
        if given.get("output_attentions") or getattr(config, "output_attentions", False):
            return "attentions asked for"
        if given.get("head_mask") is not None or given.get("layer_head_mask") is not None:
            return "head mask"
        return "scores in float32" if getattr(self, "reorder_and_upcast_attn", False) else None


class _Caller(_Served):
    """A module that calls the attention function which its config names."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = _parameters(self.theirs)
        given = dict(zip(names, args, strict=False)) | kwargs
        awaited = Awaited(self, self._why_not(given))
        with using(awaited):
            output = super().forward(*args, **kwargs)
        if awaited.pairs and not awaited.was_asked(self):
            raise RuntimeError(
                f"{type(self).__name__} must call the attention function that its config names, "
                f"which was {NAME}: its prefix is left out. restore(model) gives it back"
            )
        return output

    @property
    def config(self: Any) -> Any:
        """Its config, or a view that names :func:`attend_beside`."""
        config, awaited = self.__dict__["config"], current_state()
        if isinstance(awaited, Awaited) and awaited.module is self and awaited.pairs:
            return view_of(config, name=NAME)
        return config

    @config.setter
    def config(self: Any, config: Any) -> None:
        self.__dict__["config"] = config


class _Bert(_Served):
    """A self-attention of BERT's kind."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
    ) -> Any:
        layer, theirs = self.prefix_tuning, super().forward
        rest = (encoder_hidden_states, past_key_values, output_attentions, cache_position)
        whole = (hidden_states, attention_mask, head_mask, *rest)
        if layer.get_active_setup() is None:
            return theirs(*whole)
        given = {"head_mask": head_mask, "output_attentions": output_attentions}
        is_sdpa = "Sdpa" in self.theirs.__name__
        causal = is_sdpa and self.is_decoder and attention_mask is None
        causal = causal and encoder_hidden_states is None and hidden_states.shape[1] > 1
        reason = self._why_not(given) or self._why_not_own()
        reason = reason or _why_not_masked(layer, is_sdpa, attention_mask, causal)
        found = reason or prefix.read(layer, hidden_states)
        if isinstance(found, str):
            with using(Awaited(self, found)):
                return theirs(*whole)
        count(layer, KERNEL)
        pair, ids = found
        with using(Prefixes({self: pair}, ids)):
            return bert_attention(
                self,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                past_key_values,
                cache_position,
                is_causal=causal,
            )

    def _why_not_own(self: Any) -> str | None:
        if bert_dropout(self):
            return DROPOUT
        if self.position_embedding_type != "absolute":
            return "scores with a bias"
        is_prompted = getattr(ForwardContext.get_context(), "prompt_tokens_length", None)
        return None if is_prompted is None else "prompt tuning"


# ---- which modules -------------------------------------------------------------------------------


def serve(attention: Any, strict: bool) -> None:
    """Has an attention module of theirs take its prefix by our op, if it has one and is known.

    Args:
        strict: whether to compute what theirs does, or what is right.
    """
    layer = attention._modules.get("prefix_tuning")
    if not isinstance(layer, prefix.TheirPrefixTuningLayer) or not layer.prefixes:
        return
    kind = own_class(type(attention))
    names = [base.__name__ for base in kind.__mro__]
    ours = next((ours for name, ours in _KINDS.items() if name in names), None)
    if ours is not None and not isinstance(attention, ours):
        attention.__class__ = served_class(ours, kind)
    crosses = getattr(attention, "is_cross_attention", False)
    decodes = any(getattr(attention, name, False) for name in ("is_causal", "is_decoder"))
    reason = None if ours is not None else f"attention: {kind.__name__}"
    layer.__dict__[prefix.SETTING] = Setting(reason, decodes and not crosses, strict)


def why_not(layer: Any) -> str | None:
    """Why a call of a prefix layer would be theirs, or None."""
    setting = prefix.setting_of(layer)
    if setting.reason is not None:
        return setting.reason
    setup = layer.get_active_setup()
    if any(setup is None or name in setup.flatten() for name in layer.prefix_gates):
        return "gating"
    is_sdpa = getattr(layer.model_config, "_attn_implementation", None) == "sdpa"
    return LEFT_OUT if is_sdpa and setting.is_causal and setting.strict else None


_KINDS: dict[str, type] = dict.fromkeys(_CALLERS, _Caller) | dict.fromkeys(_BERT, _Bert)


@cache
def _parameters(kind: Any) -> tuple[str, ...]:
    """The names of what a class' forward takes."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


# ---- as transformers' attention implementation ---------------------------------------------------


def attend_beside(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers' attention modules call, under :data:`NAME`.

    Args:
        query, key, value: ``[B, H, S, D]``, ``[B, Hkv, T, D]`` twice, of the text.
        attention_mask: as the module's own implementation takes it, of the text.
    """
    awaited: Any = current_state()
    layer, causal = module.prefix_tuning, False
    name = module.__dict__["config"]._attn_implementation
    bias = module._buffers.get("bias")  # GPT-2's causal mask of eager attention
    if name != "eager":
        asked = given.get("is_causal")
        if asked is None:
            asked = attention_mask is None and getattr(module, "is_causal", True)
        causal = bool(asked) and query.shape[2] > 1
    elif bias is not None:
        causal = not module.is_cross_attention
    reason = _why_not_called(module, name, key, awaited, given)
    reason = reason or _why_not_masked(layer, name == "sdpa", attention_mask, causal)
    if reason is not None:
        count(layer, reason)
        key, value, attention_mask = layer.concatenated(key, value, *awaited.rest)
        return _function_of(module, name)(module, query, key, value, attention_mask, **given)
    count(layer, KERNEL)
    scale = given.get("scaling")
    return attend(
        module,
        query,
        key,
        value,
        None if attention_mask is None else attention_mask[..., : key.shape[2]],
        is_causal=causal,
        scale=scale_of(module, query.shape[-1]) if scale is None else scale,
    )


def _why_not_called(
    module: Any, name: str, key: Tensor, awaited: Awaited, given: dict[str, Any]
) -> str | None:
    pair = awaited.of(module)
    if name not in ("eager", "sdpa"):
        return f"{name} attention"
    if given.get("dropout"):
        return DROPOUT
    if any(given.get(option) is not None for option in ("softcap", "s_aux")):
        return "attention with caps or sinks"
    bias = module._buffers.get("bias")
    if name == "eager" and bias is not None and pair is not None:
        length = pair[0].shape[-2] + key.shape[2]
        return "more positions than the model has" if length > bias.shape[-1] else None
    return None


def _why_not_masked(layer: Any, is_sdpa: bool, mask: Tensor | None, causal: bool) -> str | None:
    """Why a mask is theirs to put the prefix before, or None."""
    if mask is not None and mask.dim() != 4:
        return "a mask of rows"
    is_bool = mask is not None and mask.dtype is torch.bool
    if is_bool and not is_sdpa:
        return "a mask of truth values"
    # What theirs makes of these hides the prefix, or text behind it.
    hides = is_sdpa and (is_bool or (causal and mask is None))
    return LEFT_OUT if hides and prefix.setting_of(layer).strict else None


def _function_of(module: Any, name: str) -> Any:
    """The attention function that the module calls without ours."""
    if name == "eager":
        homes = (vars(sys.modules[kind.__module__]) for kind in module.theirs.__mro__)
        return next(home[_EAGER] for home in homes if _EAGER in home)
    return ALL_ATTENTION_FUNCTIONS[name]


AttentionInterface.register(NAME, attend_beside)
