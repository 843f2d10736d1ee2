"""Attention with prefixes of several lengths: one op for a bank of which each has its own.

With ``p = ids[i]`` the prefix of row i, of length L_p:

    out_i = softmax(scale q_i [P_k[p, :L_p]; k_i]^T) [P_v[p, :L_p]; v_i]      p >= 0
    out_i = softmax(scale q_i k_i^T) v_i                                      p = -1

It has no gradient. A row is computed as ``prefix_attention`` computes it with its prefix alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._prefix_reference import prefix_attention_fwd_ref, rows_first
from peft_kernels.ops.prefix_attention import (
    _check_shapes,
    _check_types,
    _checked_mask,
    _unit_stride,
)

# [B, Hq, S, D], twice [B, Hkv, T, D], twice [P, Hkv, L, D], [B] int32, P numbers and, expanded,
# [B, Hq, S, T].
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor prefix_ids,"
    " int[] prefix_lengths, Tensor? mask, bool is_causal, float scale) -> Tensor"
)


def prefix_attention_lengths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    prefix_ids: Tensor,
    prefix_lengths: Sequence[int],
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float,
) -> Tensor:
    """Attention over a bank of prefixes of which each ends at its own length, on a CPU.

    Args:
        prefix_ids: ``[B]`` int32 in [-1, P).
        prefix_lengths: of each prefix, at most L; what is beyond is never read.
        q and the rest: as of :func:`peft_kernels.ops.prefix_attention`; the bank has P prefixes.
    """
    _check_shapes(q, k, v, prefix_k, prefix_v, prefix_ids)
    _check_types(q, (("k", k), ("v", v)), (("prefix_k", prefix_k), ("prefix_v", prefix_v)))
    mask = None if attn_mask is None else _checked_mask(attn_mask, q, k)
    bank = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    tensors = (_unit_stride(tensor) for tensor in (q, k, v, *bank))
    op = _library.get_op("prefix_attention_lengths", _library.variant(q.dtype))
    return op(*tensors, prefix_ids, list(prefix_lengths), mask, is_causal, scale)


def _lengths_ref(q, k, v, prefix_k, prefix_v, ids, lengths, mask, is_causal, scale):
    out = _lengths_fake(q)
    of_rows = torch.tensor([*lengths, 0], device=q.device)[ids.long()]
    for length in of_rows.unique().tolist():
        rows = (of_rows == length).nonzero()[:, 0]
        own = (tensor[rows] for tensor in (q, k, v))
        bank = prefix_k[:, :, :length], prefix_v[:, :, :length]
        seen = None if mask is None else mask[rows]
        out[rows] = prefix_attention_fwd_ref(
            *own, *bank, ids[rows], seen, None, None, is_causal, scale
        )[0]
    return out


def _lengths_fake(q, *_):
    return rows_first(q, q.shape)


_library.define(
    "prefix_attention_lengths",
    SCHEMA,
    reference=_lengths_ref,
    fake=_lengths_fake,
    triton=None,
)
