"""Which pages and slots of an adapter pool are free: bookkeeping alone, in pure Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class PoolFullError(RuntimeError):
    """An adapter doesn't fit into what is free.

    Attributes:
        layer: the first layer that has too few pages; None when it is slots that are short.
    """

    def __init__(self, message: str, layer: str | None) -> None:
        super().__init__(message)
        self.layer = layer


class FreePages:
    """The free pages of one layer.

    Scattered pages are taken from the low end and runs from the high end, which keeps runs whole.
    """

    def __init__(self, count: int) -> None:
        self._pages = list(range(count - 1, -1, -1))  # descending

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self):
        return iter(self._pages)

    def copy(self) -> FreePages:
        twin = FreePages(0)
        twin._pages = self._pages.copy()
        return twin

    def take(self, count: int) -> tuple[int, ...] | None:
        """The lowest pages, ascending; None if there are too few."""
        if count > len(self._pages):
            return None
        first = len(self._pages) - count
        taken = tuple(reversed(self._pages[first:]))
        del self._pages[first:]
        return taken

    def take_run(self, count: int) -> tuple[int, ...] | None:
        """The highest pages that follow one another, ascending; None if there is no such run."""
        for first in range(len(self._pages) - count + 1):
            run = self._pages[first : first + count]
            if not run or run[0] - run[-1] == count - 1:
                del self._pages[first : first + count]
                return tuple(reversed(run))
        return None

    def give(self, pages: Iterable[int]) -> None:
        self._pages.extend(pages)
        self._pages.sort(reverse=True)


class Placement(NamedTuple):
    """Where an adapter lies: its slot, and its pages in each layer that it adapts."""

    slot: int
    pages: Mapping[str, tuple[int, ...]]


class PageBook:
    """The free slots, and the free pages of every layer.

    Args:
        layers: their names.
        pages: how many each of them has.
        slots: how many adapters fit at most.
    """

    def __init__(self, layers: Iterable[str], pages: int, slots: int) -> None:
        self.page_count, self.slot_count = pages, slots
        self.free = {layer: FreePages(pages) for layer in layers}
        self.free_slots = FreePages(slots)

    def copy(self) -> PageBook:
        """A book to try changes in."""
        twin = PageBook((), self.page_count, 0)
        twin.slot_count = self.slot_count
        twin.free = {layer: free.copy() for layer, free in self.free.items()}
        twin.free_slots = self.free_slots.copy()
        return twin

    def place(self, name: str, counts: Mapping[str, int], *, runs: bool = False) -> Placement:
        """Takes a slot, and as many pages in each layer as ``counts`` says.

        Args:
            name: the adapter's, for messages.
            counts: pages by layer.
            runs: each layer's pages must follow one another.

        Raises:
            PoolFullError: a layer, or the slots, don't have them. Nothing is taken then.
        """
        slot = self.free_slots.take(1)
        if slot is None:
            raise PoolFullError(
                f"the pool is full: all of its {self.slot_count} adapters (max_adapters) are "
                f"there, so {name!r} has no place: attach with a larger capacity or max_adapters, "
                "or unload one",
                None,
            )
        pages: dict[str, tuple[int, ...]] = {}
        for layer, count in counts.items():
            free = self.free[layer]
            taken = free.take_run(count) if runs else free.take(count)
            if taken is None:
                self.give(Placement(slot[0], pages))
                together = " that follow one another" if runs and count <= len(free) else ""
                raise PoolFullError(
                    f"the pool is full: {name!r} needs {count} pages of 8 rank rows{together} in "
                    f"{layer}, where {len(free)} of {self.page_count} are free",
                    layer,
                )
            pages[layer] = taken
        return Placement(slot[0], pages)

    def give(self, placement: Placement) -> None:
        """Takes back what :meth:`place` gave."""
        self.free_slots.give((placement.slot,))
        for layer, pages in placement.pages.items():
            self.free[layer].give(pages)
