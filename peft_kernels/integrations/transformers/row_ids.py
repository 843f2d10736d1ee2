"""Which task each row of a call is of: what prefixes and prompts in a model share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.calls.carried import Carried, unwrap, wrap
from peft_kernels.calls.rows import Batch
from peft_kernels.nn._row_groups import RowGroups


class _Ids(NamedTuple):
    """The ids that a ``with`` block, a generation or a forward has."""

    of: str  # "block", "generate" or "call"
    ids: Tensor | None
    repeats: bool  # whether a row may be followed by its copies, as in generate's beams
    groups: dict[int, RowGroups]  # by the number of rows that they were asked for


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

    def groups_of(self, batch: int) -> RowGroups | None:
        """The rows by their ids, for a batch of so many; None where none are given.

        They are made once for what gives the ids, whatever asks.
        """
        found = self._carried.get()
        if found is None or found.ids is None:
            return None
        groups = found.groups.get(batch)
        if groups is None:
            ids = self.of_batch(batch, torch.device("cpu"))
            assert ids is not None
            groups = RowGroups(ids.tolist())
            if not torch.compiler.is_compiling():
                found.groups[batch] = groups
        return groups

    def within(self, ids: Any) -> AbstractContextManager[None]:
        """Sets the rows' ids within the block."""
        return self._carried.within(_Ids("block", self.checked(ids), False, {}))

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
        return self._carried.within(_Ids("generate", found, True, {}))

    def begin_call(self, ids: Any) -> None:
        """Sets the ids of a forward, which end with it: see ``keep_apart``.

        Args:
            ids: the forward's own; None: as set before.
        """
        own = _Ids("call", self.checked(ids), False, {})
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
        return _Ids("block", None, False, {})


def rows_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many rows a call of generate is given; None where no tensor says it."""
    batch = Batch.of(args, kwargs)
    return None if batch is None else batch.rows


# ---- of banks of adapters ------------------------------------------------------------------------

_ROWS = "_peft_kernels_adapter_rows"


def carry_rows(model: nn.Module, rows: RowIds) -> None:
    """Has the model say which rows its banks' adapters serve, and its generate repeat them."""
    model.__dict__[_ROWS] = rows
    if callable(getattr(model, "generate", None)):
        wrap(model, "generate", _generate)


def rows_in(model: nn.Module) -> RowIds | None:
    """What :func:`carry_rows` put into the model."""
    return model.__dict__.get(_ROWS)


def drop_rows(model: nn.Module) -> None:
    """Undoes :func:`carry_rows`, if it was done."""
    if model.__dict__.pop(_ROWS, None) is not None:
        unwrap(model, "generate", _generate)


def _generate(model: nn.Module, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around the model's generate: a row's copies have its adapter."""
    with model.__dict__[_ROWS].generating(None, rows_of(args, kwargs)):
        return proceed(*args, **kwargs)
