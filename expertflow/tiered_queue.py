"""Loads from storage: what is read into host memory, in which order, and which copies wait for it.

Reads go in the order of the copies: demand first, then what has begun to be read, then the wanted prefetches, best
first. At most `read_depth` reads are issued and not yet seen to have ended. A chunk is copied to the GPU once its own
bytes are in host memory, so that copies overlap later reads of the same expert; a load whose bytes are not there does
not block others. A read that was begun is finished, whatever becomes of the prefetch that it was for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import cast

from expertflow.copy_queue import CopyQueue, Load, SlotHooks
from expertflow.counters import Counters
from expertflow.host_memory import HostMemory, HostMemorySpec
from expertflow.machine import Machine, Read, StorageMachine
from expertflow.parts import DEMAND
from expertflow.slots import Slots
from expertflow.view import ABSENT, Progress


class TieredQueue(CopyQueue):
    """A `CopyQueue` whose experts come from storage through `memory`.

    Others read `read_ns` [N] (when the last byte of each expert came from storage; 0 = never), `num_reading` (reads
    issued and not seen to have ended) and `memory`.
    """

    def __init__(
        self,
        machine: Machine,
        slots: Slots,
        progress: Progress,
        counters: Counters,
        chunk_bytes: Sequence[int],
        depth: int,
        hooks: SlotHooks,
        memory: HostMemory,
    ) -> None:
        super().__init__(machine, slots, progress, counters, chunk_bytes, depth, hooks)
        num_slots, num_rooms = len(slots.reader), memory.spec.num_slots
        if num_rooms < min(num_slots + 1, len(slots.state)):
            raise ValueError(
                f"host_memory_gb: {num_rooms} experts fit, and host memory holds what the GPU's {num_slots} slots do, "
                "and one more; give more, or lower residency or policy.transfer.staging_slots"
            )
        self.machine = cast(StorageMachine, machine)
        self.memory = memory
        self.read_depth = memory.spec.read_depth
        self.reading: deque[tuple[int, int]] = deque()
        """(key, chunk) of the reads under way."""
        self.begun: list[Load] = []
        """Prefetches of which some chunk was issued, and not all."""
        self.partial: dict[int, None] = {}
        """Keys of which some read was issued, and not all; oldest first."""
        self.read_ns = [0] * len(slots.state)

    def fill(self, initial: Sequence[int]) -> None:
        """The slots were filled: host memory holds the same, and the best of `initial` as far as there is room."""
        state = self.state
        self.memory.fill([key for key in range(len(state)) if state[key] != ABSENT], initial)

    def leave_out(self, before: Counters) -> None:
        super().leave_out(before)
        before.num_reads -= self.memory.num_fresh

    # -- issuing ---------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Issue chunks up to the depth, then reads up to theirs: a copy may have made room in host memory."""
        flight, depth, counters, demand = self.flight, self.depth, self.counters, self.demand
        while len(flight) < depth:
            load = self._next()
            if load is None:
                break
            chunk = load.issued
            num_bytes = self.chunk_bytes[chunk]
            self._copy(load.id, chunk, load.key, load.slot, num_bytes, 0 if chunk else load.after)
            is_demand = load in demand
            if load.cause == DEMAND:
                counters.demand_bytes += num_bytes
            else:
                counters.prefetch_bytes += num_bytes
            load.issued = chunk = chunk + 1
            flight.append(load)
            if chunk == self.num_chunks:
                if is_demand:
                    self._leave(load)
                elif load in self.begun:
                    self.begun.remove(load)
            elif not is_demand and load not in self.begun:
                self.begun.append(load)
        while self.num_reading < self.read_depth:
            key = self._next_read()
            if key < 0:
                break
            self._read(key)
        self.has_work = self._is_waiting()

    def _is_waiting(self) -> bool:
        return bool(self.demand or self.wanted or self.begun or self.partial)

    def _next(self) -> Load | None:
        there = self.memory.there
        for load in self.demand:
            if load.issued < there[load.key] and (load.slot >= 0 or self._start(load)):
                return load
        for load in self.begun:
            if load.issued < there[load.key]:
                return load
        return self._next_wanted() if self.wanted else None

    def _next_wanted(self) -> Load | None:
        """The best prefetch whose first bytes are in host memory; those that are refused a slot are dropped."""
        there, state, counters, wanted = self.memory.there, self.state, self.counters, self.wanted
        for place in range(len(wanted) - 1, -1, -1):
            key = wanted[place]
            if state[key] != ABSENT:
                # Only a key that was demanded meanwhile can have left ABSENT while it stood in the queue.
                del wanted[place]
                counters.dropped_became_demand += 1
            elif there[key]:
                del wanted[place]
                load = self._prefetch(key)
                if load is not None:
                    return load
        return None

    def _start(self, load: Load) -> bool:
        if not super()._start(load):
            return False
        if self.memory.used(load.key):
            self.counters.host_misses += 1
        else:
            self.counters.host_hits += 1
        return True

    def evict(self, key: int) -> None:
        super().evict(key)
        self.memory.eviction.freed(key)

    # -- reading ---------------------------------------------------------------------------------------------

    def _next_read(self) -> int:
        """The key whose next chunk is read; -1 where there is none, or no room for it."""
        asked, num_chunks = self.memory.asked, self.num_chunks
        for load in self.demand:
            key = load.key
            if asked[key] == num_chunks:
                continue
            if asked[key] or self._find_room(key, True):
                return key
        for key in self.partial:
            return key
        for key in reversed(self.wanted):
            if not asked[key]:
                return key if self._find_room(key, False) else -1
        return -1

    def _find_room(self, key: int, is_demanded: bool) -> bool:
        """A room in host memory for `key`. What is waited for stays; for a prefetch, what is wanted stays as well."""
        memory, counters = self.memory, self.counters
        if not memory.free:
            kept = {load.key for load in self.demand}
            if not is_demanded:
                kept.update(self.wanted)
            victim = memory.leave(kept)
            if victim is None:
                return False
            counters.host_evictions += 1
            if memory.fresh[victim]:
                memory.fresh[victim] = 0
                memory.num_fresh -= 1
                counters.reads_in_vain += 1
        memory.begin(key)
        self.partial[key] = None
        counters.num_reads += 1
        return True

    def _read(self, key: int) -> None:
        memory = self.memory
        chunk = memory.asked[key]
        self.machine.read(key, chunk, memory.room_of[key], self.chunk_bytes[chunk])
        self.reading.append((key, chunk))
        self.num_reading += 1
        memory.asked[key] = chunk + 1
        if chunk + 1 == self.num_chunks:
            del self.partial[key]

    def retire_reads(self, reads: Sequence[Read]) -> None:
        """Take note of reads that have ended, in order; before the copies of the same record."""
        memory, counters, last = self.memory, self.counters, self.num_chunks - 1
        for key, chunk, start_ns, end_ns in reads:
            due = self.reading.popleft()
            if due != (key, chunk):
                raise AssertionError(f"storage out of order: chunk {chunk} of {key} ended, {due} was due")
            self.num_reading -= 1
            counters.storage_busy_ns += end_ns - start_ns
            counters.read_bytes += self.chunk_bytes[chunk]
            memory.there[key] = chunk + 1
            if chunk == last:
                self.read_ns[key] = end_ns
                if self.state[key] == ABSENT:
                    memory.eviction.freed(key)

    # -- what the runtime tells ------------------------------------------------------------------------------

    def want(self, keys: Sequence[int]) -> None:
        super().want(keys)
        self.has_work = self._is_waiting()

    def arrive(self, layer: int, missing: Sequence[int], late: Sequence[int]) -> None:
        for load in [load for load in self.begun if load.key in late]:
            self.begun.remove(load)
            self.demand.append(load)
        super().arrive(layer, missing, late)
        self.has_work = self._is_waiting()

    def first_to_land(self, keys: Sequence[int]) -> int:
        """Of `keys`, which are waited for, the one whose last issued chunk is nearest to its end; the first of them
        where none is on the link. Loads from storage do not land in the order in which they were asked for."""
        last: dict[int, int] = {}
        for place, load in enumerate(self.flight):
            last[load.key] = place
        under_way = [key for key in keys if key in last]
        return min(under_way, key=last.__getitem__) if under_way else keys[0]

    def describe(self) -> str:
        memory = self.memory
        return (
            f"{super().describe()}, reads under way {list(self.reading)[:8]}, free in host memory {len(memory.free)} "
            f"of {memory.spec.num_slots}"
        )


def tiered(
    spec: HostMemorySpec,
    machine: Machine,
    slots: Slots,
    progress: Progress,
    counters: Counters,
    chunk_bytes: Sequence[int],
    depth: int,
    hooks: SlotHooks,
) -> TieredQueue:
    """The queue of a run whose host memory is that of `spec`; its other arguments are a `CopyQueue`'s."""
    memory = HostMemory(spec, len(slots.state), chunk_bytes)
    return TieredQueue(machine, slots, progress, counters, chunk_bytes, depth, hooks, memory)
