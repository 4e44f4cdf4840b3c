"""Tables for a person, as wide as the terminal: what does not fit beside goes below, and no figure is cut."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 120
"""Characters of a line where no terminal says how many it has."""
_GAP = 2


def console_for_tables() -> Console:
    """A console on stdout."""
    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else WIDE)


def print_columns(
    console: Console,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """A table whose first column says what each row is. Where the console is too narrow for all columns, those that are
    left follow as a table of their own below, with the first column again.

    rows: as long as `heads` each; styles: of the rows; title: a line above.
    """
    if title:
        console.print(title, highlight=False, soft_wrap=True)
    widths = [max(map(cell_len, column)) for column in zip(heads, *rows, strict=True)]
    for block in blocks(widths, console.width):
        table = Table(box=None, header_style="bold", pad_edge=False)
        for place in block:
            table.add_column(heads[place], justify="right" if place else "left", no_wrap=True)
        for number, row in enumerate(rows):
            cells = [row[place] for place in block]
            if any(cells[1:]) or len(block) == len(heads):
                table.add_row(*map(Text, cells), style=styles[number] if styles else None)
        _print(console, table)


def blocks(widths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the columns that stand beside each other, by table: the first in each, the others once, in order."""
    found: list[list[int]] = [[0]]
    left = room - widths[0]
    for place in range(1, len(widths)):
        needed = widths[place] + _GAP
        if needed > left and len(found[-1]) > 1:
            found.append([0])
            left = room - widths[0]
        found[-1].append(place)
        left -= needed
    return found


def _print(console: Console, table: Table) -> None:
    """Without the blanks that fill up a row's last cells, and whole where even two columns are too wide."""
    width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    options = console.options.update(width=width)
    for segments in console.render_lines(table, options, pad=False):
        line = Text.assemble(*((one.text, one.style or "") for one in segments))
        line.rstrip()
        console.print(line, highlight=False, no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)
