"""What prefixes and prompts share in a model: the rows' ids, hooks, the names of a forward's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

PREFIX_HOOK = "_prefix_hook_of"  # an attribute of the model that has a prefix
PROMPT_HOOK = "_prompt_hook_of"


class RowIds:
    """Which of several prefixes or prompts each row of a batch has.

    Args:
        argument: the name by which they are given, for errors.
        count: of prefixes or prompts.
    """

    def __init__(self, argument: str, count: int) -> None:
        self.argument, self.count = argument, count
        self.given: Tensor | None = None
        self.repeats = False  # whether a row may be followed by its copies, as in generate's beams

    def checked(self, ids: Any) -> Tensor | None:
        """The user's ids as a tensor."""
        if ids is None:
            return None
        ids = torch.as_tensor(ids)
        if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"{self.argument} must be integers [rows]; got {list(ids.shape)} of {ids.dtype}"
            )
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < self.count:
            span = f"{int(ids.min())} to {int(ids.max())}"
            raise ValueError(f"{self.argument} must be in [-1, {self.count}); got {span}")
        return ids.long()

    def check_given(self, ids: Tensor | None) -> None:
        if ids is None and self.count > 1:
            raise ValueError(
                f"{self.argument} must be given: there are {self.count} tasks, and each row has one"
            )

    def of_batch(self, batch: int, device: torch.device) -> Tensor | None:
        """``[batch]``, or None where none are given."""
        if self.given is None:
            return None
        ids, rows = self.given.to(device), self.given.shape[0]
        if self.repeats and rows and batch % rows == 0:
            ids = ids.repeat_interleave(batch // rows)
        if ids.shape[0] != batch:
            raise ValueError(
                f"{self.argument} must have one id for each of {batch} rows; got {rows}"
            )
        return ids

    @contextmanager
    def within(self, ids: Any) -> Iterator[None]:
        """Sets the rows' ids within the block."""
        outer, self.given = self.given, self.checked(ids)
        try:
            yield
        finally:
            self.given = outer

    @contextmanager
    def generating(self, ids: Any) -> Iterator[None]:
        """Within it a row's copies (beams, several sequences) have its id. None: as set before."""
        outer, self.repeats = self.repeats, True
        try:
            with self.within(self.given if ids is None else ids):
                yield
        finally:
            self.repeats = outer


def remove_hooks(module: nn.Module, functions: Collection[Callable]) -> None:
    """Takes these functions out of a module's hooks."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook in functions:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


@cache
def parameters(kind: Any) -> tuple[str, ...]:
    """The names of a module's forward's."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def takes_positions(module: Any) -> bool:
    return "position_ids" in parameters(module.__class__)


def past_length(past: Any) -> int:
    """Of a cache, or of the tuples that older models have."""
    if past is None:
        return 0
    return past.get_seq_length() if hasattr(past, "get_seq_length") else past[0][0].shape[-2]
