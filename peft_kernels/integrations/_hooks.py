"""What prefixes and prompts share in a model: the rows' ids, hooks, the names of a forward's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels._calls import Carried
from peft_kernels._rows import Batch

PREFIX_HOOK = "_prefix_hook_of"  # an attribute of the model that has a prefix
PROMPT_HOOK = "_prompt_hook_of"


class _Ids(NamedTuple):
    """The ids that a ``with`` block, a generation or a forward has."""

    of: str  # "block", "generate" or "call"
    ids: Tensor | None
    repeats: bool  # whether a row may be followed by its copies, as in generate's beams


class RowIds:
    """Which of several prefixes or prompts each row of a batch has.

    They belong to the call. A forward has those it is given, else those of the generation it is a
    step of, else those of the ``with`` block around it; a forward inside another's, as a hook runs
    one, has none of the other's.

    Args:
        argument: the name by which they are given, for errors.
        count: of prefixes or prompts.
    """

    def __init__(self, argument: str, count: int) -> None:
        self.argument, self.count = argument, count
        self._carried: Carried[_Ids] = Carried(f"the with block of {argument}")

    def checked(self, ids: Any) -> Tensor | None:
        """The user's ids as a tensor."""
        if ids is None:
            return None
        try:
            ids = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{self.argument} must be integers [rows]; got {ids!r}") from error
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

    @property
    def given(self) -> Tensor | None:
        """The running call's."""
        found = self._carried.get()
        return None if found is None else found.ids

    def of_batch(self, batch: int, device: torch.device) -> Tensor | None:
        """``[batch]``, or None where none are given."""
        found = self._carried.get()
        if found is None or found.ids is None:
            return None
        ids, rows = found.ids.to(device), found.ids.shape[0]
        if found.repeats and rows and batch % rows == 0:
            ids = ids.repeat_interleave(batch // rows)
        if ids.shape[0] != batch:
            raise ValueError(
                f"{self.argument} must have one id for each of {batch} rows; got {rows}"
            )
        return ids

    def within(self, ids: Any) -> AbstractContextManager[None]:
        """Sets the rows' ids within the block."""
        return self._carried.within(_Ids("block", self.checked(ids), False))

    def generating(self, ids: Any, rows: int | None) -> AbstractContextManager[None]:
        """Within it a row's copies (beams, several sequences) have its id.

        Args:
            ids: None: as set before.
            rows: of what is generated from, whose number the ids must have; None: not known.
        """
        found = self._outside().ids if ids is None else self.checked(ids)
        if found is not None and rows not in (None, found.shape[0]):
            raise ValueError(
                f"{self.argument} must have one id for each of {rows} rows; got {found.shape[0]}"
            )
        return self._carried.within(_Ids("generate", found, True))

    def begin_call(self, ids: Any) -> None:
        """Sets the ids of a forward, which end with it: see :func:`peft_kernels._calls.keep_apart`.

        Args:
            ids: the forward's own; None: as set before.
        """
        own = _Ids("call", self.checked(ids), False)
        outside = self._outside()
        self._carried.push(own if ids is not None else outside._replace(of="call"))

    def _outside(self) -> _Ids:
        """Those that a new call has unless it's given its own."""
        is_inside = False
        for frame in reversed(self._carried.frames()):
            found = frame.value
            if found is None:
                self._carried.get()  # says that the block has ended
            elif found.of == "block" or (found.of == "generate" and not is_inside):
                return found
            else:
                is_inside = True
        return _Ids("block", None, False)


def rows_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many rows a call of generate is given; None where no tensor says it."""
    batch = Batch.of(args, kwargs)
    return None if batch is None else batch.rows


def remove_hooks(module: nn.Module, functions: Collection[Callable]) -> None:
    """Takes these functions out of a module's hooks."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook in functions:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def forget_compiled() -> None:
    """Has torch.compile look at all modules anew.

    It doesn't guard their hooks: code that was compiled before would run on without those that
    came since, and with those that went.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@cache
def parameters(kind: Any) -> tuple[str, ...]:
    """The names of a module's forward's."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


@cache
def needs_tokens(kind: Any) -> bool:
    """Whether a module's forward can't be called without input_ids."""
    asked = inspect.signature(kind.forward).parameters.get("input_ids")
    return asked is not None and asked.default is asked.empty


def takes_positions(module: Any) -> bool:
    return "position_ids" in parameters(module.__class__)


def past_length(past: Any) -> int:
    """Of a cache, or of the tuples that older models have."""
    if past is None:
        return 0
    return past.get_seq_length() if hasattr(past, "get_seq_length") else past[0][0].shape[-2]
