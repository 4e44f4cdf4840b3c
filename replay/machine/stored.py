"""The CPU machine whose experts lie in a file: implements `expertflow.machine.StorageMachine`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from expertflow.machine import LOAD, Read, Record, Wait
from replay.lost import DeviceLostError
from replay.machine.cpu import CpuDevice
from replay.machine.device import Event
from replay.machine.disk import DiskEvent, DiskThread, ExpertFile
from replay.machine.kernels import Kernels
from replay.machine.pools import HostPool, SlotPool
from replay.machine.real import RealMachine
from sim.specs.disk import Disk
from sim.specs.hardware import Stack


class _Either:
    """Happens when the first of two events does."""

    __slots__ = ("first", "second")

    def __init__(self, first: Event, second: Event) -> None:
        self.first, self.second = first, second

    @property
    def happened(self) -> bool:
        return bool(self.first.happened or self.second.happened)


class StoredMachine(RealMachine):
    """A `RealMachine` on a `CpuDevice`. host: a buffer for each room of host memory. pace: how long reads last."""

    def __init__(
        self,
        device: CpuDevice,
        kernels: Kernels,
        host: HostPool,
        slots: SlotPool,
        chunk_bytes: Sequence[int],
        stack: Stack,
        pace: Disk,
    ) -> None:
        super().__init__(device, kernels, host, slots, chunk_bytes, stack)
        num_keys = len(self._host_address)
        fill = host.buffer(0).numpy().tobytes()
        self.disk = DiskThread(ExpertFile(num_keys, self._sizes, fill), pace, lambda: device.news.put(None))
        self._room_address = [host.buffer(room).data_ptr() for room in range(host.plan.num_buffers)]
        self._reads: deque[tuple[int, int, DiskEvent, int]] = deque()
        """(key, chunk, end, when it was issued)."""
        self._ended_reads: list[Read] = []
        self._read_end_ns = 0

    @property
    def is_direct(self) -> bool:
        """Whether reads pass the page cache by."""
        return self.disk.file.is_direct

    def read(self, key: int, chunk: int, room: int, num_bytes: int) -> None:
        address = self._host_address[key] = self._room_address[room]
        end = self.disk.read(key, chunk, address + self._bounds[chunk][0])
        self._reads.append((key, chunk, end, self.device.now_ns()))

    def reads_ended(self) -> Sequence[Read]:
        ended, self._ended_reads = self._ended_reads, []
        return ended

    def wait(self, wait: Wait) -> Record:
        kind, ident, drain = wait
        if not drain or not self._reads:
            return super().wait(wait)
        chunks = self._chunks
        first: Event = self._reads[0][2]
        if chunks:
            first = _Either(first, chunks[0][2])
        self.device.wait(0 if kind == LOAD else self._number, first, self._read_one)
        if kind != LOAD and self.device.numbers[0] >= self._number:
            # It has happened: this returns at once, as a wait without storage does.
            return super().wait((kind, ident, False))
        return self._record()

    def _record(self) -> Record:
        if self.disk.failure is not None:
            raise DeviceLostError(f"the disk of the CPU machine failed: {self.disk.failure}") from self.disk.failure
        reads, latest = self._reads, self._read_end_ns
        while reads and reads[0][2].happened:
            key, chunk, end, issued_ns = reads.popleft()
            end_ns = max(self.device.time_ns(end), latest)
            self._ended_reads.append((key, chunk, min(max(issued_ns, latest), end_ns), end_ns))
            latest = end_ns
        self._read_end_ns = latest
        now_ns, chunks, marks = super()._record()
        if latest > now_ns:
            self._now_ns = now_ns = latest
        return now_ns, chunks, marks

    def preload_rooms(self, room_of: Sequence[int]) -> None:
        """Read what is in host memory from the start. room_of: room by key, -1 = none."""
        for key, room in enumerate(room_of):
            if room < 0:
                continue
            address = self._host_address[key] = self._room_address[room]
            for chunk, (start, _) in enumerate(self._bounds):
                self.disk.file.read(key, chunk, address + start)

    def close(self) -> None:
        """End the thread and give the file back."""
        self.disk.close()
