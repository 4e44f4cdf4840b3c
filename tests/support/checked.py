"""A simulated machine that watches itself: what lies in each slot, who reads it until when, what is in flight.

Knows the contract of `expertflow.machine` alone, not how the runtime decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertflow.machine import Record
from expertflow.runtime import Runtime
from sim.machine.simulated import SimMachine


class MachineFault(Exception):
    """The runtime asked for something that no real machine could do without reading wrong weights."""


@dataclass
class Slot:
    """Contents of one slot: the key last written, its chunks so far, when it is whole, when its readers end."""

    key: int = -1
    load: int = 0
    num_chunks: int = 0
    whole_ns: int | None = None
    read_until_ns: int = 0


class CheckedMachine(SimMachine):
    """Raises `MachineFault` at the first copy or kernel that breaks the contract."""

    def watch(self, runtime: Runtime) -> None:
        """Take over sizes and what is resident at the start."""
        config, slots = runtime.config, runtime.slots
        self.depth = config.channel_depth
        self.chunk_sizes = config.chunk_bytes
        self.slots = [Slot() for _ in slots.reader]
        self.num_loads = 0
        self.num_bytes = 0
        self.last_end_ns = 0
        self.last_record_ns = 0
        for key, slot in enumerate(slots.slot_of):
            if slot >= 0:
                self.slots[slot] = Slot(key, 0, len(self.chunk_sizes), 0)

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        super().copy(load, chunk, key, slot, num_bytes, after)
        _, _, start_ns, end_ns = self._chunks[-1]
        if len(self._chunks) > self.depth:
            raise MachineFault(f"{len(self._chunks)} chunks in flight, the channel holds {self.depth}")
        if not 0 <= slot < len(self.slots):
            raise MachineFault(f"slot {slot} of {len(self.slots)}")
        if num_bytes != self.chunk_sizes[chunk]:
            raise MachineFault(f"chunk {chunk} of {num_bytes} bytes, {self.chunk_sizes[chunk]} expected")
        into = self.slots[slot]
        if start_ns < into.read_until_ns:
            raise MachineFault(f"key {key} overwrites slot {slot} at {start_ns}, read until {into.read_until_ns}")
        if chunk == 0:
            self._begin(load, key, slot)
        into = self.slots[slot]
        if (into.load, into.key, into.num_chunks) != (load, key, chunk):
            raise MachineFault(f"chunk {chunk} of load {load} into slot {slot}, which holds {into}")
        into.num_chunks += 1
        self.num_bytes += num_bytes
        if into.num_chunks == len(self.chunk_sizes):
            into.whole_ns = end_ns

    def _begin(self, load: int, key: int, slot: int) -> None:
        """A new load takes the slot: its number is new, nobody else loads or holds the key."""
        self.num_loads += 1
        if load != self.num_loads:
            raise MachineFault(f"load {load} starts, {self.num_loads} was due")
        before = self.slots[slot]
        if before.load > 0 and (before.whole_ns is None or before.whole_ns > self.now_ns):
            raise MachineFault(f"key {key} takes slot {slot} while {before.key} is still being copied")
        for other in self.slots:
            if other.key == key:
                other.key = -1  # given up earlier: what lies there will not be read again
        self.slots[slot] = Slot(key, load, 0, None, before.read_until_ns)

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        mark = super().experts(layer, keys, counts, shared)
        _, start_ns, end_ns = self._marks[-1]
        for key in keys:
            holding = [slot for slot in self.slots if slot.key == key and slot.whole_ns is not None]
            if not any(slot.whole_ns is not None and slot.whole_ns <= start_ns for slot in holding):
                raise MachineFault(f"layer {layer} computes key {key} at {start_ns}, held by {holding}")
            for slot in holding:
                slot.read_until_ns = end_ns
        return mark

    def record(self, now_ns: int) -> Record:
        record = super().record(now_ns)
        if now_ns < self.last_record_ns:
            raise MachineFault(f"time runs backwards: {now_ns} after {self.last_record_ns}")
        self.last_record_ns = now_ns
        for _, _, start_ns, end_ns in record[1]:
            if not self.last_end_ns <= start_ns <= end_ns <= now_ns:
                raise MachineFault(f"chunk {start_ns} … {end_ns} after {self.last_end_ns}, seen at {now_ns}")
            self.last_end_ns = end_ns
        return record
