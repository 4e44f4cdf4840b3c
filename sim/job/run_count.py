"""How many runs of a sweep have ended: a line on a terminal, drawn by the process that started them."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_ERASE = "\r\x1b[K"
_STDOUT, _STDERR = 1, 2
_counts: list[Count] = []
"""Of the sweep that this process runs: one entry at most."""


class Count:
    """Of so many runs, how many have ended."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self._begun = total, 0, time.monotonic()
        self._is_shown = total > 1 and _is_terminal()

    def text(self, taken_s: float) -> str:
        """What the line says after so many seconds."""
        left = taken_s / self.done * (self.total - self.done) if self.done else 0.0
        return f"{self.done}/{self.total} runs done" + (f", about {left:.0f} s left" if left >= 1 else "")

    def show(self) -> None:
        """Draw the line anew."""
        if self._is_shown:
            _write(f"\r{self.text(time.monotonic() - self._begun)}\x1b[K")

    def erase(self) -> None:
        """Take it away."""
        if self._is_shown:
            _write(_ERASE)


@contextmanager
def counting(total: int) -> Iterator[None]:
    """Within this block `total` runs are made."""
    count = Count(total)
    _counts.append(count)
    count.show()
    try:
        yield
    finally:
        _counts.remove(count)
        count.erase()


def ended(number: int = 1) -> None:
    """So many more runs have ended; nothing where this process counts none."""
    for count in list(_counts):
        count.done += number
        count.show()


def clear_line() -> None:
    """Before a run of a sweep prints a line of its own, in whatever process, where the sweep draws the count."""
    if _is_terminal():
        _write(_ERASE)


def _is_terminal() -> bool:
    """Whether a count is shown: not where what is printed goes through a program, which may print it at any time."""
    try:
        piped = stat.S_ISFIFO(os.fstat(_STDOUT).st_mode)
        return os.environ.get("TERM") != "dumb" and os.isatty(_STDERR) and not piped
    except OSError:
        return False


def _write(text: str) -> None:
    with suppress(OSError):
        os.write(_STDERR, text.encode())
