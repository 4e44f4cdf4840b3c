"""A limit to how long a run may take: it ends with the name of the part that was running, and without a result.

A timer of the system interrupts the main thread, within a part's own loop or while it waits for something; where there
is none, or the run is not in the main thread, another thread does. A part that catches even that, or that is in a
call from which the interpreter does not come back, has `GRACE_S`; then the process ends.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from expertflow.boundary import Interruption
from expertflow.parts import Part
from traces.processes.whole import abandon_all

GRACE_S = 3.0
"""Seconds after which a run ends its process that did not end when it was interrupted."""
_AGAIN_S = 0.5
_CODE = 2


class TimeoutReached(Interruption):
    """The time is up. No Exception: a part that goes on after any of these would go on after this one."""


class RunTimeoutError(ValueError):
    """A run took longer than its `timeout_s`."""


@contextmanager
def limited(timeout_s: float | None, may_end: bool = True) -> Iterator[None]:
    """Run the block for `timeout_s` seconds of wall time at most; RunTimeoutError, naming the part, if it takes longer.

    None: no limit, and no cost. may_end: whether the process may be ended where interrupting the part is in vain; it is
    not ours where the run is called from a program.
    """
    if timeout_s is None:
        yield
        return
    limit = _Limit(timeout_s, may_end)
    try:
        try:
            limit.start()
            yield
        finally:
            limit.stop()
    except TimeoutReached:
        # It may have come just as the limit was lifted.
        limit.stop()
        raise RunTimeoutError(limit.line) from None


class _Limit:
    def __init__(self, timeout_s: float, may_end: bool) -> None:
        self.timeout_s = timeout_s
        self.may_end = may_end
        self.line = f"timeout_s={timeout_s:g}: the time is up; no result was written"
        self._over = threading.Event()
        self._thread = threading.current_thread()
        self._interrupts = 0
        self._by_timer = self._thread is threading.main_thread() and hasattr(signal, "setitimer")
        self._before: Any = None

    def start(self) -> None:
        if self._by_timer:
            self._before = signal.signal(signal.SIGALRM, self._ring)
            signal.setitimer(signal.ITIMER_REAL, self.timeout_s, _AGAIN_S)
        threading.Thread(target=self._watch, name="timeout", daemon=True).start()
        if not self.may_end:
            return
        with suppress(ValueError, OSError, AttributeError):
            # Should the interpreter be held by a call that never comes back: nothing in Python can end that.
            faulthandler.dump_traceback_later(self.timeout_s + 2 * GRACE_S, exit=True)

    def stop(self) -> None:
        self._over.set()
        if self.may_end:
            faulthandler.cancel_dump_traceback_later()
        if self._by_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    def _ring(self, signum: int, frame: FrameType | None) -> None:
        if self._over.is_set():
            return
        part = _running(frame)
        if not self._interrupts:
            self._tell(part)
        elif part is None:
            # It is on its way out: what tidies up is left alone.
            return
        self._interrupts += 1
        raise TimeoutReached

    def _tell(self, part: str | None) -> None:
        where = f"{part} was running" if part else "no part was running"
        remedy = "mend the part, or raise timeout_s" if part else "raise timeout_s, or run less"
        self.line = f"timeout_s={self.timeout_s:g}: {where} when the time was up; no result was written; {remedy}"

    def _watch(self) -> None:
        """Where there is no timer, interrupt; and end the process if that was in vain."""
        if self._over.wait(self.timeout_s):
            return
        if not self._by_timer:
            self._tell(_running(sys._current_frames().get(self._thread.ident or 0)))
            self._interrupts += 1
            ident = ctypes.c_ulong(self._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(TimeoutReached))
        if not self.may_end or self._over.wait(GRACE_S):
            return
        if not self._interrupts:
            self._tell(_running(sys._current_frames().get(self._thread.ident or 0)))
        print(f"error: {self.line}", file=sys.stderr, flush=True)
        abandon_all()
        os._exit(_CODE)


def _running(frame: FrameType | None) -> str | None:
    """`Class.hook` of the part that is innermost on the stack; None if there is none on it."""
    found: Part | None = None
    name = ""
    while frame is not None:
        owner = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if found is None:
            if isinstance(owner, Part):
                found, name = owner, frame.f_code.co_name
        elif owner is found:
            # Further out: the hook that was called, of which the rest are helpers.
            name = frame.f_code.co_name
        frame = frame.f_back
    return None if found is None else f"{type(found).__name__}.{name}"


__all__ = ["RunTimeoutError", "TimeoutReached", "limited"]
