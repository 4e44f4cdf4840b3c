"""The simulated machine whose experts lie on a disk.

Requests begin in order. Each waits for its first byte (`latency_ns`), which those under way do together, and then has
the disk's bandwidth to itself. Reads are written into host memory by the disk itself, at a small share of that
memory's rate: they slow no copy and are slowed by none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from expertflow.machine import LOAD, Read, Record, Wait
from sim.machine.host_bound import HostBoundMachine
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.machine.simulated import HostCosts


class ReadTimes(Protocol):
    """What a disk takes, in whole ns."""

    latency_ns: int
    issue_ns: int

    def transfer_ns(self, num_bytes: int) -> int:
        """The bytes of one request, when the first one has come."""


class StorageMachine(HostBoundMachine):
    """A `HostBoundMachine` that implements `expertflow.machine.StorageMachine`."""

    def __init__(
        self, kernels: KernelTimes, link: Link, costs: HostCosts, chunk_bytes: Sequence[int], disk: ReadTimes
    ) -> None:
        super().__init__(kernels, link, costs, chunk_bytes)
        self.disk = disk
        self._disk_free_ns = 0
        self._reads: deque[Read] = deque()
        self._ended_reads: list[Read] = []

    def read(self, key: int, chunk: int, room: int, num_bytes: int) -> None:
        disk, free = self.disk, self._disk_free_ns
        issued = self.now_ns = self.now_ns + disk.issue_ns
        end = max(issued + disk.latency_ns, free) + disk.transfer_ns(num_bytes)
        self._reads.append((key, chunk, max(issued, free), end))
        self._disk_free_ns = end

    def wake_ns(self, wait: Wait) -> int:
        kind, _, drain = wait
        if not drain or not self._reads:
            return super().wake_ns(wait)
        now, end, chunks = self.now_ns, self._stream_free_ns, self._chunks
        first = self._reads[0][3]
        if chunks and chunks[0][3] < first:
            first = chunks[0][3]
        if kind == LOAD or (now < end and first < end):
            self._after_wake_ns = self.costs.observe_ns
            return max(now, first)
        return super().wake_ns(wait)

    def record(self, now_ns: int) -> Record:
        told = super().record(now_ns)
        reads = self._reads
        while reads and reads[0][3] <= now_ns:
            self._ended_reads.append(reads.popleft())
        return told

    def reads_ended(self) -> Sequence[Read]:
        ended, self._ended_reads = self._ended_reads, []
        return ended

    def has_other_news(self) -> bool:
        return bool(self._ended_reads)
