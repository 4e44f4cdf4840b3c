"""One process, or thread, at a time: a lock on a file that ends with its owner, however that ends.

The file says who has it. It is removed with the lock: who takes it looks whether it still bears its name. On a file
system without locks (`flock`) the work goes on without one, which is said once.
"""

from __future__ import annotations

import os
import platform
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from traces.messages import fault
from traces.processes.whole import bears, lock

LOCK = ".lock"
"""Name of the lock file of a folder."""

_warned: list[bool] = []


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def locked(path: Path, what: str, say: Callable[[str], None] = _to_stderr) -> Iterator[None]:
    """Hold the lock file `path`; if another holds it, wait until it ends, and say so in one line.

    what: is written meanwhile, for the line. OSError where the file cannot be made, TraceError where a pipe or a device
    has its name.
    """
    handle = _taken(path, what, say)
    try:
        yield
    finally:
        if handle is not None:
            # Before the lock goes: who waits for it finds that the file bears no name any more, and makes another.
            with suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(handle)


def locked_folder(folder: Path, say: Callable[[str], None] = _to_stderr) -> AbstractContextManager[None]:
    """`locked` for all that is written into `folder`, which exists."""
    return locked(folder / LOCK, str(folder), say)


def _taken(path: Path, what: str, say: Callable[[str], None]) -> int | None:
    """An open file whose lock is held; None where there are no locks."""
    told = False
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise fault(path, "lock", "is a pipe or a device, not a file", "remove it")
            found = lock(handle)
            if found is False:
                if not told:
                    say(f"waiting: {_owner(handle)} is writing {what}")
                    told = True
                found = lock(handle, wait=True)
            if found is None:
                os.close(handle)
                path.unlink(missing_ok=True)
                if not _warned:
                    _warned.append(True)
                    _to_stderr(f"warning: {what}: no file locks here; do not write into it from two processes at once")
                return None
            if bears(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()} {platform.node()}".encode(), 0)
                return handle
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise
        os.close(handle)


def _owner(handle: int) -> str:
    with suppress(OSError, ValueError):
        number, _, host = os.pread(handle, 300, 0).decode().partition(" ")
        if number.isdecimal():
            return f"process {number}" + ("" if host == platform.node() else f" on {host[:60]}")
    return "another process"
