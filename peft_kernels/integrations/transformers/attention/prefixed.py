"""Attention that takes a prefix: what a model's attention layers call, and where it comes from.

A layer's prefix is looked up in one place, the state of the running forward:

    Prefixes    attention module -> (prefix_k, prefix_v), and which row takes which of a bank
    Recording   no prefix; keeps every layer's keys and values, with their gradients

``with using(state):`` sets it, for the running call. Without a state a module that was given a
source (``module.__dict__[SOURCE]``) asks it, and any other module attends to its text alone.

Models of transformers' that read ``config._attn_implementation`` reach :func:`attend` through the
two functions registered under :data:`NAME`; other modules call it themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.calls.carried import Carried
from peft_kernels.integrations.transformers.attention.by_length import Lengths
from peft_kernels.integrations.transformers.attention.pinned import (
    IS_CAUSAL,
    NAME,
    asked_implementation,
)
from peft_kernels.integrations.transformers.attention.split_heads import of_heads_here
from peft_kernels.integrations.transformers.supported import refusal
from peft_kernels.ops._dtypes import acc_dtype
from peft_kernels.ops.prefix_attention import prefix_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(refusal()) from error

SOURCE = "_prefix_source"
Pair = tuple[Tensor, Tensor]


class Prefixes:
    """The prefixes of one forward.

    Args:
        pairs: attention module -> keys and values, ``[Hkv, L, D]`` each, or ``[P, Hkv, L, D]``, a
            bank, where ids are given. A module that isn't there has no prefix.
        ids: integers ``[B]``, each row's prefix in the banks; -1: none.
        lengths: of the rows' prefixes, where those of the banks differ.
        need_weights: whether the model is to return its attentions.
        in_masks: how many columns the host's masks have for a prefix, before those of the text.
            Where there are some, a module without a prefix runs the host's sdpa, if it asked for
            that.
    """

    def __init__(
        self,
        pairs: Mapping[nn.Module, Pair],
        ids: Tensor | None = None,
        need_weights: bool = False,
        in_masks: int = 0,
        lengths: Lengths | None = None,
    ) -> None:
        self.pairs, self.ids, self.need_weights = pairs, ids, need_weights
        self.in_masks, self.lengths = in_masks, lengths
        self.asked: dict[nn.Module, bool] = {}
        self.leaves: Prefixes | None = None  # of a checkpointed run; see _checkpointing.py

    def of(self, module: nn.Module) -> Pair | None:
        self.asked[module] = True
        return self.pairs.get(module)

    def was_asked(self, module: nn.Module) -> bool:
        """Whether the module looked for its prefix; True for one that has none."""
        return module in self.asked or module not in self.pairs


class Recording:
    """Keeps the keys and values that each attention module attends to, ``[B, Hkv, T, D]``.

    Args:
        of: the module whose one call is recorded.
    """

    def __init__(self, of: nn.Module) -> None:
        self.of, self.has_begun = of, False
        self.pairs: dict[nn.Module, Pair] = {}

    def was_asked(self, module: nn.Module) -> bool:
        """Whether the module's keys and values were kept."""
        return module in self.pairs


State = Prefixes | Recording
_STATE: Carried[State | None] = Carried("the forward with a prefix")


def current_state() -> State | None:
    """The running forward's state."""
    return _STATE.get()


def has_state() -> bool:
    """Whether a forward with a prefix, or a recorded one, is running."""
    return _STATE.get() is not None


def set_state(state: State | None) -> None:
    """Sets the state of the running call, with which it ends; :func:`using` is for a block."""
    _STATE.push(state)


def using(state: State | None) -> AbstractContextManager[None]:
    """Sets the state within the block."""
    return _STATE.within(state)


@contextmanager
def recording(module: nn.Module) -> Iterator[Recording]:
    """Within it, a call of the module fills the recording, differentiably where gradients are on.

    The model must have been prepared (:func:`..places.attention_places`).
    Its layers aren't checkpointed meanwhile: see :class:`_checkpointing.CarryingCheckpoint`.
    """
    kept = Recording(module)
    with using(kept):
        yield kept


