"""The reference of ``prefix_attention`` in PyTorch, prefix by prefix, and its shapes.

The maths is at the head of ``prefix_attention.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._dtypes import acc_dtype


def _grouped(tensor: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, S, X] as [B, Hkv, G S, X]: the heads that share keys are more queries of one."""
    rows, heads, queries, size = tensor.shape
    return tensor.reshape(rows, kv_heads, heads // kv_heads * queries, size)


def _folded(tensor: Tensor) -> Tensor:
    """[B, Hkv, G S, X] as [Hkv, B G S, X]: all rows' queries of a prefix."""
    return tensor.transpose(0, 1).flatten(1, 2)


def _unfolded(tensor: Tensor, rows: int) -> Tensor:
    return tensor.unflatten(1, (rows, tensor.shape[1] // max(rows, 1))).transpose(0, 1)


def _rows_by_prefix(prefix_ids: Tensor | None) -> Iterator[tuple[int, slice | Tensor]]:
    """Each prefix that is used, and the rows that use it."""
    if prefix_ids is None:
        yield 0, slice(None)
        return
    for prefix in prefix_ids.unique().tolist():
        if prefix >= 0:
            yield prefix, (prefix_ids == prefix).nonzero()[:, 0]


def _prefix_product(queries: Tensor, bank: Tensor, prefix_ids: Tensor | None, fill: float):
    """queries [B, Hkv, N, X] by each row's own of bank [P, Hkv, X, Y]; ``fill`` without one."""
    out = queries.new_full((*queries.shape[:3], bank.shape[3]), fill)
    for prefix, rows in _rows_by_prefix(prefix_ids):
        chosen = queries[rows]
        if chosen.numel():
            out[rows] = _unfolded(_folded(chosen) @ bank[prefix], chosen.shape[0])
    return out


def _prefix_gradient(left: Tensor, right: Tensor, bank: Tensor, prefix_ids: Tensor | None):
    """[P, Hkv, L, D]: left^T right, summed over the queries of all rows that use a prefix."""
    out = torch.zeros_like(bank, memory_format=torch.contiguous_format)
    for prefix, rows in _rows_by_prefix(prefix_ids):
        out[prefix] = _folded(left[rows]).mT @ _folded(right[rows])
    return out


def _visible(q: Tensor, k: Tensor, mask, starts, ends, is_causal: bool) -> Tensor | None:
    """What is added to the scores of the text, [B or 1, Hq or 1, S or 1, T]: 0 or -inf, or mask."""
    queries, keys = q.shape[2], k.shape[2]
    key = torch.arange(keys, device=q.device)
    seen = []
    if is_causal:
        seen.append(key <= torch.arange(queries, device=q.device)[:, None] + (keys - queries))
    if starts is not None:
        seen.append(key >= starts[:, None, None, None])
    if ends is not None:
        seen.append(key < ends[:, None, None, None])
    bias = None
    if mask is not None and mask.dtype is torch.bool:
        seen.append(mask)
    elif mask is not None:
        bias = mask.to(acc_dtype(q))
    for allowed in seen:
        zero = torch.zeros((), dtype=acc_dtype(q), device=q.device)
        bias = (zero if bias is None else bias).masked_fill(~allowed, float("-inf"))
    return bias


def _scores(q, k, prefix_k, prefix_ids, mask, starts, ends, is_causal, scale):
    """q by kv head, scores with the prefix and with the text: [B, Hkv, G S, D or L or T]."""
    acc, kv_heads = acc_dtype(q), k.shape[1]
    wide = _grouped(q.to(acc), kv_heads) * scale
    prefix = _prefix_product(wide, prefix_k.to(acc).mT, prefix_ids, float("-inf"))
    text = wide @ k.to(acc).mT
    bias = _visible(q, k, mask, starts, ends, is_causal)
    if bias is not None:
        text += _grouped(bias.expand(*q.shape[:3], k.shape[2]), kv_heads)
    return wide, prefix, text


def _probabilities(prefix: Tensor, text: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """exp(scores - lse) of both, and 0 for a query that sees nothing.

    Beside a mask of the lowest float an lse is the largest score alone, so the sum is divided out.
    """
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    parts = torch.exp(prefix - lse), torch.exp(text - lse)
    total = parts[0].sum(-1, keepdim=True) + parts[1].sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)
    return parts[0] / total, parts[1] / total


def prefix_attention_fwd_ref(
    q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, is_causal, scale
):
    acc = acc_dtype(q)
    _, prefix, text = _scores(q, k, prefix_k, prefix_ids, mask, starts, ends, is_causal, scale)
    lse = torch.logaddexp(prefix.logsumexp(-1, True), text.logsumexp(-1, True))
    p_prefix, p_text = _probabilities(prefix, text, lse)
    result = p_text @ v.to(acc)
    result += _prefix_product(p_prefix, prefix_v.to(acc), prefix_ids, 0.0)
    out = rows_first(q, q.shape)
    out.copy_(result.view(q.shape))
    return out, lse.view(q.shape[:3])


def prefix_attention_bwd_ref(
    dout, q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, out, lse,
    is_causal, scale, needs_q, needs_kv, needs_prefix,
):  # fmt: skip
    acc, kv_heads = acc_dtype(q), k.shape[1]
    dq, dk, dv, d_prefix_k, d_prefix_v = bwd_fake(
        dout, q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, out, lse,
        is_causal, scale, needs_q, needs_kv, needs_prefix,
    )  # fmt: skip
    wide, prefix, text = _scores(q, k, prefix_k, prefix_ids, mask, starts, ends, is_causal, scale)
    lse = _grouped(lse.unsqueeze(-1), kv_heads)
    p_prefix, p_text = _probabilities(prefix, text, lse)
    grad = _grouped(dout.to(acc), kv_heads)
    delta = (grad * _grouped(out.to(acc), kv_heads)).sum(-1, keepdim=True)
    values = _prefix_product(grad, prefix_v.to(acc).mT, prefix_ids, 0.0)
    ds_prefix, ds_text = p_prefix * (values - delta), p_text * (grad @ v.to(acc).mT - delta)
    if needs_q:
        grad_q = ds_text @ k.to(acc)
        grad_q += _prefix_product(ds_prefix, prefix_k.to(acc), prefix_ids, 0.0)
        dq.copy_((grad_q * scale).view(q.shape))
    if needs_kv:
        dk.copy_(ds_text.mT @ wide)
        dv.copy_(p_text.mT @ grad)
    if needs_prefix:
        d_prefix_k = _prefix_gradient(ds_prefix, wide, d_prefix_k, prefix_ids)
        d_prefix_v = _prefix_gradient(p_prefix, grad, d_prefix_v, prefix_ids)
    return dq, dk, dv, d_prefix_k, d_prefix_v


@_library.outside_autocast
def composition(
    q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, is_causal, scale
) -> Tensor:
    """Each row with a copy of its prefix before its text."""
    acc, (rows, heads, queries, _) = acc_dtype(q), q.shape

    def joined(prefix: Tensor, text: Tensor) -> Tensor:
        own = prefix.to(q.dtype).to(acc)
        if prefix_ids is None:
            chosen = own.expand(rows, -1, -1, -1)
        else:
            chosen = own[prefix_ids.clamp_min(0).long()]
        return torch.cat([chosen, text.to(acc)], 2).repeat_interleave(heads // k.shape[1], 1)

    scores = (q.to(acc) * scale) @ joined(prefix_k, k).mT
    length = prefix_k.shape[2]
    seen = _visible(q, k, mask, starts, ends, is_causal)
    if seen is not None or prefix_ids is not None:
        before = scores.new_zeros(rows, 1, 1, length)
        if prefix_ids is not None:
            before = before.masked_fill((prefix_ids < 0)[:, None, None, None], float("-inf"))
        text = scores.new_zeros(1, 1, 1, k.shape[2]) if seen is None else seen
        parts = (before, length), (text, k.shape[2])
        full = [part.expand(rows, heads, queries, size) for part, size in parts]
        scores = scores + torch.cat(full, -1)
    # A constant to subtract; a query that sees nothing has weights of 0.
    largest = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - largest.masked_fill(largest == float("-inf"), 0.0))
    total = weights.sum(-1, keepdim=True)
    out = (weights / total.masked_fill(total == 0, 1.0)) @ joined(prefix_v, v)
    return out.transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format).transpose(1, 2)


# ---- shapes ----------------------------------------------------------------------------------


def rows_first(like: Tensor, shape) -> Tensor:
    """[B, H, S, D] that lies in memory as [B, S, H, D], as the layers around it read and write."""
    rows, heads, queries, size = shape
    return like.new_empty(rows, queries, heads, size).transpose(1, 2)


def fwd_fake(q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, is_causal, scale):
    return rows_first(q, q.shape), q.new_empty(q.shape[:3], dtype=acc_dtype(q))


def bwd_fake(
    dout, q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, out, lse,
    is_causal, scale, needs_q, needs_kv, needs_prefix,
):  # fmt: skip
    def shaped(needed: bool, shape) -> Tensor:
        return rows_first(q, shape) if needed else q.new_empty(0)

    d_prefix = [
        q.new_empty(tensor.shape if needs_prefix else (0,), dtype=acc_dtype(q))
        for tensor in (prefix_k, prefix_v)
    ]
    return shaped(needs_q, q.shape), shaped(needs_kv, k.shape), shaped(needs_kv, v.shape), *d_prefix
