"""Host-to-device loads: what is wanted, in which order it is issued, who gives way, and what is under way.

Order of issue: demand (partly issued loads that became demand first, then misses in the order given), then
the started prefetch, then the wanted prefetches, best first. At most `channel_depth` chunks are issued and
not yet seen to have ended, since a CUDA stream cannot be reordered; demand overtakes prefetch at chunk
boundaries. A head that finds no slot does not block entries that have one. A started load is finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from expertflow.counters import Counters
from expertflow.machine import Chunk, Machine
from expertflow.parts import DEMAND, PREFETCH
from expertflow.slots import Slots
from expertflow.view import ABSENT, LOADING, RESIDENT, Progress


class Load:
    """One copy of an expert from host to GPU memory, in chunks."""

    __slots__ = ("after", "cause", "id", "issued", "key", "slot")

    def __init__(self, key: int, cause: int) -> None:
        self.id = 0
        self.key = key
        self.cause = cause
        self.slot = -1
        self.after = 0
        self.issued = 0


class SlotHooks(NamedTuple):
    """Who is asked for room, and who hears of slots that are taken and given up (`expertflow.parts.Eviction`, `Part`).

    The victim may be None: that refuses a prefetch, never a demand for good.
    """

    victim: Callable[[int, int], int | None]
    admitted: Callable[[int, int], None]
    evicted: Sequence[Callable[[int, bool], None]]
    landed: Sequence[Callable[[int], None]]


class CopyQueue:
    """Decides which chunk goes next, makes room for it and keeps the account of every load.

    Its fields are its own: others read `has_work`, `wanted` (prefetches not yet issued, best last), `demand` (loads
    whose experts are waited for), `flight` (loads by chunk on the link), `loading` (loads by key), `landed_ns` [N]
    (device time at which the last load of each key ended), `num_loads` and `num_landed` (loads that have begun, and
    that have ended), `num_fresh` (prefetched experts that were neither demanded nor evicted yet) and `num_launched`
    (experts whose kernels were launched, each time).
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
    ) -> None:
        if depth < 1:
            raise ValueError(f"channel_depth={depth} must be at least 1")
        self._copy = machine.copy
        self.slots = slots
        self.state, self._shown = slots.state, slots.shown
        self.progress = progress
        self.counters = counters
        self.chunk_bytes = chunk_bytes
        self.num_chunks = len(chunk_bytes)
        self.depth = depth
        self._victim, self._admitted, self._evicted_listeners, self._landed_listeners = hooks
        self._launched: list[tuple[int, Sequence[int]]] = []
        """(mark, keys) of the kernels launched in the current layer."""
        self.has_work = False
        """Whether anything waits to be issued: then the runtime wakes at the next chunk's end."""
        self.demand: deque[Load] = deque()
        self.started: Load | None = None
        self.wanted: list[int] = []
        self.flight: deque[Load] = deque()
        self.loading: dict[int, Load] = {}
        self.fresh = bytearray(len(slots.state))
        """1 while a prefetched expert has not been demanded, by key."""
        self.num_fresh = 0
        self.num_loads = 0
        self.num_landed = 0
        self.num_launched = 0
        self.num_reading = 0
        """Reads from storage that are under way; 0 where nothing lies below host memory."""
        self.streamed_event = -1
        self._behind: set[int] = set()
        """Wanted prefetches that no decision replaces: of experts that the host computes this time."""
        self._later: Sequence[int] = ()
        """Those of the layer whose routing was just read."""
        self.landed_ns = [0] * len(slots.state)

    # -- what the runtime tells ------------------------------------------------------------------------------

    def begin_layer(self, keys: Sequence[int]) -> None:
        """A layer that demands `keys` begins: book the prefetches among them as used, in time or late."""
        self._launched = []
        if not self.num_fresh:
            return
        fresh, counters = self.fresh, self.counters
        for key in keys:
            if fresh[key]:
                fresh[key] = 0
                self.num_fresh -= 1
                self.progress.num_used += 1
                if self.state[key] == RESIDENT:
                    counters.prefetch_useful += 1
                else:
                    counters.prefetch_late += 1

    def launched(self, mark: int, keys: Sequence[int]) -> None:
        """The kernels of `mark` read the slots of `keys`."""
        self._launched.append((mark, keys))
        self.num_launched += len(keys)

    @property
    def last_reader(self) -> int:
        """Mark of the kernels that were launched last in this layer; 0 = none are yet."""
        return self._launched[-1][0] if self._launched else 0

    def leave_out(self, before: Counters) -> None:
        """A warm-up ends, whose counters are `before`: what it has prefetched and not used yet, or wants, counts as the
        measured part's, as its slots do."""
        before.prefetch_issued -= self.num_fresh
        before.prefetch_requested -= self.num_fresh + len(self.wanted)

    # -- issuing ---------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Issue chunks up to the depth."""
        flight, depth, counters, demand = self.flight, self.depth, self.counters, self.demand
        while len(flight) < depth and (demand or self.wanted or self.started is not None):
            load = self._next()
            if load is None:
                break
            chunk = load.issued
            num_bytes = self.chunk_bytes[chunk]
            self._copy(load.id, chunk, load.key, load.slot, num_bytes, 0 if chunk else load.after)
            if load.cause == DEMAND:
                counters.demand_bytes += num_bytes
            else:
                counters.prefetch_bytes += num_bytes
            load.issued = chunk = chunk + 1
            flight.append(load)
            if chunk == self.num_chunks:
                # It waits in no queue any longer.
                if load is self.started:
                    self.started = None
                elif demand:
                    self._leave(load)
            elif load.cause == PREFETCH and not (demand and load in demand):
                self.started = load
        self.has_work = bool(demand or self.wanted) or self.started is not None

    def _next(self) -> Load | None:
        for load in self.demand:
            if load.slot >= 0 or self._start(load):
                return load
        if self.started is not None:
            return self.started
        wanted, state, counters = self.wanted, self.state, self.counters
        while wanted:
            key = wanted.pop()
            if state[key] != ABSENT:
                # Only a key that was demanded meanwhile can have left ABSENT while it stood in the queue.
                counters.dropped_became_demand += 1
                continue
            prefetch = self._prefetch(key)
            if prefetch is not None:
                return prefetch
        return None

    def _prefetch(self, key: int) -> Load | None:
        """Begin a prefetch, unless it is refused a slot."""
        load = Load(key, PREFETCH)
        if not self._start(load):
            self.counters.dropped_refused += 1
            return None
        self.counters.prefetch_issued += 1
        self.fresh[key] = 1
        self.num_fresh += 1
        return load

    def _start(self, load: Load) -> bool:
        """Give `load` a slot, if it gets one. Staging buffers are for demand alone."""
        key, slots = load.key, self.slots
        free = slots.free[key // slots.span]
        num_kept = slots.num_staging if load.cause == PREFETCH else 0
        if len(free) <= num_kept:
            victim = self._victim(key, load.cause)
            if victim is None and load.cause == DEMAND:
                victim = self._stream_victim(load)
            if victim is None:
                return False
            self.evict(victim)
        slot = load.slot = slots.slot_of[key] = free.pop()
        self.state[key] = LOADING
        if self._shown is not None:
            self._shown[key] = LOADING
        load.id = self.num_loads = self.num_loads + 1
        if slots.reader[slot] > load.after:
            load.after = slots.reader[slot]
        self.loading[key] = load
        self._admitted(key, load.cause)
        return True

    def evict(self, key: int) -> None:
        """`key` loses its slot now; a kernel of this layer that may still read it hands on its mark."""
        slots, state, counters = self.slots, self.state, self.counters
        reader = 0
        if self._launched and key // slots.num_experts == self.progress.layer:
            for mark, keys in self._launched:
                if key in keys:
                    reader = mark
        if state[key] != RESIDENT:
            raise AssertionError(f"key {key} gives up a slot in state {state[key]}")
        slot_of = slots.slot_of
        slot = slot_of[key]
        slot_of[key] = -1
        state[key] = ABSENT
        if self._shown is not None:
            self._shown[key] = ABSENT
        slots.reader[slot] = reader
        slots.free[key // slots.span].append(slot)
        unused = False
        if self.fresh[key]:
            unused = True
            self.fresh[key] = 0
            self.num_fresh -= 1
            counters.prefetch_evicted_unused += 1
        counters.num_evictions += 1
        for heard in self._evicted_listeners:
            heard(key, unused)

    def _stream_victim(self, load: Load) -> int | None:
        """More demand than slots: experts of this layer whose kernel is launched may give way after all."""
        launched = self._streamed()
        if not launched:
            return None
        progress = self.progress
        pinned = progress.pinned
        progress.pinned = frozenset(pinned) - launched
        victim = self._victim(load.key, load.cause)
        progress.pinned = pinned
        return victim

    def _streamed(self) -> set[int]:
        """Keys whose kernels this layer has launched; where there are any, the layer counts as streamed from now on."""
        launched = {key for _, keys in self._launched for key in keys}
        if launched and self.streamed_event != self.progress.event:
            self.streamed_event = self.progress.event
            self.counters.num_streamed_layers += 1
        return launched

    def _leave(self, load: Load) -> None:
        """The last chunk of `load` is issued: it is demanded no longer."""
        demand = self.demand
        if demand[0] is load:
            demand.popleft()
        elif load in demand:
            demand.remove(load)

    def retire(self, chunks: Sequence[Chunk]) -> None:
        """Take note of chunks that have ended, in stream order."""
        last = self.num_chunks - 1
        progress = self.progress
        for load_id, chunk, start_ns, end_ns in chunks:
            load = self.flight.popleft()
            if load.id != load_id:
                raise AssertionError(f"copy stream out of order: load {load_id} ended, {load.id} was due")
            progress.link_busy_ns += end_ns - start_ns
            progress.link_bytes += self.chunk_bytes[chunk]
            if chunk == last:
                key = load.key
                self.landed_ns[key] = end_ns
                self.num_landed += 1
                self.state[key] = RESIDENT
                if self._shown is not None:
                    self._shown[key] = RESIDENT
                del self.loading[key]
                for heard in self._landed_listeners:
                    heard(key)

    def want(self, keys: Sequence[int]) -> None:
        """Replace all prefetches not yet issued by `keys`, best first; what is there or under way is left out."""
        state = self.state
        new = [key for key in keys if not state[key]]
        old = self.wanted
        if self._behind:
            behind = [key for key in reversed(old) if key in self._behind]
            self._behind = set(behind)
            new = behind + [key for key in new if key not in self._behind]
        if not old:
            self.counters.prefetch_requested += len(new)
        elif new != old[::-1]:
            kept = len(set(new).intersection(old))
            self.counters.prefetch_requested += len(new) - kept
            self.counters.dropped_replaced += len(old) - kept
        new.reverse()
        self.wanted = new
        self.has_work = bool(new or self.demand) or self.started is not None

    def arrive(self, layer: int, missing: Sequence[int], late: Sequence[int]) -> None:
        """The routing of `layer` is known: drop its prefetches that are not demanded, queue the demand."""
        if self.wanted:
            num_experts, counters = self.slots.num_experts, self.counters
            later = self._later
            if later:
                self.wanted = [key for key in self.wanted if key not in later]
            keep = [key for key in self.wanted if key // num_experts != layer]
            if len(keep) != len(self.wanted):
                promoted = len(set(missing).intersection(self.wanted))
                counters.dropped_became_demand += promoted
                counters.dropped_passed += len(self.wanted) - len(keep) - promoted
                self.wanted = keep
            if later:
                self.wanted.extend(reversed(later))
                self._later = ()
        started = self.started
        if started is not None and started.key in late:
            self.demand.append(started)
            self.started = None
        for key in missing:
            self.demand.append(Load(key, DEMAND))
        self.has_work = bool(self.demand or self.wanted) or self.started is not None

    def leave_to_host(self, keys: Sequence[int], later: Sequence[int]) -> None:
        """The host computes `keys` of the layer whose routing was just read: drop their prefetches.

        later: those of them that are copied all the same, behind the demand (`arrive`) and before what else is wanted.
        """
        counters, before = self.counters, set(self.wanted)
        queued = before.intersection(keys)
        num_kept = len(queued.intersection(later))
        counters.dropped_became_host += len(queued) - num_kept
        counters.prefetch_requested += len(later) - num_kept
        self.wanted = [key for key in self.wanted if key not in queued] + list(reversed(later))
        self._later = later
        self._behind.update(later)

    def demand_after(self, key: int, after: int) -> None:
        """Queue the load of `key`, to start no sooner than the end of mark `after`, behind the demand that is there."""
        load = Load(key, DEMAND)
        load.after = after
        self.demand.append(load)
        self.has_work = True

    def loaded_bytes(self) -> int:
        """Bytes of all loads, as far as their chunks were issued."""
        rest = sum(sum(self.chunk_bytes[load.issued :]) for load in self.loading.values())
        return self.num_loads * sum(self.chunk_bytes) - rest

    def describe(self) -> str:
        """The state of the queue, for the message of a run that cannot go on."""
        states = self.state
        return (
            f"demand waiting {[load.key for load in self.demand]}, prefetch wanted {self.wanted[::-1][:8]}, "
            f"chunks in flight {[(load.key, load.issued) for load in self.flight]}, "
            f"resident {states.count(RESIDENT)}, loading {states.count(LOADING)}"
        )
