"""Attention with a learned prefix: ``softmax(scale q [prefix_k; k]^T) [prefix_v; v]``.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", equation 3, and
P-tuning v2 (Liu et al. 2022): L keys and values by layer that train, before those of the text. Head
h of Hq reads the keys of head h / (Hq / Hkv), as in grouped-query attention. The prefix is one for
all rows, and neither concatenated with the text nor copied for each row: two blocks of scores share
one softmax. By query:

    a = scale prefix_k q,  b = scale k q + mask              [L], [T]  -inf where it may not attend
    lse = log(sum exp(a) + sum exp(b))                       saved
    out = exp(a - lse) prefix_v + exp(b - lse) v             [D]

The backward computes the probabilities p = exp(a - lse), exp(b - lse) again:

    delta = dout . out                                       by query
    ds = scale p (dout . value - delta)                      by query and key
    dq = sum over keys of ds key
    dkey = sum over queries of ds q,  dvalue = sum over queries of p dout

where the queries of a text's key are those of its row, and the queries of a prefix's key are those
of all rows that use that prefix, summed in an order that doesn't depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._checks import (
    check_adapter,
    check_devices,
    check_float,
    check_integer,
    check_same,
)
from peft_kernels.ops._dispatch import define_call, wants_function
from peft_kernels.ops._dtypes import acc_dtype, autocast
from peft_kernels.ops._transforms import (
    gradients_of,
    has_values,
    wants_gradient_composition,
)

# prefix_k, prefix_v: a bank [P, Hkv, L, D] in q's dtype; prefix_ids int32 [B], -1 for none, or None
# where all rows use the bank's only one. mask: bool or float, expanded to [B, Hq, S, T]. starts,
# ends: int32 [B], the real text keys of a row are [start, end), and all of them where None. The
# last dimension of q, k, v, the bank and dout is contiguous.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_ids,"
    " Tensor? mask, Tensor? starts, Tensor? ends,"
)
# out [B, Hq, S, D] in q's dtype, in memory [B, S, Hq, D]; lse [B, Hq, S], float32, -inf for a query
# that sees nothing (whose out is 0).
FWD_SCHEMA = f"({_INPUTS} bool is_causal, float scale) -> (Tensor, Tensor)"
# dq, dk, dv in q's dtype, in memory [B, S, Hq, D] and [B, T, Hkv, D]; dprefix_k, dprefix_v
# [P, Hkv, L, D] in float32, contiguous. Of size 0 where not needed.
BWD_SCHEMA = (
    f"(Tensor dout, {_INPUTS} Tensor out, Tensor lse, bool is_causal, float scale, bool needs_q,"
    " bool needs_kv, bool needs_prefix) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


# ---- reference -------------------------------------------------------------------------------


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
    out = _rows_first(q, q.shape)
    out.copy_(result.view(q.shape))
    return out, lse.view(q.shape[:3])


def prefix_attention_bwd_ref(
    dout, q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, out, lse,
    is_causal, scale, needs_q, needs_kv, needs_prefix,
):  # fmt: skip
    acc, kv_heads = acc_dtype(q), k.shape[1]
    dq, dk, dv, d_prefix_k, d_prefix_v = _bwd_fake(
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
def _composition(
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


def _rows_first(like: Tensor, shape) -> Tensor:
    """[B, H, S, D] that lies in memory as [B, S, H, D], as the layers around it read and write."""
    rows, heads, queries, size = shape
    return like.new_empty(rows, queries, heads, size).transpose(1, 2)


def _fwd_fake(q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, is_causal, scale):
    return _rows_first(q, q.shape), q.new_empty(q.shape[:3], dtype=acc_dtype(q))


def _bwd_fake(
    dout, q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, out, lse,
    is_causal, scale, needs_q, needs_kv, needs_prefix,
):  # fmt: skip
    def shaped(needed: bool, shape) -> Tensor:
        return _rows_first(q, shape) if needed else q.new_empty(0)

    d_prefix = [
        q.new_empty(tensor.shape if needs_prefix else (0,), dtype=acc_dtype(q))
        for tensor in (prefix_k, prefix_v)
    ]
    return shaped(needs_q, q.shape), shaped(needs_kv, k.shape), shaped(needs_kv, v.shape), *d_prefix


_library.define(
    "prefix_attention_fwd",
    FWD_SCHEMA,
    reference=prefix_attention_fwd_ref,
    fake=_fwd_fake,
    triton="peft_kernels.triton.prefix_attention.launch:prefix_attention_fwd",
)
_library.define(
    "prefix_attention_bwd",
    BWD_SCHEMA,
    reference=prefix_attention_bwd_ref,
    fake=_bwd_fake,
    triton="peft_kernels.triton.prefix_attention.launch:prefix_attention_bwd",
)


# ---- autograd --------------------------------------------------------------------------------


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, *options):
        is_causal, scale, variant = options
        bank = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
        inputs = (q, k, v, *bank, prefix_ids, mask, starts, ends)
        fwd = _library.get_op("prefix_attention_fwd", variant)
        out, lse = fwd(*inputs, is_causal, scale)
        ctx.save_for_backward(*inputs, out, lse, prefix_k, prefix_v)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        is_causal, scale, variant = ctx.options
        needs = ctx.needs_input_grad
        *tensors, prefix_k, prefix_v = ctx.saved_tensors
        if wants_gradient_composition(dout):

            def composed(*inputs):
                return _composition(*inputs, *tensors[5:9], is_causal, scale)

            inputs = (*tensors[:3], prefix_k, prefix_v)
            return *gradients_of(composed, inputs, needs[:5], dout), *(None,) * 7
        bwd = _library.get_op("prefix_attention_bwd", variant)
        dq, dk, dv, d_prefix_k, d_prefix_v = bwd(
            _unit_stride(dout), *tensors, is_causal, scale,
            needs[0], needs[1] or needs[2], needs[3] or needs[4],
        )  # fmt: skip
        return (
            dq if needs[0] else None,
            dk if needs[1] else None,
            dv if needs[2] else None,
            d_prefix_k.to(prefix_k.dtype) if needs[3] else None,
            d_prefix_v.to(prefix_v.dtype) if needs[4] else None,
            *(None,) * 7,
        )


def _run(variant, q, k, v, prefix_k, prefix_v, *rest) -> Tensor:
    bank = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    return _library.get_op("prefix_attention_fwd", variant)(q, k, v, *bank, *rest)[0]


_call = define_call(
    "prefix_attention",
    FWD_SCHEMA,
    outputs=(0,),
    fake=_fwd_fake,
    run=_run,
    apply=_PrefixAttention.apply,
    composition=_composition,
)


# ---- public ----------------------------------------------------------------------------------


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    is_causal: bool = True,
    attn_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    padding_side: str = "right",
    scale: float | None = None,
    prefix_ids: Tensor | None = None,
) -> Tensor:
    """Attention over a learned prefix and the text, in one softmax.

    ``out_i = sum over j of softmax_j(scale q_i . [prefix_k; k]_j) [prefix_v; v]_j`` (Li and Liang
    2021, equation 3; Liu et al. 2022, P-tuning v2). Every query sees the whole prefix, which is
    neither concatenated with the keys nor copied for each row of the batch. Sums are kept in
    float32 and rounded once. The backward saves the output and one number by query; the gradient of
    a prefix is summed over the rows in a fixed order. On a GPU, and under ``backend("triton")``,
    heads of more than 256 are served by the reference, for no Triton kernel has room for them; so
    are those of more than 128 in float32 on chips with 64 KB of shared memory.

    Args:
        q: ``[B, Hq, S, D]``, float32, float16, bfloat16 or float64.
        k, v: ``[B, Hkv, T, D]`` in q's dtype, Hq a multiple of Hkv; views of a cache are read where
            they lie.
        prefix_k, prefix_v: ``[Hkv, L, D]`` for all rows, or a bank of prefixes ``[P, Hkv, L, D]``,
            in float32 or q's dtype; they are rounded to q's dtype.
        is_causal: query i is token T - S + i of the text, and sees no later key of it.
        attn_mask: over the keys of the text alone, broadcastable to ``[B, Hq, S, T]``: bool, True
            where a query may attend, or floats that are added to the scaled scores. It holds
            besides ``is_causal`` and ``lengths``, and gets no gradient.
        lengths: ``[B]``, int32 or int64, how many keys of a row's text aren't padding.
        padding_side: ``"right"``, where keys [0, length) are real, or ``"left"``, where
            [T - length, T) are.
        scale: ``1 / sqrt(D)`` when None.
        prefix_ids: ``[B]``, int32 or int64, the prefix in the bank that a row uses, and -1 for
            none; a bank of one needs none.

    Returns:
        ``[B, Hq, S, D]`` in q's dtype, or in autocast's under autocast; in memory
        ``[B, S, Hq, D]``. 0 for a query that sees nothing, which gives no gradient either.

    Raises:
        ValueError: shapes that don't fit, tensors on several devices, a mask that requires a
            gradient, lengths or ids out of range (looked at on the CPU only), a bank without ids.
        TypeError: dtypes that can't be mixed.
    """
    q, k, v = autocast(q, k, v)
    if prefix_k.dim() == 3 and prefix_v.dim() == 3:
        prefix_k, prefix_v = prefix_k.unsqueeze(0), prefix_v.unsqueeze(0)
    _check_shapes(q, k, v, prefix_k, prefix_v, prefix_ids)
    _check_types(q, (("k", k), ("v", v)), (("prefix_k", prefix_k), ("prefix_v", prefix_v)))
    if attn_mask is not None:
        attn_mask = _checked_mask(attn_mask, q, k)
    starts, ends = _bounds(lengths, padding_side, q, k)
    if prefix_ids is not None:
        _check_integers("prefix_ids", prefix_ids, q, -1, prefix_k.shape[0] - 1)
        prefix_ids = prefix_ids.to(torch.int32).contiguous()
    tensors = tuple(_unit_stride(tensor) for tensor in (q, k, v, prefix_k, prefix_v))
    options = is_causal, q.shape[-1] ** -0.5 if scale is None else float(scale)
    inputs = (*tensors, prefix_ids, attn_mask, starts, ends, *options)
    if wants_function(*inputs):
        return _PrefixAttention.apply(*inputs, _library.variant(q.dtype))
    return _call(*inputs)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _bounds(lengths, padding_side, q, k) -> tuple[Tensor | None, Tensor | None]:
    """The first real key of each row and the one after the last, or None for all."""
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right'; got {padding_side!r}")
    if lengths is None:
        return None, None
    keys = k.shape[2]
    _check_integers("lengths", lengths, q, 0, keys)
    if padding_side == "right":
        return None, lengths.to(torch.int32).contiguous()
    return (keys - lengths).to(torch.int32), None


# The checks run on every call, so a message is only put together when it is raised.
def _check_shapes(q, k, v, prefix_k, prefix_v, prefix_ids) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions; got shape {tuple(tensor.shape)}")
    rows, heads, _, size = q.shape
    kv_heads, keys = k.shape[1:3]
    if size < 1:
        raise ValueError(f"q must end in a D of at least 1; got shape {tuple(q.shape)}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"k has {kv_heads} heads, which must divide q's number of heads {heads}")
    for name, tensor in (("k", k), ("v", v)):
        expected = (rows, kv_heads, keys, size)
        if tensor.shape != expected:
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} has shape {shape}, but must be [B, Hkv, T, D] = {expected}")
    for name, tensor in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if tensor.dim() != 4 or tensor.shape[1] != kv_heads or tensor.shape[3] != size:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but must be [Hkv, L, D] or"
                f" [P, Hkv, L, D] with Hkv = {kv_heads} and D = {size}"
            )
    if prefix_v.shape != prefix_k.shape:
        shape = tuple(prefix_v.shape)
        raise ValueError(f"prefix_v has shape {shape}, but must be {tuple(prefix_k.shape)}")
    if prefix_ids is None and prefix_k.shape[0] != 1:
        raise ValueError(f"prefix_ids must be given for a bank of {prefix_k.shape[0]} prefixes")


def _check_types(q, others, prefix) -> None:
    check_float("q", q)
    check_same("q", q, others)
    check_adapter("q", q, prefix)
    check_devices("q", q, (*others, *prefix))


def _check_integers(name: str, tensor: Tensor, q: Tensor, least: int, most: int) -> None:
    check_integer(name, tensor)
    if tensor.shape != q.shape[:1]:
        shape, rows = tuple(tensor.shape), q.shape[0]
        raise ValueError(f"{name} has shape {shape}, but must be [B] = [{rows}]")
    check_devices("q", q, [(name, tensor)])
    if not has_values(tensor):
        return
    low, high = (int(bound) for bound in torch.aminmax(tensor))
    if low < least or high > most:
        raise ValueError(f"{name} must be in [{least}, {most}]; got {low if low < least else high}")


def _checked_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask, expanded to [B, Hq, S, T]."""
    if mask.dtype is not torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"attn_mask must be bool or of floats; got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError("attn_mask must not require a gradient: it gets none")
    check_devices("q", q, [("attn_mask", mask)])
    shape = (*q.shape[:3], k.shape[2])
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.dim() > 4 or any(size not in (1, full) for size, full in sizes):
        got = tuple(mask.shape)
        raise ValueError(f"attn_mask has shape {got}, but must broadcast to {shape}")
    if mask.dtype is torch.float64:
        mask = mask.to(acc_dtype(q))
    return mask.expand(shape)