def begins_recorded(module: nn.Module) -> bool:
    """Whether the call that begins is the one to be recorded.

    Another one inside it, as a hook makes, isn't: it has its own prefixes.
    """
    state = current_state()
    if not isinstance(state, Recording):
        return False
    if state.of is module and not state.has_begun:
        state.has_begun = True
        return True
    set_state(None)
    return False


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    prefix_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    head_mask: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale * q [prefix_k; k]^T + mask) [prefix_v; v]`` with the module's prefix.

    The probabilities' dropout, a head mask, what is added to the prefix' scores and the weights
    themselves have no place in the kernel: where one is asked for, the keys and values are
    concatenated and the model's own formula is computed.

    Args:
        module: the attention module, by which the prefix is known.
        q: ``[B, Hq, S, D]``.
        k, v: ``[B, Hkv, T, D]``.
        mask: over the text's keys: ``[B, T]``, the real ones, or what broadcasts to
            ``[B, Hq, S, T]``, bool (True: attend) or additive.
        prefix_mask: additive, over the prefix' keys, ``[B or 1, Hq, S, L]``.
        is_causal: query i sees the text's keys up to T - S + i.
        scale: 1/sqrt(D) by default.
        dropout: of the probabilities.
        head_mask: ``[Hq]`` or ``[..., Hq, 1, 1]``, times the probabilities.
        need_weights: whether to return the probabilities, ``[B, Hq, S, L + T]``.

    Returns:
        ``[B, S, Hq, D]``, and the weights or None.
    """
    state = _STATE.get()
    if isinstance(state, Recording):
        if module in state.pairs:
            raise ValueError(
                f"{type(module).__name__} attends more than once in a forward, as a module that "
                "several layers share does: a text has no one pair of keys and values there"
            )
        state.pairs[module] = (k, v)
        prefixes = None
    elif state is None and (source := module.__dict__.get(SOURCE)) is not None:
        prefixes = source()
    else:
        prefixes = state
    pair = ids = lengths = None
    if prefixes is not None:
        pair, need_weights = prefixes.of(module), need_weights or prefixes.need_weights
        ids, lengths = (None, None) if pair is None else (prefixes.ids, prefixes.lengths)
    if pair is None:
        none = k.new_empty(k.shape[1], 0, k.shape[3])
        pair, prefix_mask = (none, none), None
    elif pair[0].shape[-3] != k.shape[1]:
        pair = of_heads_here(module, pair, k.shape[1])
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, :]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if dropout > 0 or prefix_mask is not None or head_mask is not None or need_weights:
        length = pair[0].shape[-2]
        seen = None if ids is None else (ids >= 0).view(-1, 1, 1, 1)
        seen = seen if lengths is None else lengths.seen(length)
        bias = _bias(q, k.shape[2], length, seen, mask, prefix_mask, is_causal)
        return _direct(q, k, v, pair, ids, bias, scale, dropout, head_mask, need_weights)
    # A prefix of another dtype, as a folder may hold, by way of that of the sums.
    prefix = [x if x.dtype is q.dtype else x.to(acc_dtype(q)) for x in pair]
    if ids is not None and lengths is not None:
        out = lengths.attend(q, k, v, *prefix, ids, mask, is_causal=is_causal, scale=scale)
        return out, None
    out = prefix_attention(
        q, k, v, *prefix, is_causal=is_causal, attn_mask=mask, scale=scale, prefix_ids=ids
    )
    return out.transpose(1, 2), None


def attend_with_bias(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor,
    need_weights: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """:func:`attend` with a bias added to the scores, as T5's by relative position.

    Where a bias trains, the model's own formula is computed, in which it has a gradient. It does
    if the weight that the module names as ``_bias_weight`` does: reentrant checkpointing marks
    tensors as requiring a gradient though nothing behind them does.

    Args:
        module, q, k, v, mask, need_weights, options: as of :func:`attend`.
        bias: ``[B or 1, Hq, S, T]``, or ``[..., L + T]``, of the prefix' scores too.
    """
    weight = module.__dict__.get("_bias_weight")
    trains = bias.requires_grad if weight is None else weight.requires_grad
    bias = bias if trains else bias.detach()
    before = bias.shape[-1] - k.shape[2]
    prefix_bias, bias = bias[..., :before] if before else None, bias[..., before:]
    if mask is not None:
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask
        bias = bias + (_where_not(mask, bias) if mask.dtype == torch.bool else mask)
    direct = need_weights or (trains and torch.is_grad_enabled())
    return attend(module, q, k, v, bias, prefix_mask=prefix_bias, need_weights=direct, **options)


# ---- the direct form -----------------------------------------------------------------------------


def _direct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pair: Pair,
    ids: Tensor | None,
    bias: Tensor,
    scale: float,
    dropout: float,
    head_mask: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """The keys and values concatenated, for what needs the probabilities."""
    batch, groups = q.shape[0], q.shape[1] // k.shape[1]
    rows = [_of_rows(x.to(k.dtype), ids, batch) for x in pair]
    k = torch.cat([rows[0], k], 2).repeat_interleave(groups, 1)
    v = torch.cat([rows[1], v], 2).repeat_interleave(groups, 1)
    if head_mask is None and not need_weights:
        out = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
        return out.transpose(1, 2), None
    scores = scale * (q @ k.transpose(-1, -2)) + bias
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = F.dropout(torch.softmax(scores.to(wide), -1).to(q.dtype), dropout)
    if head_mask is not None:
        weights = weights * (head_mask.view(1, -1, 1, 1) if head_mask.dim() == 1 else head_mask)
    return (weights @ v).transpose(1, 2), weights if need_weights else None


def _of_rows(x: Tensor, ids: Tensor | None, batch: int) -> Tensor:
    """``[B, Hkv, L, D]``: each row's prefix; a row without one gets any, which is masked out."""
    if ids is not None:
        return x[ids.clamp_min(0).long()]
    return (x if x.dim() == 4 else x[None]).expand(batch, -1, -1, -1)


