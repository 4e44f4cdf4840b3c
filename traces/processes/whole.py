"""Files that appear whole or not at all, whoever is killed meanwhile and whoever else writes the same one.

What is unfinished lies under a name of its own beside its target, on the same file system, and holds a lock (`flock`)
that ends with its process. So who comes next can tell what a killed process has left, which it removes, from what a
living one writes. Where the file system has no locks nothing is removed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import weakref
from contextlib import suppress
from pathlib import Path

from traces.messages import fault

try:
    import fcntl

    _HAS_LOCKS = True
except ImportError:  # pragma: no cover - no such locks on this system
    _HAS_LOCKS = False

_NAME = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_open: weakref.WeakSet[Unfinished] = weakref.WeakSet()


class Unfinished:
    """A file, or a folder, that is not finished: it lies at `path` until `finish` gives it the name `target`.

    It exists, empty, from the start: who writes it may open it by its name. As a context manager it finishes on success
    and leaves nothing behind otherwise. Of a symbolic link the target is what it leads to, there or not yet. OSError,
    naming what was given, where it cannot be made; TraceError for a device, a pipe or a socket, which it would replace.
    """

    def __init__(self, target: str | Path, folder: bool = False) -> None:
        self.target = _place(Path(target), folder)
        clear(self.target.parent, self.target.name)
        while True:
            self.path = self.target.with_name(f".{self.target.name}.{os.urandom(4).hex()}.tmp")
            try:
                handle = _made(self.path, folder)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(target)) from None
            # Between its making and its lock another process may have taken it for a dead one's.
            if handle is not None and bears(handle, self.path):
                break
            if handle is not None:
                os.close(handle)
        self._handle = handle
        _open.add(self)

    def finish(self) -> None:
        """Put it in the place of its target, which is no folder yet if this is one."""
        os.replace(self.path, self.target)
        self._let_go()

    def abandon(self) -> None:
        """Leave nothing behind."""
        _remove(self.path)
        self._let_go()

    def _let_go(self) -> None:
        _open.discard(self)
        os.close(self._handle)

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            try:
                self.finish()
            except OSError:
                self.abandon()
                raise
        else:
            self.abandon()


def remove_folder(folder: Path) -> None:
    """Remove a folder in one step: if this process is killed, what is left of it does not bear its name."""
    if folder.is_dir():
        with suppress(OSError):
            unfinished = Unfinished(folder, folder=True)
            os.replace(unfinished.target, unfinished.path)
            unfinished.abandon()


def clear(folder: Path, name: str | None = None) -> None:
    """Remove what dead processes have left unfinished in `folder`: of the file called `name`, or of any."""
    if not _HAS_LOCKS:
        return
    try:
        found = [entry.name for entry in os.scandir(folder) if entry.name.endswith(".tmp")]
    except OSError:
        return
    for entry in found:
        match = _NAME.fullmatch(entry)
        if match and (name is None or match[1] == name):
            _remove_if_dead(folder / entry)


def abandon_all() -> None:
    """Remove everything that this process has not finished: it is about to end."""
    for unfinished in list(_open):
        with suppress(OSError):
            unfinished.abandon()


def lock(handle: int, wait: bool = False) -> bool | None:
    """Take the lock of an open file, for as long as it is open: True; False if another has it, and `wait` is not
    asked for; None where there are no locks."""
    if not _HAS_LOCKS:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def bears(handle: int, path: Path) -> bool:
    """Whether an open file is the one that has the name `path`."""
    try:
        named, held = os.stat(path), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


def _place(target: Path, folder: bool) -> Path:
    """Where what is written to `target` lies in the end; OSError or TraceError if that is taken by another kind."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        # Or a link to what is not there yet.
        mode = None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    if mode is not None and not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise fault(target, "file", "cannot be written (a device, a pipe or a socket)", "name a regular file")
    if mode is not None and stat.S_ISDIR(mode) is not folder:
        number = errno.ENOTDIR if folder else errno.EISDIR
        raise OSError(number, os.strerror(number), str(target))
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def _made(path: Path, folder: bool) -> int | None:
    """A new file or folder, open and locked; None where it was taken away, or is there already."""
    try:
        if folder:
            path.mkdir()
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
        else:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    except FileExistsError:
        return None
    if lock(handle) is False:
        # Another process looks whether it is a dead one's, and will take it away.
        os.close(handle)
        return None
    return handle


def _remove_if_dead(path: Path) -> None:
    with suppress(OSError):
        # Nothing else than what is made here is looked into: a pipe of that name would block.
        flags = os.O_NOFOLLOW | os.O_NONBLOCK
        handle = os.open(path, flags | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
        try:
            if lock(handle):
                _remove(path)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
