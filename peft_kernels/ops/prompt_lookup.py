"""Soft prompts among token embeddings: ``out[b] = [...text, prompts[task_ids[b]], text...]``.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2, with a
prompt by row as in section 3.2 of Wang et al. 2023, "Multitask Prompt Tuning"; templates that stand
among the text as in Liu et al. 2021, "GPT Understands, Too", section 3.1:

    slots of row b   positions[b] = p_0 < ... < p_{L-1}           places among L + S
    out[b, p_l]      prompts[task_ids[b], l]                      [d]; zeros where the row has none
    out[b, j]        embeddings[b, j - #{l: p_l < j}]             elsewhere: the text in its order
    mask[b, j]       1 at a slot (0 where the row has no prompt), that of the text elsewhere
    position[b, j]   max(mask[b, 0] + ... + mask[b, j] - 1, 0)
    labels[b, j]     -100 at a slot, that of the text elsewhere

    d_embeddings[b, s] = d_out[b, place of s]                     [B, S, d]
    d_prompts[p, l]    = sum over b with task_ids[b] = p of d_out[b, p_l]     [P, L, d], in fp32

It moves memory and adds: everything is bit-exact but for d_prompts, which adds the rows up in
the batch's order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._checks import check_devices, check_float, check_integer
from peft_kernels.ops._dispatch import define_call, wants_function
from peft_kernels.ops._dtypes import acc_dtype
from peft_kernels.ops._transforms import (
    has_values,
    wants_gradient_composition,
)

IGNORED = -100  # the label that losses leave out
POSITIONS = ("front", "after_bos", "after_padding")

# embeddings [B, S, d]; prompts [P, L, d], converted to their dtype; task_ids int32 [B], -1 for
# none, or None for prompt 0; positions int32 [B, L]; mask and labels int64 [B, S].
# out [B, L + S, d], its mask, positions and labels int64 [B, L + S], of size 0 without labels.
FWD_SCHEMA = (
    "(Tensor embeddings, Tensor prompts, Tensor? task_ids, Tensor positions, Tensor? mask,"
    " Tensor? labels) -> (Tensor, Tensor, Tensor, Tensor)"
)
# d_embeddings [B, S, d] in d_out's dtype, d_prompts [prompts, L, d] in float32. Of size 0 where not
# needed.
BWD_SCHEMA = (
    "(Tensor d_out, Tensor? task_ids, Tensor positions, int prompts, bool needs_embeddings,"
    " bool needs_prompts) -> (Tensor, Tensor)"
)


class PromptedInputs(NamedTuple):
    """What a model takes in place of its token ids, L soft tokens longer than the text."""

    embeddings: Tensor  # [B, L + S, d]
    attention_mask: Tensor  # [B, L + S] int64, 1 or 0
    position_ids: Tensor  # [B, L + S] int64
    labels: Tensor | None  # [B, L + S] int64


# ---- reference -------------------------------------------------------------------------------


def _slots(positions: Tensor, total: int) -> Tensor:
    """[B, L + S]: which places hold a soft token."""
    slots = positions.new_zeros(positions.shape[0], total, dtype=torch.bool)
    return slots.scatter_(1, positions.long(), True)


def _spread(text: Tensor, filler: Tensor, slots: Tensor) -> Tensor:
    """[B, L + S, ...]: text [B, S, ...] and filler [B, L, ...], each in its order."""
    out = text.new_empty(*slots.shape, *text.shape[2:])
    out[slots] = filler.flatten(0, 1).to(text.dtype)
    out[~slots] = text.flatten(0, 1)
    return out


def prompt_lookup_fwd_ref(embeddings, prompts, task_ids, positions, mask, labels):
    (batch, length), seq = positions.shape, embeddings.shape[1]
    slots = _slots(positions, length + seq)
    ids = positions.new_zeros(batch) if task_ids is None else task_ids
    rows = torch.cat([prompts, prompts.new_zeros(1, *prompts.shape[1:])])[ids.long()]
    out = _spread(embeddings, rows, slots)
    ones = slots.new_ones(batch, seq) if mask is None else mask != 0
    real = _spread(ones, (ids >= 0)[:, None].expand(batch, length), slots).long()
    position_ids = (real.cumsum(1) - 1).clamp_min(0)
    if labels is None:
        return out, real, position_ids, real.new_empty(0)
    ignored = labels.new_full((batch, length), IGNORED)
    return out, real, position_ids, _spread(labels, ignored, slots)


def prompt_lookup_bwd_ref(d_out, task_ids, positions, prompts, needs_embeddings, needs_prompts):
    (batch, length), (_, total, d) = positions.shape, d_out.shape
    d_embeddings, d_prompts = d_out.new_empty(0), d_out.new_empty(0, dtype=acc_dtype(d_out))
    slots = _slots(positions, total)
    if needs_embeddings:
        d_embeddings = d_out[~slots].view(batch, total - length, d)
    if needs_prompts:
        ids = positions.new_zeros(batch) if task_ids is None else task_ids
        keys = torch.where(ids < 0, prompts, ids)
        sums = d_prompts.new_zeros(prompts + 1, length, d)
        rows = d_out[slots].view(batch, length, d).to(sums.dtype)
        for b in range(batch):  # one at a time: index_add_ of several has no order on a GPU
            sums.index_add_(0, keys[b : b + 1], rows[b : b + 1])
        d_prompts = sums[:prompts].clone()
    return d_embeddings, d_prompts


@_library.outside_autocast
def _composition(embeddings, prompts, task_ids, positions, mask, labels) -> tuple[Tensor, ...]:
    """Every place reads its row of [prompt; text]."""
    (batch, length), (_, seq, d) = positions.shape, embeddings.shape
    slots = (positions[:, :, None] == torch.arange(length + seq, device=positions.device)).any(1)
    source = torch.where(slots, slots.cumsum(1) - 1, length + (~slots).cumsum(1) - 1)
    ids = positions.new_zeros(batch) if task_ids is None else task_ids
    has_prompt = ids >= 0
    own = prompts.to(acc_dtype(prompts))[ids.clamp_min(0).long()]
    own = own.masked_fill(~has_prompt[:, None, None], 0.0).to(embeddings.dtype)

    def spread(filler: Tensor, text: Tensor) -> Tensor:
        return torch.cat([filler, text], 1).gather(1, source)

    index = source[:, :, None].expand(batch, length + seq, d)
    out = torch.cat([own, embeddings], 1).gather(1, index)
    ones = torch.ones_like(embeddings[:, :, 0], dtype=torch.int64)
    real = spread(has_prompt.long()[:, None].expand(batch, length), ones if mask is None else mask)
    real = (real != 0).long()
    position_ids = (real.cumsum(1) - 1).clamp_min(0)
    if labels is None:
        return out, real, position_ids, real.new_empty(0)
    return out, real, position_ids, spread(labels.new_full((batch, length), IGNORED), labels)


def _gradient_composition(d_out, task_ids, positions, prompts) -> tuple[Tensor, Tensor]:
    """d_embeddings and d_prompts, by a function of d_out that is differentiable."""
    (batch, length), (_, total, d) = positions.shape, d_out.shape
    slots = (positions[:, :, None] == torch.arange(total, device=positions.device)).any(1)
    places = slots.to(torch.uint8).argsort(stable=True, dim=1)  # of the text, then of the prompt
    text, prompt = d_out.gather(1, places[:, :, None].expand(batch, total, d)).split(
        [total - length, length], 1
    )
    ids = positions.new_zeros(batch) if task_ids is None else task_ids
    rows = prompt.to(acc_dtype(d_out)).masked_fill((ids < 0)[:, None, None], 0.0)
    sums = rows.new_zeros(prompts, length, d)
    return text, sums.index_add(0, ids.clamp_min(0).long(), rows)


# ---- shapes ----------------------------------------------------------------------------------


def _fwd_fake(embeddings, prompts, task_ids, positions, mask, labels):
    batch, seq, d = embeddings.shape
    total = positions.shape[1] + seq
    mask, position_ids = (embeddings.new_empty(batch, total, dtype=torch.int64) for _ in range(2))
    out_labels = mask.new_empty((0,) if labels is None else (batch, total))
    return embeddings.new_empty(batch, total, d), mask, position_ids, out_labels


def _bwd_fake(d_out, task_ids, positions, prompts, needs_embeddings, needs_prompts):
    (batch, length), (_, total, d) = positions.shape, d_out.shape
    return (
        d_out.new_empty((batch, total - length, d) if needs_embeddings else (0,)),
        d_out.new_empty((prompts, length, d) if needs_prompts else (0,), dtype=acc_dtype(d_out)),
    )


_library.define(
    "prompt_lookup_fwd",
    FWD_SCHEMA,
    reference=prompt_lookup_fwd_ref,
    fake=_fwd_fake,
    triton="peft_kernels.triton.prompt_lookup.launch:prompt_lookup_fwd",
    cuda=True,
)
_library.define(
    "prompt_lookup_bwd",
    BWD_SCHEMA,
    reference=prompt_lookup_bwd_ref,
    fake=_bwd_fake,
    triton="peft_kernels.triton.prompt_lookup.launch:prompt_lookup_bwd",
    cuda=True,
)


# ---- autograd --------------------------------------------------------------------------------


class _PromptLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, prompts, task_ids, positions, mask, labels, front, variant):
        fwd = _library.get_op("prompt_lookup_fwd", variant)
        out, *integers = fwd(embeddings, prompts, task_ids, positions, mask, labels)
        ctx.save_for_backward(task_ids, positions)
        ctx.options = (prompts.shape[0], prompts.dtype, front, variant)
        ctx.mark_non_differentiable(*integers)
        return out, *integers

    @staticmethod
    def backward(ctx, d_out, *_):
        task_ids, positions = ctx.saved_tensors
        prompts, dtype, front, variant = ctx.options
        needs_embeddings, needs_prompts, *_ = ctx.needs_input_grad
        if wants_gradient_composition(d_out):
            text, sums = _gradient_composition(d_out, task_ids, positions, prompts)
            d_prompts = sums.to(dtype) if needs_prompts else None
            return text if needs_embeddings else None, d_prompts, *(None,) * 6
        gathers = needs_embeddings and not front
        d_embeddings = d_prompts = None
        if gathers or needs_prompts:
            bwd = _library.get_op("prompt_lookup_bwd", variant)
            d_embeddings, d_prompts = bwd(
                d_out, task_ids, positions, prompts, gathers, needs_prompts
            )
        if needs_embeddings and front:  # the end of each row, where it lies
            d_embeddings = d_out[:, positions.shape[1] :]
        return (
            d_embeddings if needs_embeddings else None,
            d_prompts.to(dtype) if needs_prompts else None,
            *(None,) * 6,
        )


def _apply(*arguments) -> tuple[Tensor, ...]:
    *inputs, variant = arguments
    return _PromptLookup.apply(*inputs, False, variant)


_call = define_call(
    "prompt_lookup",
    FWD_SCHEMA,
    outputs=(0, 1, 2, 3),
    fake=_fwd_fake,
    apply=_apply,
    composition=_composition,
)


# ---- public ----------------------------------------------------------------------------------


def prompt_lookup(
    embeddings: Tensor,
    prompts: Tensor,
    task_ids: Tensor | None = None,
    *,
    position: str | Tensor = "front",
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> PromptedInputs:
    """Puts each row's soft prompt among its token embeddings, in one pass.

    ``out[b] = [prompts[task_ids[b]]; embeddings[b]]`` with ``position="front"`` (Lester et al.
    2021, section 2); the mask, the position ids and the labels are lengthened along with it.

    Args:
        embeddings: ``[B, S, d]``, float32, float16, bfloat16 or float64, any strides.
        prompts: ``[P, L, d]``, or one ``[L, d]``, of any of these dtypes; converted to that of
            the embeddings. The gradient keeps the dtype of the prompts, adds the rows up in the
            batch's order in float32, and is the same on every repetition.
        task_ids: ``[B]`` int32 or int64, which prompt each row has; -1 for a row without one, whose
            L slots hold zeros and are masked out. May be None for a single prompt.
        position: where the prompt stands. ``"front"``: before everything, padding too;
            ``"after_bos"``: after the first real token; ``"after_padding"``: directly before
            it (a row without real tokens counts its first as real). Or a tensor ``[L]`` or
            ``[B, L]``, int32 or int64, of strictly increasing places in [0, L + S): the text fills
            the others in its order.
        attention_mask: ``[B, S]``, bool or integer, 0 for padding; all ones if None.
        labels: ``[B, S]``, integer; the prompt's are -100.

    Returns:
        Embeddings ``[B, L + S, d]`` in their dtype; attention_mask, position_ids
        ``cumsum(mask) - 1`` (0 in front of the first real token) and labels (None without), int64
        ``[B, L + S]``.

    Raises:
        ValueError: shapes that don't fit, several prompts without task_ids, an unknown position,
            tensors on several devices; on a CPU and outside of torch.compile, a task id or a
            place that isn't there. On a GPU, which nothing here waits for, a row with such an id
            has no prompt, and a place that the positions leave without a source holds zeros.
        TypeError: dtypes other than these.
    """
    prompts = prompts.unsqueeze(0) if prompts.dim() == 2 else prompts
    _check(embeddings, prompts, task_ids, attention_mask, labels)
    if prompts.dtype not in (embeddings.dtype, torch.float32):
        prompts = prompts.to(embeddings.dtype)
    inputs = (
        embeddings,
        prompts,
        None if task_ids is None else task_ids.to(torch.int32),
        slot_positions(embeddings, prompts.shape[1], position, attention_mask),
        None if attention_mask is None else attention_mask.to(torch.int64),
        None if labels is None else labels.to(torch.int64),
    )
    if wants_function(*inputs):
        front = isinstance(position, str) and position == "front"
        found = _PromptLookup.apply(*inputs, front, _library.variant(embeddings.dtype))
    else:
        found = _call(*inputs)
    prompted, mask, position_ids, out_labels = found
    return PromptedInputs(prompted, mask, position_ids, None if labels is None else out_labels)


def slot_positions(
    embeddings: Tensor, length: int, position: str | Tensor, mask: Tensor | None
) -> Tensor:
    """The places of the soft tokens, int32 ``[B, L]``, of :func:`prompt_lookup`'s ``position``."""
    (batch, seq, _), device = embeddings.shape, embeddings.device
    if isinstance(position, Tensor):
        _check_positions(embeddings, length, position)
        return position.to(torch.int32).expand(batch, length)
    if position not in POSITIONS:
        raise ValueError(
            f"position must be one of {', '.join(POSITIONS)} or a tensor; got {position!r}"
        )
    places = torch.arange(length, dtype=torch.int32, device=device).expand(batch, length)
    if position == "front" or seq == 0:
        return places
    after = position == "after_bos"
    if mask is None:
        return places + 1 if after else places
    first = (mask != 0).to(torch.int32).argmax(1, keepdim=True).to(torch.int32)
    return places + (first + 1 if after else first)


