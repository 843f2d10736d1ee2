"""Which rows of a layer's input the entries of a route serve: those of the batch, or none.

A route by row has one entry for each row of the batch, or one for all; a route by token has one for
each token of each row. What a layer is given is compared with that, and with what its model was
called with: equal parts aren't guessed.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.modules.names import submodule

Ids = Sequence[str | None] | Sequence[Sequence[str | None]]


class Entries(NamedTuple):
    """The entries of a route."""

    rows: int
    tokens: int | None = None  # of each row; None where the entries are by row

    def said(self) -> str:
        if self.tokens is None:
            return f"pool.route has names for {self.rows} rows"
        return f"pool.route has names for {self.rows} x {self.tokens} tokens"


def entries_of(ids: Ids) -> tuple[list[str | None], Entries]:
    """The names of a route, one after the other, and how many; or a TypeError or ValueError."""

    def is_list(value: object) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str | bytes)

    names: list[Any] = list(ids) if is_list(ids) else [ids]
    entries = Entries(len(names))
    if is_list(ids) and any(map(is_list, names)):
        lengths = {len(row) if is_list(row) else -1 for row in names}
        if len(lengths) > 1:
            raise ValueError(f"ids by token must be lists of one length; got {ids!r}")
        entries = Entries(len(names), lengths.pop())
        names = [name for row in names for name in row]
    if not is_list(ids) or not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(f"ids must be a sequence of names and Nones, or of such; got {ids!r}")
    return names, entries


class Batch(NamedTuple):
    """What a model was called with."""

    rows: int
    lengths: frozenset[int]  # of the rows of its tensors
    is_tokens: bool  # whether that is sure: ids or embeddings, and not just any tensor

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Batch | None:
        """Of a call's arguments; None where no tensor of them has rows."""
        first = next((kwargs[x] for x in _TOKENS if isinstance(kwargs.get(x), Tensor)), None)
        tensors = [x for x in (first, *args, *kwargs.values()) if isinstance(x, Tensor)]
        tensors = [x for x in tensors if x.dim() > 1]
        if not tensors:
            return None
        is_tokens = tensors[0] is first or not tensors[0].is_floating_point()
        shape = tensors[0].shape
        if is_tokens:  # the choices of a multiple choice are rows of their own
            shape = shape[:-1] if tensors[0].is_floating_point() else shape
            rows, length = math.prod(shape[:-1]), shape[-1]
        else:
            rows, length = shape[0], shape[1]
        alike = [x.shape[1] for x in tensors if x.shape[0] == tensors[0].shape[0]]
        return cls(rows, frozenset((length, *alike)), is_tokens)


_TOKENS = ("input_ids", "inputs", "inputs_embeds")


class Place(NamedTuple):
    """A layer in its model.

    Attributes:
        name: its path.
        apart: why its input's rows can't be told from the batch's; None where they can.
        swaps: the class of a module around it whose forward swaps two dimensions 0 and 1, which may
            be rows and tokens; None where none does.
    """

    name: str = "the layer"
    apart: str | None = None
    swaps: str | None = None

    def is_unsure(self, shape: torch.Size, batch: Batch | None) -> bool:
        """Whether what looks like an input's rows may be its tokens."""
        if self.swaps is None or len(shape) < 2:
            return False
        if len(shape) > 2:
            return shape[0] == shape[1] > 1
        return batch is not None and shape[0] != batch.rows


_EXPERT = "is an expert of a mixture, which is given some of the tokens, in any order"
_SEQUENCE_FIRST = "is given [tokens, rows, features], as torch's layers without batch_first are"


def place_of(model: nn.Module, name: str) -> Place:
    """The place of a layer by its name."""
    *above, _ = name.split(".")
    kinds: list[Any] = [type(model)]
    if any("expert" in part.lower() and "shared" not in part.lower() for part in above):
        return Place(name, _EXPERT)
    module = model
    for part in above:
        module = submodule(module, part)
        attention = module._modules.get("self_attn")
        if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
            return Place(name, _SEQUENCE_FIRST)
        kinds.append(type(module))
    return Place(name, swaps=next(filter(None, map(_swaps, kinds)), None))


@cache
def _swaps(kind: Any) -> str | None:
    """The class's name, if its forward says that it swaps dimensions 0 and 1 of something."""
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return None
    return kind.__name__ if _SWAP.search(source) else None


_SWAP = re.compile(r"\.(transpose|swapaxes|swapdims)\(\s*(0, 1|1, 0)\s*\)|\.permute\(\s*\(?1, 0\b")


def is_batch_s(entries: Entries, batch: Batch, repeats: bool) -> bool:
    """Whether a batch has the rows of a route's entries.

    Args:
        repeats: whether a row may be followed by its copies, as in generate's beams.
    """
    rows, tokens = entries
    if tokens is not None:
        return rows == batch.rows and tokens in batch.lengths
    return rows in (1, batch.rows) or (repeats and rows > 0 and batch.rows % rows == 0)


def are_rows_of(entries: Entries, shape: torch.Size, batch: Batch | None, repeats: bool) -> bool:
    """Whether a layer's input ``[..., k]`` has the entries' rows, in their order.

    Three dimensions or more are ``[rows, tokens, ..., k]``; two are ``[rows, k]``, or all tokens of
    the batch on end, where what the model was called with says how many those are.
    """
    rows, tokens = entries
    if len(shape) < 2:
        return False
    if tokens is not None:
        return shape[0] == rows * tokens if len(shape) == 2 else shape[:2] == (rows, tokens)
    if len(shape) > 2:
        copies = repeats and rows > 0 and shape[0] % rows == 0
        return shape[0] == rows or (copies and (batch is None or shape[0] == batch.rows))
    if batch is None:
        return shape[0] == rows
    if not is_batch_s(entries, batch, repeats):
        return False
    return shape[0] == batch.rows or any(shape[0] == batch.rows * n for n in batch.lengths)


def unfit_batch(entries: Entries, batch: Batch) -> ValueError:
    """The error for a batch that a route's entries aren't those of."""
    lengths = " or ".join(map(str, sorted(batch.lengths)))
    tokens = "" if entries.tokens is None else f" of {lengths} tokens"
    return ValueError(
        f"{entries.said()}, and the batch has {batch.rows} rows{tokens}. A route has one name for "
        "each row, one for all, or for each row a list with a name for each token"
    )


def unfit(entries: Entries, shape: torch.Size, batch: Batch | None, place: Place) -> ValueError:
    """The error for an input that isn't the rows of a route's entries."""
    if place.apart is not None:
        return ValueError(
            f"{entries.said()}, and {place.name} {place.apart}: it can only serve one adapter to "
            "the whole batch. Route one name, split the batch, or leave the layer out of "
            "target_modules"
        )
    if place.is_unsure(shape, batch):
        return ValueError(
            f"{entries.said()}, and {place.name} got an input {list(shape)} whose rows may be its "
            f"tokens, for the forward of {place.swaps} swaps two dimensions: route one name, or "
            "give the batch rows of another length (a token of padding)"
        )
    called = "" if batch is None else f" in a batch of {batch.rows} rows"
    return ValueError(
        f"{entries.said()}, and {place.name} got an input {list(shape)}{called}. A route has one "
        "name for each row, one for all, or for each row a list with a name for each token"
    )
