"""What soft prompts start as: rows of the model's own embeddings (Lester et al. 2021, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.modules.checks import check_size

MOST_COMMON = 5000  # Lester et al. 2021, section 3.2

Embedding = nn.Embedding | Tensor


def embed(embedding: Embedding, ids: Tensor) -> Tensor:
    """``[..., d]``, the rows of a table ``[V, d]`` or of a module that looks them up."""
    if isinstance(embedding, Tensor):
        return F.embedding(ids, embedding)
    return embedding(ids)


def vocabulary_prompt(
    embedding: Embedding,
    length: int,
    *,
    tokens: Sequence[int] | Tensor | None = None,
    counts: Sequence[float] | Tensor | None = None,
    most_common: int = MOST_COMMON,
    exclude: Sequence[int] = (),
    prompts: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The embeddings of tokens drawn from the most common ones: "sampled vocab" of the paper.

    Which are most common: those that ``counts`` has most of; else the first of ``tokens``; else
    those of the lowest ids, as vocabularies of SentencePiece and BPE are sorted.

    Args:
        embedding: ``nn.Embedding`` of the model, which is called, or its weight ``[V, d]``.
        length: soft tokens of a prompt. A prompt repeats no token unless there are fewer.
        tokens: ids, the most common first.
        counts: ``[V]``, how often each id occurs; an id that never does is left out.
        most_common: how many of the most common tokens are drawn from.
        exclude: ids that aren't drawn, e.g. ``tokenizer.all_special_ids``.
        prompts: how many prompts, each drawn by itself; None for one without that dimension.
        generator: of the random numbers, on the CPU; torch's own if None.

    Returns:
        ``[length, d]`` or ``[prompts, length, d]``, float32 or wider, on the embedding's device.

    Raises:
        ValueError: no token to draw from, both tokens and counts, an id that isn't there.
    """
    check_size("length", length)
    check_size("most_common", most_common)
    if prompts is not None:
        check_size("prompts", prompts)
    pool = _most_common(_vocabulary(embedding), tokens, counts, most_common, exclude)
    drawn = [_draw(pool, length, generator) for _ in range(1 if prompts is None else prompts)]
    return _rows(embedding, torch.stack(drawn) if prompts is not None else drawn[0])


def text_prompt(embedding: Embedding, token_ids: Sequence[int] | Tensor, length: int) -> Tensor:
    """The embeddings of a text's tokens, repeated or cut to ``length``.

    Args:
        embedding: ``nn.Embedding`` of the model, which is called, or its weight ``[V, d]``.
        token_ids: of the text, at least one.
        length: soft tokens of the prompt.

    Returns:
        ``[length, d]``, float32 or wider.

    Raises:
        ValueError: no token, an id that isn't there.
    """
    check_size("length", length)
    ids = _ids("token_ids", token_ids, _vocabulary(embedding))
    if ids.numel() == 0:
        raise ValueError("token_ids must have at least one token; got none")
    return _rows(embedding, ids.repeat(-(-length // ids.numel()))[:length])


def label_prompt(
    embedding: Embedding,
    labels: Sequence[Sequence[int]],
    length: int,
    *,
    tokens: Sequence[int] | Tensor | None = None,
    counts: Sequence[float] | Tensor | None = None,
    most_common: int = MOST_COMMON,
    exclude: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """A soft token for each class: the mean of its label's pieces; the rest are drawn.

    Args:
        embedding: ``nn.Embedding`` of the model, which is called, or its weight ``[V, d]``.
        labels: the token ids of each label; of more than ``length`` labels, the first are taken.
        length: soft tokens of the prompt.
        tokens, counts, most_common, exclude, generator: as in :func:`vocabulary_prompt`, which
            gives the soft tokens behind the labels'.

    Returns:
        ``[length, d]``, float32 or wider.

    Raises:
        ValueError: no label, one without a token, an id that isn't there.
    """
    check_size("length", length)
    if len(labels) == 0:
        raise ValueError("labels must have at least one label; got none")
    means = [
        text_prompt(embedding, pieces, max(len(pieces), 1)).mean(0) for pieces in labels[:length]
    ]
    rest = length - len(means)
    if rest == 0:
        return torch.stack(means)
    drawn = vocabulary_prompt(
        embedding,
        rest,
        tokens=tokens,
        counts=counts,
        most_common=most_common,
        exclude=exclude,
        generator=generator,
    )
    return torch.cat([torch.stack(means), drawn])


def _vocabulary(embedding: Embedding) -> int:
    if isinstance(embedding, Tensor):
        if embedding.dim() != 2:
            raise ValueError(f"embedding must be [V, d]; got shape {tuple(embedding.shape)}")
        return embedding.shape[0]
    return embedding.num_embeddings


def _ids(name: str, ids: Sequence[int] | Tensor, vocabulary: int) -> Tensor:
    """[n] int64 on the CPU."""
    found = torch.as_tensor(ids, device="cpu")
    if found.numel() == 0:
        return found.new_empty(0, dtype=torch.int64)
    if found.dim() != 1 or found.dtype.is_floating_point:
        raise ValueError(f"{name} must be a list of token ids; got {ids!r}")
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} must be in [0, {vocabulary}); got {wrong}")
    return found.long()


def _most_common(
    vocabulary: int,
    tokens: Sequence[int] | Tensor | None,
    counts: Sequence[float] | Tensor | None,
    most_common: int,
    exclude: Sequence[int],
) -> Tensor:
    if tokens is not None and counts is not None:
        raise ValueError("tokens and counts can't both be given")
    if counts is not None:
        numbers = torch.as_tensor(counts, device="cpu")
        if numbers.shape != (vocabulary,):
            shape = tuple(numbers.shape)
            raise ValueError(f"counts must have shape ({vocabulary},); got {shape}")
        order = numbers.argsort(descending=True, stable=True)
        ids = order[numbers[order] > 0]
    elif tokens is not None:
        ids = _ids("tokens", tokens, vocabulary)
    else:
        ids = torch.arange(vocabulary)
    ids = ids[~torch.isin(ids, torch.tensor([*exclude], dtype=torch.int64))][:most_common]
    if ids.numel() == 0:
        raise ValueError("tokens must leave at least one token to draw from; none is left")
    return ids


def _draw(pool: Tensor, length: int, generator: torch.Generator | None) -> Tensor:
    """Without repetition, or with it where the pool is smaller."""
    size = pool.numel()
    if size < length:
        return pool[torch.randint(size, (length,), generator=generator)]
    return pool[torch.randperm(size, generator=generator)[:length]]


def _rows(embedding: Embedding, ids: Tensor) -> Tensor:
    weight = embedding if isinstance(embedding, Tensor) else embedding.weight
    with torch.no_grad():
        rows = embed(embedding, ids.to(weight.device))
        return rows.to(torch.promote_types(rows.dtype, torch.float32))
