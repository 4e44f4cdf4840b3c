"""How a process ends whose GPU is lost: everything written, exit code 3, and no destructor that calls CUDA.

After an illegal access every CUDA call fails, those of destructors too: a pinned tensor that is thrown away, at the
latest when the interpreter shuts down, ends the process with -6 before it has written what it still held. So what the
exception has passed is kept alive, everything is flushed, and the process ends without destructors.

Commands end so through `sim.job.run_cli.run_cli`. A script of one's own does by itself: the handler that
`found_lost` registers runs before Python takes anything down, also after a traceback. `ending()` says it in one line
instead.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from sim.job.run_cli import on_error

LOST = 3
"""Exit code of a process whose device was lost."""

_BEYOND_REPAIR = ("CUDA error", "the GPU has not answered")
"""How a DeviceLostError of a real GPU begins; those of a fault that was asked for and of the CPU machine begin
otherwise, and leave a process that can end as ever."""


class DeviceLostError(RuntimeError):
    """The device stopped answering midway: what was measured so far is kept, the run is not finished."""


class Closable(Protocol):
    """A file that is written while a run goes on."""

    def close(self) -> None:
        """Make what was written so far readable under its name."""


_kept: list[BaseException] = []
"""The errors raised when the device was lost: their tracebacks keep alive the objects that must not be freed."""
_open: weakref.WeakSet[Closable] = weakref.WeakSet()


def loss(error: BaseException | None) -> BaseException | None:
    """The DeviceLostError that `error` is or was raised from, None if it is another failure."""
    while error is not None and not isinstance(error, DeviceLostError):
        error = error.__cause__
    return error


def beyond_repair(error: BaseException | None) -> bool:
    """Whether `error` says that a real GPU is gone, so that nothing may be given back to it."""
    found = loss(error)
    return found is not None and str(found).startswith(_BEYOND_REPAIR)


def found_lost(error: BaseException) -> None:
    """If `error`, about to be raised, says that a real GPU is gone: from here on this process ends with `LOST` and
    without destructors, however it ends. Other handlers of `atexit` do not run: they may hold what must not be thrown
    away."""
    if not beyond_repair(error):
        return
    if not _kept:
        atexit.register(end_now)
    _kept.append(error)


def close_at_end(file: Closable) -> None:
    """Close `file` if the process has to end at once and it is still open."""
    _open.add(file)


def end_now() -> None:
    """Write everything that is held, then end this process with `LOST`, without destructors."""
    for file in list(_open):
        # Closed by its owner before, or on a disk that is full: the others are still to be written.
        with suppress(Exception):
            file.close()
    with suppress(Exception):
        logging.shutdown()
    for held in gc.get_objects():
        with suppress(Exception):
            # By its type: asking some objects for their class imports modules.
            if issubclass(type(held), io.TextIOBase | io.BufferedIOBase) and held.writable():
                held.flush()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(LOST)


def end(error: BaseException) -> int:
    """The exit code after `error`, a loss that was told and written up; does not come back if a GPU is gone."""
    if _kept or beyond_repair(error):
        _kept.append(error)
        end_now()
    return LOST


def _meant(error: Exception) -> Exception:
    """`error`, or the loss that it is where torch raised it outside of `explaining`, as in a calibration."""
    if loss(error) is not None or not isinstance(error, RuntimeError) or "torch" not in sys.modules:
        return error
    # Here, since it needs this module, and torch.
    from replay.machine.cuda_errors import explained

    meant = explained(error)
    if not isinstance(meant, DeviceLostError):
        return error
    # What it has passed is kept alive with it.
    meant.__cause__ = error
    return meant


def _command_ends(error: Exception) -> int | None:
    error = _meant(error)
    if loss(error) is None:
        return None
    print(f"error: the device was lost: {error}; what was finished by then is kept", file=sys.stderr)
    return end(error)


@contextmanager
def ending() -> Iterator[None]:
    """Around a script: a device that is lost inside is one line on stderr and exit code 3."""
    try:
        yield
    except Exception as error:
        code = _command_ends(error)
        if code is None:
            raise
        raise SystemExit(code) from error


on_error(_command_ends)
