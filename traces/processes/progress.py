"""A line on stderr that says what a command is doing, where that is a terminal and takes longer than two seconds.

It is drawn by a thread that looks once a second at what the work itself counts: the work is told nothing and pays
nothing, and a replay's times stay its own. It is gone before anything else is printed (`traces.processes.streams`), and
when the work has ended. Elsewhere than on a terminal, and in worker processes, nothing is printed.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

AFTER_S = 2.0
"""Seconds of work, counted from the first that was announced, without a line."""
_TICK_S = 1.0
_STDERR = 2


class _Task(NamedTuple):
    what: str
    done: Callable[[], float] | None
    total: float
    since: float


class _Line:
    """What is announced, innermost last, and the thread that shows it."""

    def __init__(self) -> None:
        self.tasks: list[_Task] = []
        self.begun: float | None = None
        self._drawn = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._drawing = threading.RLock()

    def enter(self, task: _Task) -> None:
        if self.begun is None:
            self.begun = task.since
        self.tasks.append(task)
        if self._thread is None and _is_wanted():
            self._over.clear()
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()

    def leave(self) -> None:
        self.tasks.pop()
        if not self.tasks and self._thread is not None:
            self._over.set()
            self._thread.join(_TICK_S)
            self._thread = None
            self.erase()

    def erase(self) -> None:
        """Before something else is printed; it comes back with the next tick."""
        if self._drawn:
            with self._drawing:
                self._drawn = False
                _write("\r\x1b[K")

    def _run(self) -> None:
        assert self.begun is not None
        wait = max(AFTER_S - (time.monotonic() - self.begun), min(_TICK_S, AFTER_S))
        while not self._over.wait(wait):
            wait = _TICK_S
            with self._drawing:
                if text := text_of(self.tasks):
                    _write(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K")
                    self._drawn = True


def text_of(tasks: list[_Task], now: float | None = None) -> str:
    """What the innermost of the tasks that has a name is, how far the innermost that counts has come, and how long it
    may still take."""
    shown = list(tasks)
    named = [task for task in shown if task.what]
    if not named:
        return ""
    taken = (time.monotonic() if now is None else now) - named[-1].since
    counting = next((task for task in reversed(shown) if task.done is not None and task.total > 0), None)
    share = 0.0
    if counting is not None and counting.done is not None:
        with suppress(Exception):
            share = min(max(counting.done() / counting.total, 0.0), 1.0)
    parts = [f"{100 * share:.0f} %"] if counting is not None else []
    parts.append(f"{taken:.0f} s")
    if share > 0.01:
        parts.append(f"about {taken / share - taken:.0f} s left")
    return f"{named[-1].what}: {', '.join(parts)}"


_line = _Line()
_silent: list[bool] = []


def never_here() -> None:
    """Nothing is shown by this process: it is one of several that share a terminal."""
    _silent.append(True)


@contextmanager
def shown(what: str, done: Callable[[], float] | None = None, total: float = 0) -> Iterator[None]:
    """Within this block `what` is being done. done: how much of `total` by now, asked from another thread.

    Empty: a step of what is announced further out, which counts for it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _line.enter(_Task(what, done, total, time.monotonic()))
    try:
        yield
    finally:
        _line.leave()


def erase() -> None:
    """Take the line away before something else is printed."""
    _line.erase()


def _is_wanted() -> bool:
    try:
        return not _silent and os.environ.get("TERM") != "dumb" and sys.stderr.isatty() and os.isatty(_STDERR)
    except (AttributeError, ValueError, OSError):
        return False


def _write(text: str) -> None:
    with suppress(OSError):
        os.write(_STDERR, text.encode(errors="replace"))
