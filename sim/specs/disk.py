"""How long reads of a disk take: the pace of a simulated one, and of a file that stands for one."""

from __future__ import annotations

import math

from sim.specs.chunks import chunk_sizes
from sim.specs.curves import bandwidth_at
from sim.specs.storage import Storage


class Disk:
    """What reads from one disk take, in whole ns: latency_ns until a request's first byte, then its bytes; issue_ns of
    the host for each. factor: every byte stands for so many, as of a model whose widths are divided."""

    def __init__(self, storage: Storage, factor: int = 1) -> None:
        self.latency_ns = storage.latency_ns
        self.issue_ns = storage.issue_read_ns
        self._curve = storage.curve
        self._factor = factor
        self._known_ns: dict[int, int] = {}

    def transfer_ns(self, num_bytes: int) -> int:
        known = self._known_ns.get(num_bytes)
        if known is None:
            meant = num_bytes * self._factor
            known = self._known_ns[num_bytes] = math.ceil(meant / bandwidth_at(self._curve, meant))
        return known

    def fastest_load_ns(self, expert_bytes: int, chunk_bytes: int) -> int:
        """No schedule reads an expert faster: its requests back to back, their latency hidden. For bounds."""
        return sum(self.transfer_ns(size) for size in chunk_sizes(expert_bytes, chunk_bytes))
