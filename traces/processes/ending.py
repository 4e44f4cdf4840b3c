"""How a command ends that is told to stop: one line that says what is kept and how to go on, no traceback.

SIGINT (Ctrl-C), SIGTERM and SIGHUP end a command with 130, 143 and 129, as a shell counts them. The first one raises
`Stopped` where the command is, so that everything is left as after an error. A second one, or one that has not been
obeyed after `GRACE_S`, ends the process at once; what it has not finished is removed. Signals that are ignored when the
command begins (`nohup`) stay ignored.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from traces.processes import whole
from traces.processes.streams import code_of_loss, prepare_streams

GRACE_S = 10.0
"""Seconds that a command has to end by itself: it may be within a long call, or be writing what it knows."""

_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
WORDS = {getattr(signal, name): word for name, word in _WORDS.items() if hasattr(signal, name)}
"""What is said, by signal."""

Kept = str | Callable[[], str]
"""What is kept of the work and how to go on, as the end of a sentence; or what says so when it is asked."""

_kept: list[Kept] = ["nothing was written; give the same command again"]
_begun: list[bool] = []
_first: list[int] = []
"""The signal that was heard first."""
_told: list[bool] = []


class Stopped(KeyboardInterrupt):
    """The process was told to stop by the signal `signum`."""

    def __init__(self, signum: int) -> None:
        # As its one argument: SimPy makes an error anew from its arguments.
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"{WORDS[self.signum]} by {signal.Signals(self.signum).name}"


def begin() -> None:
    """Hear signals from here on, and print safely: for a process that is a command, before anything that takes time."""
    if _begun or threading.current_thread() is not threading.main_thread():
        return
    _begun.append(True)
    prepare_streams()
    heard = [one for one in WORDS if signal.getsignal(one) in (signal.SIG_DFL, signal.default_int_handler)]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Even while the main thread is in a call that does not return: Python's own handlers wait for that.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, set(heard)), name="signals", daemon=True).start()
    for one in heard:
        signal.signal(one, _hear)
    sys.excepthook, sys.unraisablehook = _uncaught, _unraisable
    # Registered first, called last.
    atexit.register(_let_go, heard)


def _hear(signum: int, frame: FrameType | None) -> None:
    if not _first:
        _first.append(signum)
        raise Stopped(signum)


def _watch(reader: int, heard: set[int]) -> None:
    """End the process if it does not by itself."""
    deadline = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([reader], [], [], left)
        told = [one for one in (os.read(reader, 64) if ready else b"") if one in heard]
        if deadline is None and told:
            deadline = time.monotonic() + GRACE_S
            first, *told = told
        if deadline is not None and (told or not ready):
            end_now(128 + (_first[0] if _first else first))


def _let_go(heard: list[int]) -> None:
    """Everything is done: a signal ends the process as it ends any other, and what was lost decides its code."""
    for one in heard:
        with suppress(ValueError, OSError):
            signal.signal(one, signal.SIG_DFL)
    if code := code_of_loss():
        # Python itself has no other way to a code that is known only now.
        os._exit(code)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        end_now(exit_code(error), vars(error).get("kept"))
    sys.__excepthook__(kind, error, trace)


def _unraisable(told: Any) -> None:
    """A signal that was heard within a destructor or a callback would be printed and forgotten."""
    if isinstance(told.exc_value, Stopped):
        end_now(exit_code(told.exc_value), vars(told.exc_value).get("kept"))
    sys.__unraisablehook__(told)


def end_now(code: int, kept: str | None = None) -> None:
    """Say what is kept, remove what is not finished, and end this process without anything further."""
    _say(code, kept)
    whole.abandon_all()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


@contextmanager
def keeping(kept: Kept) -> Iterator[None]:
    """Within this block, `kept` is what a command says that is told to stop."""
    _kept.append(kept)
    try:
        yield
    except KeyboardInterrupt as error:
        # Who catches it further out knows less.
        vars(error).setdefault("kept", _sentence())
        raise
    finally:
        _kept.pop()


def _sentence() -> str:
    kept = _kept[-1]
    return kept if isinstance(kept, str) else kept()


def exit_code(error: KeyboardInterrupt) -> int:
    """Of a command that was stopped."""
    return 128 + (error.signum if isinstance(error, Stopped) else int(signal.SIGINT))


def stopped(error: KeyboardInterrupt) -> int:
    """Say in one line on stderr what is kept; the exit code."""
    code = exit_code(error)
    _say(code, vars(error).get("kept"))
    return code


def _say(code: int, kept: str | None = None) -> None:
    """The line of a command that ends with `code`: once in a process that is one."""
    if _told and _begun:
        return
    _told.append(True)
    with suppress(Exception):
        print(f"{WORDS[code - 128]}; {kept or _sentence()}"[:300], file=sys.stderr, flush=True)
