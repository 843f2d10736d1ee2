"""Tables in which nothing is cut, in a terminal of any width and in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

WITHOUT_TERMINAL = 1000  # columns where nothing is shown, such as in a pipe
BORDER = 3  # columns beside the content of each column of a table; and one at the end


def console_for(*, stderr: bool = False) -> Console:
    """A console as wide as its terminal, or ``COLUMNS``; without either as wide as its tables."""
    stream = sys.stderr if stderr else sys.stdout
    shown = stream.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(stderr=stderr, width=None if shown else WITHOUT_TERMINAL)


def show(console: Console, table: Table) -> None:
    """Prints ``table`` with all of its words whole.

    Cells are wrapped at their spaces. Columns that don't fit the console even so follow in further
    tables, each of which begins with the first column.
    """
    for part in _parts(console, table):
        console.print(part)


def _parts(console: Console, table: Table) -> Iterator[Table]:
    sizes = [_sizes(console, column) for column in table.columns]
    label = sizes[0].maximum + BORDER + 1
    chosen, used = [0], label
    for index in range(1, len(sizes)):
        needed = sizes[index].minimum + BORDER
        if used + needed > console.width and len(chosen) > 1:
            yield _part(table, chosen, sizes, console.width)
            chosen, used = [0], label
        chosen.append(index)
        used += needed
    yield _part(table, chosen, sizes, console.width)


def _sizes(console: Console, column: Column) -> Measurement:
    """The longest word, and the longest cell, of a column and its heading."""
    unlimited = console.options.update_width(WITHOUT_TERMINAL)
    found = [Measurement.get(console, unlimited, cell) for cell in (column.header, *column.cells)]
    longest = max(size.maximum for size in found)
    return Measurement(longest if column.no_wrap else max(s.minimum for s in found), longest)


def _part(table: Table, chosen: list[int], sizes: list[Measurement], width: int) -> Table:
    """The table of the chosen columns; what is left of the width goes to the first ones."""
    part = Table(title=table.title, title_justify=table.title_justify, caption=table.caption)
    part.show_header = table.show_header
    least = [sizes[0].maximum, *(sizes[i].minimum for i in chosen[1:])]
    left = max(0, width - 1 - sum(least) - BORDER * len(least))
    for index, size in zip(chosen, least, strict=True):
        column = table.columns[index]
        more = min(left, sizes[index].maximum - size)
        left -= more
        part.add_column(column.header, justify=column.justify, width=size + more, overflow="fold")
    cells = [list(table.columns[index].cells) for index in chosen]
    for row, values in zip(table.rows, zip(*cells, strict=True), strict=True):
        part.add_row(*values, style=row.style, end_section=row.end_section)
    return part
