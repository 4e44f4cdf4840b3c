"""The copy queue where experts have unlike sizes: chunks by key, and room that several may have to give up.

For each load, in the order of issue: as long as it does not fit, who leaves next by the eviction's choice gives way,
all before the next load is looked at. All or nobody: where one is lacking nobody leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

from expertflow.byte_slots import ByteSlots
from expertflow.copy_queue import CopyQueue, Load, SlotHooks
from expertflow.counters import Counters
from expertflow.machine import Chunk, Machine
from expertflow.parts import DEMAND, PREFETCH
from expertflow.view import LOADING, RESIDENT, Progress


class ByteQueue(CopyQueue):
    """A `CopyQueue` over `ByteSlots`. chunks: bytes of each chunk of an expert, by key."""

    def __init__(
        self,
        machine: Machine,
        slots: ByteSlots,
        progress: Progress,
        counters: Counters,
        chunks: Sequence[Sequence[int]],
        depth: int,
        hooks: SlotHooks,
    ) -> None:
        super().__init__(machine, slots, progress, counters, (), depth, hooks)
        self.room = slots
        self.chunks = chunks
        self._started_bytes = 0
        """Of all loads that were given room."""

    def pump(self) -> None:
        flight, depth, counters, demand = self.flight, self.depth, self.counters, self.demand
        while len(flight) < depth and (demand or self.wanted or self.started is not None):
            load = self._next()
            if load is None:
                break
            chunk, own = load.issued, self.chunks[load.key]
            self._copy(load.id, chunk, load.key, load.slot, own[chunk], 0 if chunk else load.after)
            if load.cause == DEMAND:
                counters.demand_bytes += own[chunk]
            else:
                counters.prefetch_bytes += own[chunk]
            load.issued = chunk = chunk + 1
            flight.append(load)
            if chunk == len(own):
                if load is self.started:
                    self.started = None
                elif demand:
                    self._leave(load)
            elif load.cause == PREFETCH and not (demand and load in demand):
                self.started = load
        self.has_work = bool(demand or self.wanted) or self.started is not None

    def _start(self, load: Load) -> bool:
        key, room = load.key, self.room
        pool, size = key // room.span, room.sizes[key]
        kept = room.staging_bytes[pool] if load.cause == PREFETCH else 0
        victims = self._victims(load, size + kept - room.free_bytes[pool])
        if victims is None:
            return False
        for victim in victims:
            slot = room.slot_of[victim]
            self.evict(victim)
            load.after = max(load.after, room.reader[slot])
        load.after = max(load.after, room.take(key))
        load.slot = room.slot_of[key] = room.free[pool].pop()
        self.state[key] = LOADING
        if self._shown is not None:
            self._shown[key] = LOADING
        load.id = self.num_loads = self.num_loads + 1
        self._started_bytes += size
        self.loading[key] = load
        self._admitted(key, load.cause)
        return True

    def _victims(self, load: Load, lacking: int) -> list[int] | None:
        """Who gives way so that `lacking` bytes become free, in the eviction's order; None where they do not.

        One that was chosen counts as pinned until all are: the eviction answers with the next.
        """
        progress = self.progress
        found: list[int] = []
        if lacking <= 0:
            return found
        pinned, streams = progress.pinned, False
        while lacking > 0:
            victim = self._victim(load.key, load.cause)
            if victim is None and load.cause == DEMAND and not streams:
                streams = True
                progress.pinned = (frozenset(pinned) - self._streamed()).union(found)
                victim = self._victim(load.key, load.cause)
            if victim is None:
                progress.pinned = pinned
                return None
            found.append(victim)
            lacking -= self.room.sizes[victim]
            progress.pinned = frozenset(progress.pinned).union(found)
        progress.pinned = pinned
        return found

    def evict(self, key: int) -> None:
        slot = self.room.slot_of[key]
        super().evict(key)
        self.room.give(key, self.room.reader[slot])

    def retire(self, chunks: Sequence[Chunk]) -> None:
        progress = self.progress
        for load_id, chunk, start_ns, end_ns in chunks:
            load = self.flight.popleft()
            if load.id != load_id:
                raise AssertionError(f"copy stream out of order: load {load_id} ended, {load.id} was due")
            own = self.chunks[load.key]
            progress.link_busy_ns += end_ns - start_ns
            progress.link_bytes += own[chunk]
            if chunk == len(own) - 1:
                self._land(load.key, end_ns)

    def _land(self, key: int, end_ns: int) -> None:
        self.landed_ns[key] = end_ns
        self.num_landed += 1
        self.state[key] = RESIDENT
        if self._shown is not None:
            self._shown[key] = RESIDENT
        del self.loading[key]
        for heard in self._landed_listeners:
            heard(key)

    def loaded_bytes(self) -> int:
        return self._started_bytes - sum(sum(self.chunks[one.key][one.issued :]) for one in self.loading.values())
