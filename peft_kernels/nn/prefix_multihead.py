"""A prefix before the keys and values of torch's own ``nn.MultiheadAttention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.ops.prefix_attention import prefix_attention


def prefix_multihead_attention(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    prefix_ids: Tensor | None = None,
) -> Tensor:
    """What the module computes with ``[prefix; text]`` as its projected keys and values.

    Args:
        attention: the module; its projections, heads and ``batch_first`` are used.
        query: ``[B, S, E]``, or ``[S, B, E]`` without ``batch_first``.
        key, value: ``[B, T, E]`` likewise.
        prefix_k, prefix_v: ``[heads, L, E / heads]``, or a bank ``[P, heads, L, E / heads]``.
        key_padding_mask: ``[B, T]``, True at padding, as the module takes it.
        attn_mask: ``[S, T]`` or ``[B, heads, S, T]`` over the text; bool (True: may not attend, as
            the module takes it) or additive.
        is_causal: query i sees the text's keys up to T - S + i.
        prefix_ids: ``[B]``, each row's prefix of a bank; -1: none.

    Returns:
        Of query's shape.

    Raises:
        ValueError: a module with ``bias_k``, ``add_zero_attn``, or dropout while it trains; and
            what :func:`peft_kernels.ops.prefix_attention` raises.
    """
    if attention.bias_k is not None or attention.add_zero_attn:
        raise ValueError("attention must not have add_bias_kv or add_zero_attn")
    if attention.training and attention.dropout > 0:
        raise ValueError(
            f"attention must not drop probabilities with a prefix; it drops {attention.dropout}"
        )
    inputs = (query, key, value)
    if not attention.batch_first:
        query, key, value = (x.transpose(0, 1) for x in inputs)
    q, k, v = (
        x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x in _projected(attention, query, key, value)
    )
    mask = None if attn_mask is None else ~attn_mask if attn_mask.dtype is torch.bool else attn_mask
    if key_padding_mask is not None:
        real = ~key_padding_mask[:, None, None, :]
        if mask is None or mask.dtype is torch.bool:
            mask = real if mask is None else mask & real
        else:
            mask = mask.masked_fill(~real, float("-inf"))
    out = prefix_attention(
        q, k, v, prefix_k, prefix_v, is_causal=is_causal, attn_mask=mask, prefix_ids=prefix_ids
    )
    out = attention.out_proj(out.transpose(1, 2).flatten(2))
    return out if attention.batch_first else out.transpose(0, 1)


def _projected(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    weights: tuple[Tensor, ...] = (
        attention.q_proj_weight,
        attention.k_proj_weight,
        attention.v_proj_weight,
    )
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)
    bias = attention.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    inputs = (query, key, value)
    return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