# ---- example inputs, for tests and benchmarks ------------------------------------------------


def example_inputs(
    batch: int,
    seq: int,
    heads: int,
    kv_heads: int,
    dim: int,
    length: int,
    *,
    keys: int | None = None,
    prefixes: int | None = None,
    dtype: torch.dtype = torch.float32,
    prefix_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Random arguments of :func:`prefix_attention`: S = ``seq`` queries, T = ``keys`` (or S) keys.

    q, k and v lie in memory as a layer's projections give them. With ``prefixes`` there is a bank
    of so many, and the rows use them in turn, with a row without one after each turn.
    """
    keys = seq if keys is None else keys

    def text(tokens: int, number: int) -> Tensor:
        return torch.randn(batch, tokens, number, dim, device=device).to(dtype).transpose(1, 2)

    shape = (kv_heads, length, dim) if prefixes is None else (prefixes, kv_heads, length, dim)
    inputs = {"q": text(seq, heads), "k": text(keys, kv_heads), "v": text(keys, kv_heads)}
    for name in ("prefix_k", "prefix_v"):
        inputs[name] = torch.randn(shape, device=device).to(prefix_dtype or dtype)
    if prefixes is not None:
        turn = torch.arange(batch, device=device) % (prefixes + 1)
        inputs["prefix_ids"] = turn.where(turn < prefixes, -1)
    return inputs
