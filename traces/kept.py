"""Arrays that take long to make, kept in a folder from run to run.

One .npy file each, under a name that says all that the array depends on; whoever finds the file reads it, a few rows at
a time: neither who writes nor who reads holds more of it. A file appears whole or not at all; of processes that want
the same one at once, one makes it and the others wait.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
import numpy.typing as npt

from traces.messages import TraceError
from traces.processes.locks import locked
from traces.processes.whole import Unfinished, clear

MOST_BYTES = 2 << 30
"""What a folder may hold; the files that were used longest ago go first."""

_FINISHED = ".npy"
_READ_BYTES = 1 << 20
_SUM_BYTES = 4
"""Of the checksum behind the array: a file may have its size and yet lack its content after a power cut."""


class KeptRows:
    """Implements `expertflow.parts.KeptRows` by an open file: one that is removed meanwhile can still be read."""

    def __init__(self, file: BufferedReader, num_rows: int, row_bytes: int) -> None:
        self._file, self._begin = file, file.tell()
        self._num_rows, self._row_bytes = num_rows, row_bytes

    def close(self) -> None:
        """Nothing more is read."""
        self._file.close()

    def read(self, first: int, into: npt.NDArray[Any]) -> int:
        """As `expertflow.parts.KeptRows`; OSError where the file has become shorter than it was."""
        num = min(len(into), self._num_rows - first)
        wanted = into[:num].reshape(-1).view(np.uint8)
        self._file.seek(self._begin + first * self._row_bytes)
        if self._file.readinto(wanted.data) != len(wanted):
            raise OSError(errno.EIO, "was cut short while it was read; run again", self._file.name)
        return num


class KeptArrays:
    """Implements `expertflow.parts.Kept` by the files of one folder, which need not exist yet and hold no more than
    `most_bytes` in all.

    Nothing here fails because of the folder: what cannot be kept is not.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder
        self.most_bytes = most_bytes

    def find(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> KeptRows | None:
        """The array; None where there is none of that shape and type, or it is damaged."""
        path, kind = self._path(name), np.dtype(dtype)
        header, num_bytes = _header(shape, kind), int(np.prod(shape)) * kind.itemsize
        if not path.is_file():  # a pipe of that name would be waited for
            return None
        file = None
        try:
            file = path.open("rb")
            whole = file.read(len(header)) == header and _is_whole(file, num_bytes)
            os.utime(path)
        except OSError:
            whole = False
        if file is None or not whole:
            if file is not None:
                file.close()
            return None
        file.seek(len(header))
        return KeptRows(file, shape[0], num_bytes // max(shape[0], 1))

    def keep(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike, parts: Iterable[npt.NDArray[Any]]) -> bool:
        """Write an array of which `parts` are the consecutive rows. False: it is not kept, for want of room or since
        the parts ended early."""
        kind = np.dtype(dtype)
        num_bytes = int(np.prod(shape)) * kind.itemsize
        if num_bytes > self.most_bytes // 4:
            return False
        path = self._path(name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock"), str(self.folder), say=_say_nothing):
                # While it was waited for, another process may have made it.
                return self.find(name, shape, dtype) is not None or self._write(path, shape, kind, parts)
        except (OSError, TraceError):
            return False

    def _write(self, path: Path, shape: tuple[int, ...], kind: np.dtype[Any], parts: Iterable[Any]) -> bool:
        num_bytes = int(np.prod(shape)) * kind.itemsize
        self._make_room(num_bytes)
        unfinished = Unfinished(path)
        try:
            with unfinished.path.open("wb") as file:
                # Written, not mapped: a full disk is then an error that can be caught.
                file.write(_header(shape, kind))
                written = found = 0
                for part in parts:
                    rows = np.ascontiguousarray(part, kind).reshape(-1).view(np.uint8).data
                    found = crc32(rows, found)
                    written += file.write(rows)
                file.write(found.to_bytes(_SUM_BYTES, "big"))
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            unfinished.abandon()
            raise
        if written != num_bytes:
            unfinished.abandon()
            return False
        unfinished.finish()
        return True

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}{_FINISHED}"

    def _make_room(self, num_bytes: int) -> None:
        """Remove files until so much more may be written, and what dead processes have not finished. Who has opened
        one can still read it."""
        clear(self.folder)
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total + num_bytes <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        for path in self.folder.glob(f"*{_FINISHED}"):
            with suppress(OSError):
                told = path.stat()
                yield told.st_mtime, told.st_size, path


def _say_nothing(line: str) -> None:
    """A sweep's workers all want the same file at first: that they wait is nothing to tell of each."""


def _header(shape: tuple[int, ...], kind: np.dtype[Any]) -> bytes:
    """What an .npy file of such an array begins with."""
    made = BytesIO()
    told = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(made, told)  # type: ignore[no-untyped-call, unused-ignore]
    return made.getvalue()


def _is_whole(file: BinaryIO, num_bytes: int) -> bool:
    """Whether so many bytes follow, and then their checksum and nothing else."""
    found = 0
    while num_bytes:
        some = file.read(min(num_bytes, _READ_BYTES))
        if not some:
            return False
        found, num_bytes = crc32(some, found), num_bytes - len(some)
    return file.read() == found.to_bytes(_SUM_BYTES, "big")


@lru_cache
def code_hash(*modules: str) -> str:
    """Hash of the files of loaded modules: what they compute is out of date when one changes."""
    told = hashlib.sha256()
    for name in modules:
        file = sys.modules[name].__file__
        told.update(b"" if file is None else Path(file).read_bytes())
    return told.hexdigest()
