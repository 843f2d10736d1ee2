"""Rows of a batch that have one number, as of one adapter, gathered and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Indices(NamedTuple):
    rows: dict[int, Tensor]  # of each number
    back: Tensor  # of each row: its place in all groups on end
    places: Tensor  # int32, of each row: the place of its number in ``present``; -1 for below 0


class RowGroups:
    """Which rows have which number: made once for the ids of a route, for all layers and devices.

    Args:
        numbers: of the rows.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = tuple(numbers)
        self.rows: dict[int, list[int]] = {}
        for row, number in enumerate(self.numbers):
            self.rows.setdefault(number, []).append(row)
        self.present = [number for number in self.rows if number >= 0]
        self._on: dict[torch.device, _Indices] = {}

    def apply(
        self, run: Callable[..., Tensor], x: Tensor, terms: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """``run(number, x, terms)`` of each number's rows; where there are several, of copies.

        Args:
            x, terms: rows first. A term that is x itself is it in each group too.
        """
        if len(self.rows) <= 1:
            return run(next(iter(self.rows), -1), x, terms)
        indices = self.indices(x.device)
        parts = [run(number, *_chosen(rows, x, terms)) for number, rows in indices.rows.items()]
        return torch.cat(parts).index_select(0, indices.back)

    def write_below_0(
        self, y: Tensor, run: Callable[..., Tensor], x: Tensor, terms: tuple[Tensor, ...] = ()
    ) -> None:
        """Writes ``run(-1, x, terms)`` of the rows numbered -1 into those of y."""
        if -1 in self.rows:
            rows = self.indices(x.device).rows[-1]
            y.index_copy_(0, rows, run(-1, *_chosen(rows, x, terms)))

    def indices(self, device: torch.device) -> _Indices:
        """The rows as tensors."""
        if torch.compiler.is_compiling():
            return self._made(device)  # compiled code may write over it at its next call
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "rows of several adapters can't be captured in a CUDA graph, which would go on "
                "with the rows of now: capture a batch whose rows all have one adapter"
            )
        found = self._on.get(device)
        if found is None:
            found = self._on[device] = self._made(device)
        return found

    @torch.inference_mode(False)
    def _made(self, device: torch.device) -> _Indices:
        order = [row for rows in self.rows.values() for row in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        places = {number: place for place, number in enumerate(self.present)}
        return _Indices(
            {number: torch.tensor(rows, device=device) for number, rows in self.rows.items()},
            torch.tensor(back, device=device),
            torch.tensor(
                [places.get(number, -1) for number in self.numbers],
                dtype=torch.int32,
                device=device,
            ),
        )


def _chosen(rows: Tensor, x: Tensor, terms: tuple[Tensor, ...]) -> tuple:
    part = x.index_select(0, rows)
    return part, tuple(part if term is x else term.index_select(0, rows) for term in terms)
