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
The reference is in ``_prefix_reference.py``.
"""

from __future__ import annotations

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
from peft_kernels.ops._prefix_reference import (
    bwd_fake,
    composition,
    fwd_fake,
    prefix_attention_bwd_ref,
    prefix_attention_fwd_ref,
)
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

_library.define(
    "prefix_attention_fwd",
    FWD_SCHEMA,
    reference=prefix_attention_fwd_ref,
    fake=fwd_fake,
    triton="peft_kernels.triton.prefix_attention.launch:prefix_attention_fwd",
)
_library.define(
    "prefix_attention_bwd",
    BWD_SCHEMA,
    reference=prefix_attention_bwd_ref,
    fake=bwd_fake,
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
                return composition(*inputs, *tensors[5:9], is_causal, scale)

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
    fake=fwd_fake,
    run=_run,
    apply=_PrefixAttention.apply,
    composition=composition,
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