# The checks run on every call, so a message is only put together when it is raised.
def _check(embeddings, prompts, task_ids, mask, labels) -> None:
    if embeddings.dim() != 3:
        raise ValueError(f"embeddings must be [B, S, d]; got shape {tuple(embeddings.shape)}")
    batch, seq, d = embeddings.shape
    if prompts.dim() != 3 or prompts.shape[2] != d or prompts.shape[0] < 1:
        shape = tuple(prompts.shape)
        raise ValueError(f"prompts must be [P, L, {d}] with P >= 1, or [L, {d}]; got shape {shape}")
    if task_ids is None and prompts.shape[0] != 1:
        raise ValueError(f"task_ids must be given to choose among {prompts.shape[0]} prompts")
    for name, tensor in (("embeddings", embeddings), ("prompts", prompts)):
        check_float(name, tensor)
    for name, tensor, shape in (
        ("task_ids", task_ids, (batch,)),
        ("attention_mask", mask, (batch, seq)),
        ("labels", labels, (batch, seq)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
        if tensor is not mask:
            check_integer(name, tensor)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            raise TypeError(f"{name} must be bool or an integer; got {tensor.dtype}")
        check_devices("the embeddings", embeddings, [(name, tensor)])
    check_devices("the embeddings", embeddings, [("prompts", prompts)])
    if task_ids is not None and has_values(task_ids):
        low, high = (bound.item() for bound in torch.aminmax(task_ids))
        if low < -1 or high >= prompts.shape[0]:
            wrong = low if low < -1 else high
            raise ValueError(f"task_ids must be in [-1, {prompts.shape[0]}); got {wrong}")


def _check_positions(embeddings: Tensor, length: int, positions: Tensor) -> None:
    batch, total = embeddings.shape[0], length + embeddings.shape[1]
    if tuple(positions.shape) not in ((length,), (batch, length)):
        raise ValueError(
            f"position must be [{length}] or [{batch}, {length}], a place for each soft token; "
            f"got shape {tuple(positions.shape)}"
        )
    check_integer("position", positions)
    check_devices("the embeddings", embeddings, [("position", positions)])
    if not has_values(positions):
        return
    low, high = (bound.item() for bound in torch.aminmax(positions))
    if low < 0 or high >= total:
        raise ValueError(f"position must be in [0, {total}); got {low if low < 0 else high}")
    if (positions.diff() <= 0).any():
        raise ValueError(f"position must be strictly increasing; got {positions.tolist()}")


# ---- example inputs, for tests and benchmarks ------------------------------------------------


def example_inputs(
    batch: int,
    seq: int,
    dim: int,
    length: int,
    prompts: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    prompt_dtype: torch.dtype | None = None,
    padding: str | None = "left",
    labels: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Random arguments of :func:`prompt_lookup`, at the scale of word embeddings.

    With several prompts, rows without one among them; with padding, rows of 1 to ``seq`` tokens.
    """
    shapes = {"embeddings": (batch, seq, dim), "prompts": (prompts, length, dim)}
    dtypes = {"embeddings": dtype, "prompts": prompt_dtype or dtype}
    inputs = {
        name: (torch.randn(shape, device=device) * 0.02).to(dtypes[name])
        for name, shape in shapes.items()
    }
    if prompts > 1:
        inputs["task_ids"] = torch.randint(-1, prompts, (batch,), device=device)
    if padding is not None:
        lengths = torch.randint(1, max(seq, 1) + 1, (batch, 1), device=device)
        places = torch.arange(seq, device=device)
        real = places >= seq - lengths if padding == "left" else places < lengths
        inputs["attention_mask"] = real.long()
    if labels:
        inputs["labels"] = torch.randint(0, 1000, (batch, seq), device=device)
    return inputs
