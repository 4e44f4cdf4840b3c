"""A file of experts and the thread that reads it: the disk below a CPU machine's host memory.

Every read is one of the file, past the page cache where the file system allows it (O_DIRECT), and lasts at least as
long as the storage profile says, so that threads that share few cores do not measure each other.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from sim.specs.disk import Disk as ReadPace

_SECTOR = 4096
"""Bytes to which places, lengths and memory of a direct read are aligned."""
_MARK_BYTES = 16
_SLACK_NS = 1000
_LATE_NS = 2_000_000
"""ns by which a read may end late. If it is later, the disk's clock is set to the time of the thread again."""


class DiskEvent:
    """The end of a read."""

    __slots__ = ("happened", "ns")

    def __init__(self) -> None:
        self.happened = False
        self.ns = 0


class _Task(NamedTuple):
    put_ns: int
    key: int
    chunk: int
    target: int
    end: DiskEvent


def _sectors(num_bytes: int) -> int:
    return -(-num_bytes // _SECTOR) * _SECTOR


def mark_of(key: int, chunk: int) -> bytes:
    """The first bytes of a chunk in the file: a read of the wrong place shows."""
    return key.to_bytes(8, "little") + chunk.to_bytes(8, "little")


class ExpertFile:
    """A temporary file with `num_keys` experts, each chunk on sectors of its own, filled from `fill` [expert_bytes].

    is_direct: reads pass the page cache by. Its name is removed at once. ValueError where it does not fit.
    """

    def __init__(self, num_keys: int, sizes: Sequence[int], fill: bytes) -> None:
        if min(sizes) < _MARK_BYTES:
            raise ValueError(f"chunks of {min(sizes)} bytes cannot be told apart on storage; raise chunk_mib")
        self.sizes = list(sizes)
        self._starts = [sum(map(_sectors, sizes[:chunk])) for chunk in range(len(sizes))]
        self._stride = sum(map(_sectors, sizes))
        folder = Path(tempfile.gettempdir())
        needed, free = self._stride * num_keys, shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"storage: the experts take {needed / 1e9:.2f} GB of a temporary file, {free / 1e9:.2f} are free; set "
                "TMPDIR to a larger disk, or raise scale"
            )
        self._buffer = mmap.mmap(-1, max(map(_sectors, sizes)))
        number, path = tempfile.mkstemp(prefix="expertflow-storage-", dir=folder)
        try:
            with os.fdopen(number, "wb") as file:
                for key in range(num_keys):
                    file.write(self._expert(key, fill))
                file.flush()
                os.fsync(file.fileno())
            self._file, self.is_direct = self._open(path)
        finally:
            os.unlink(path)

    def _expert(self, key: int, fill: bytes) -> bytes:
        whole, begin = bytearray(self._stride), 0
        for chunk, (start, size) in enumerate(zip(self._starts, self.sizes, strict=True)):
            whole[start : start + size] = fill[begin : begin + size]
            whole[start : start + _MARK_BYTES] = mark_of(key, chunk)
            begin += size
        return bytes(whole)

    def _open(self, path: str) -> tuple[int, bool]:
        """The file, and whether it is read past the page cache: some file systems refuse when it is opened, some at the
        first read."""
        direct = getattr(os, "O_DIRECT", 0)
        if direct:
            file = -1
            try:
                file = os.open(path, os.O_RDONLY | direct)
                os.preadv(file, [memoryview(self._buffer)[:_SECTOR]], 0)
                return file, True
            except OSError:
                if file >= 0:
                    os.close(file)
        return os.open(path, os.O_RDONLY), False

    def read(self, key: int, chunk: int, target: int) -> None:
        """Read one chunk into the memory at the address `target`. AssertionError where it is another chunk."""
        size, place = self.sizes[chunk], key * self._stride + self._starts[chunk]
        view = memoryview(self._buffer)[: _sectors(size)]
        if os.preadv(self._file, [view], place) < size or view[:_MARK_BYTES] != mark_of(key, chunk):
            raise AssertionError(f"storage: chunk {chunk} of expert key {key} was read wrongly")
        ctypes.memmove(target, ctypes.addressof(ctypes.c_char.from_buffer(self._buffer)), size)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)


class DiskThread(threading.Thread):
    """Reads in order. Each begins its latency when it is enqueued and its bytes follow those before, as in
    `sim.machine.storage`. on_news: called at each end. failure: what went wrong, if anything did."""

    def __init__(self, file: ExpertFile, pace: ReadPace, on_news: Callable[[], object]) -> None:
        super().__init__(name="disk", daemon=True)
        self.file = file
        self.pace = pace
        self.on_news = on_news
        self.failure: BaseException | None = None
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self.start()

    def read(self, key: int, chunk: int, target: int) -> DiskEvent:
        """Enqueue the read of one chunk into the memory at `target`; the event at its end."""
        end = DiskEvent()
        self._tasks.put(_Task(time.perf_counter_ns(), key, chunk, target, end))
        return end

    def run(self) -> None:
        due = 0
        while (task := self._tasks.get()) is not None:
            try:
                self.file.read(task.key, task.chunk, task.target)
            except BaseException as error:
                self.failure = error
            first = max(task.put_ns + self.pace.latency_ns, due)
            due = first + self.pace.transfer_ns(self.file.sizes[task.chunk])
            left = due - time.perf_counter_ns()
            if left > _SLACK_NS:
                time.sleep(left * 1e-9)
            late = time.perf_counter_ns()
            due = due if late - due < _LATE_NS else late
            task.end.ns = due
            task.end.happened = True
            self.on_news()

    def close(self) -> None:
        """Finish what was enqueued, and end."""
        self._tasks.put(None)
        self.join()
        self.file.close()