def _bias(
    q: Tensor,
    text: int,
    length: int,
    seen: Tensor | None,
    mask: Tensor | None,
    prefix_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """What is added to the scores of prefix and text, ``[B or 1, H or 1, S, L + T]``.

    ``seen``, ``[B, 1, 1, L or 1]``, says which of the prefix' keys a row has; all where None.
    """
    queries = q.shape[2]
    added = q.new_zeros(1, 1, queries, text)
    if mask is not None:
        added = added + (_where_not(mask, q) if mask.dtype == torch.bool else mask)
    if is_causal:
        before = torch.ones(queries, text, dtype=torch.bool, device=q.device).tril(text - queries)
        added = added + _where_not(before, q)
    prefix = q.new_zeros(1, 1, 1, length) if prefix_mask is None else prefix_mask
    if seen is not None:
        prefix = prefix + _where_not(seen, q)
    rows, heads = (max(added.shape[i], prefix.shape[i]) for i in (0, 1))
    return torch.cat(
        [prefix.expand(rows, heads, queries, length), added.expand(rows, heads, queries, text)], -1
    )


def _where_not(seen: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, float("-inf"))


# ---- as transformers' attention implementation ---------------------------------------------------

_REFUSED = ("softcap", "s_aux")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers' attention modules call, under :data:`NAME`."""
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} attends with {name}, which an attention with a prefix "
                "doesn't have"
            )
    state = current_state()
    if isinstance(state, Prefixes) and state.in_masks:
        if module not in state.pairs and asked_implementation(module) == "sdpa":
            options: dict[str, Any] = {
                "scaling": scaling,
                "dropout": dropout,
                "is_causal": is_causal,
                **kwargs,
            }
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        if module in state.pairs and attention_mask is not None:
            attention_mask = attention_mask[..., state.in_masks :]
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask, causal = attention_mask[..., : key.shape[2]], False
    elif attention_mask is not None:
        causal = True  # the real keys alone, from prefix_mask
    else:
        known = getattr(module, IS_CAUSAL, getattr(module, "is_causal", True))
        causal = bool(known if is_causal is None else is_causal)
    options = {
        "is_causal": causal,
        "scale": scale_of(module, query.shape[-1]) if scaling is None else scaling,
        "dropout": dropout,
        "head_mask": head_mask,
        "need_weights": bool(output_attentions),
    }
    if position_bias is not None:
        return attend_with_bias(module, query, key, value, attention_mask, position_bias, **options)
    return attend(module, query, key, value, attention_mask, **options)


def scale_of(module: Any, head_dim: int) -> float:
    """1/sqrt(D), and GPT-2's options of it, which its own eager attention alone has."""
    scale = head_dim**-0.5
    if asked_implementation(module) != "eager":
        return scale
    scale = scale if getattr(module, "scale_attn_weights", True) else 1.0
    inverse = getattr(module, "scale_attn_by_inverse_layer_idx", False)
    return scale / (module.layer_idx + 1) if inverse else scale


def attention_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **queries: Any,
) -> Tensor | None:
    """The mask that transformers' models make for :func:`attention`.

    A causal mask isn't made: nothing is returned, or, with padding, the real keys ``[B, T]``.

    Args:
        queries: where the queries stand, ``cache_position`` or ``q_length`` and ``q_offset``, and
            whatever else the host's own mask functions take; handed on to them.
    """
    in_window = local_size is not None and kv_length <= local_size
    plain = mask_function is causal_mask_function or in_window
    if plain and allow_is_causal_skip and kv_offset == 0 and _end_with_keys(kv_length, queries):
        if attention_mask is None:
            return None
        # Keys that the mask doesn't reach are places of a cache that nothing has filled.
        real = F.pad(attention_mask, (0, kv_length - attention_mask.shape[1])).bool()
        return None if not torch.compiler.is_compiling() and bool(real.all()) else real
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **queries,
    )


def _end_with_keys(kv_length: int, queries: Mapping[str, Any]) -> bool:
    """Whether the last query stands at the last key, as :func:`attend`'s causal mask has it.

    A cache of a fixed size has keys beyond, and says where the queries stand in a tensor.
    """
    if "q_length" not in queries:
        return True  # a host that gives cache_position allows no skip over such a cache
    offset = queries.get("q_offset", 0)
    return isinstance(offset, int) and offset + queries["q_length"] == kv_length


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)
