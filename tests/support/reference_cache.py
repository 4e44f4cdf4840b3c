"""Reference cache counts: what a policy must hit, miss and evict when copying takes no time.

Written to be read, not to be fast, from the event-atomic contract of the design alone, so that agreement with
the package means something. `count_hits` sorts the whole cache at every event; `count_hits_fast` is a second
implementation (one heap, lazy deletion) for recorded traces. Knows nothing of time, links, prefetches, files.

An *event* is `(layer, experts in touch order)`: the demand of one (forward, layer). Inside, an expert is
the int key `layer * num_experts + expert`.
"""

import heapq
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Event = tuple[int, list[int]]
Policy = Literal["lru", "lfu", "belady_forced", "belady_bypass"]
Scope = Literal["global", "layer"]
POLICIES: tuple[Policy, ...] = ("lru", "lfu", "belady_forced", "belady_bypass")


class Counts(NamedTuple):
    """What a replay without time yields; every miss is one load."""

    hits: int
    misses: int
    evictions: int

    @property
    def hit_rate(self) -> float:
        """Hits per access; 0.0 for an empty replay."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else 0.0


def add_counts(parts: Iterable[Counts]) -> Counts:
    """Sum of the counts of independent caches."""
    hits = misses = evictions = 0
    for part in parts:
        hits, misses, evictions = hits + part.hits, misses + part.misses, evictions + part.evictions
    return Counts(hits, misses, evictions)


# -- events --------------------------------------------------------------------------------------------------


def last_occurrences(experts: Iterable[int]) -> list[int]:
    """The distinct experts, in the order of their last occurrence."""
    flat = list(experts)
    return [expert for place, expert in enumerate(flat) if expert not in flat[place + 1 :]]


def batched_events(
    experts: npt.NDArray[np.integer], forwards: Iterable[Sequence[int]], padding: int | None = None
) -> Iterator[Event]:
    """Events of forwards that each hold several rows: layer by layer, row order then column order.

    `experts` is [T,L,K]; a forward is the row numbers it holds. Each expert is touched once, at its last
    occurrence. `padding` marks unused columns; by default the all-ones value of the array's type.
    """
    absent = int(np.iinfo(experts.dtype).max) if padding is None else padding
    for rows in forwards:
        block = experts[list(rows)].tolist()
        for layer in range(experts.shape[1]):
            chosen = [expert for row in block for expert in row[layer] if expert != absent]
            yield layer, last_occurrences(chosen)


def trace_events(experts: npt.NDArray[np.integer], padding: int | None = None) -> Iterator[Event]:
    """Events of a trace [T,L,K] replayed at batch size 1: every row is a forward of its own."""
    return batched_events(experts, ([row] for row in range(experts.shape[0])), padding)


def single_accesses(events: Iterable[Event]) -> Iterator[Event]:
    """The same demand as one event per access: what an access-by-access replay would (wrongly) see."""
    for layer, experts in events:
        for expert in experts:
            yield layer, [expert]


def ties_reversed(events: Iterable[Event]) -> Iterator[Event]:
    """The same demand with the first column the most recent: a near miss of the contract."""
    for layer, experts in events:
        yield layer, experts[::-1]


# -- capacity ------------------------------------------------------------------------------------------------


def per_layer_capacity(num_slots: int, num_layers: int) -> list[int]:
    """Slots of each layer: the floor of an equal share, the first layers one more until none is left."""
    share, left_over = divmod(num_slots, num_layers)
    return [share + 1 if layer < left_over else share for layer in range(num_layers)]


def _streams(
    events: Iterable[Event], num_layers: int, num_experts: int, capacity: int | Sequence[int], scope: Scope
) -> list[tuple[int, list[list[int]]]]:
    """The independent caches of a scope, each as (capacity, the expert keys of its events in touch order)."""
    keyed: list[tuple[int, list[int]]] = []
    for layer, experts in events:
        if not 0 <= layer < num_layers or not all(0 <= expert < num_experts for expert in experts):
            raise ValueError(f"event {(layer, experts)} is outside {num_layers} layers x {num_experts}")
        if len(set(experts)) != len(experts):
            raise ValueError(f"event {(layer, experts)} touches an expert twice; see last_occurrences")
        keyed.append((layer, [layer * num_experts + expert for expert in experts]))
    if isinstance(capacity, int):
        if scope != "global":
            raise ValueError("scope 'layer' takes a capacity per layer; see per_layer_capacity")
        streams = [(capacity, [keys for _, keys in keyed])]
    else:
        if scope != "layer" or len(capacity) != num_layers:
            raise ValueError(f"a list needs scope 'layer' and {num_layers} entries, got {capacity}")
        streams = [(room, [keys for layer, keys in keyed if layer == wanted]) for wanted, room in enumerate(capacity)]
    if any(room < 1 for room, _ in streams):
        raise ValueError(f"every cache needs a capacity of at least 1, got {capacity}")
    return streams


# -- the obvious implementation ------------------------------------------------------------------------------


def _replay_by_sorting(stream: list[list[int]], capacity: int, policy: Policy) -> Counts:
    """One cache, one sort of everything it could keep per event. Evicts from the front of that order."""
    uses: dict[int, list[int]] = defaultdict(list)
    for now, keys in enumerate(stream):
        for key in keys:
            uses[key].append(now)

    resident: set[int] = set()
    touched: dict[int, int] = {}  # sequence number of the last touch: larger = more recent
    num_uses: dict[int, int] = defaultdict(int)  # never forgotten: an LFU count outlives eviction
    num_touches = hits = misses = evictions = 0

    for now, keys in enumerate(stream):
        demand = set(keys)
        missing = demand - resident  # classified against the residents at the start of the event
        hits += len(demand) - len(missing)
        misses += len(missing)
        for key in keys:
            num_touches += 1
            touched[key] = num_touches
            num_uses[key] += 1

        def next_use(key: int, now: int = now) -> int:
            later = bisect_right(uses[key], now)
            return uses[key][later] if later < len(uses[key]) else len(stream)

        def leaves_first(key: int, demand: set[int] = demand) -> tuple[int, ...]:
            if policy == "lru":
                return (key in demand, touched[key])
            if policy == "lfu":
                return (key in demand, num_uses[key], touched[key])
            if policy == "belady_forced":
                return (key in demand, -next_use(key), touched[key])
            return (-next_use(key), touched[key])  # bypass: what was just demanded has no privilege

        pool = resident | demand
        leaving = set(sorted(pool, key=leaves_first)[: max(0, len(pool) - capacity)])
        # A bypassed expert is streamed past the cache and never held one of its slots: that is no eviction.
        evictions += len(leaving & resident) if policy == "belady_bypass" else len(leaving)
        resident = pool - leaving
    return Counts(hits, misses, evictions)


def count_hits(
    events: Iterable[Event],
    *,
    num_layers: int,
    num_experts: int,
    capacity: int | Sequence[int],
    policy: Policy,
    scope: Scope,
) -> Counts:
    """Hits, misses and evictions of a cold cache under the event-atomic contract.

    Demand is always admitted, but for `belady_bypass`, which keeps the nearest next uses of residents and
    demand. Of an event that demands more than the capacity, the last to leave in policy order stay; the
    contract is silent on that. `capacity` is an int for scope 'global', one per layer for scope 'layer',
    else a ValueError.
    """
    streams = _streams(events, num_layers, num_experts, capacity, scope)
    return add_counts(_replay_by_sorting(stream, room, policy) for room, stream in streams)


# -- the same with a heap ------------------------------------------------------------------------------------


def _next_uses(stream: list[list[int]]) -> list[list[int]]:
    """For each touch, the number of the next event that touches the same key; the stream's length if none."""
    upcoming: dict[int, int] = {}
    answer: list[list[int]] = []
    for now in range(len(stream) - 1, -1, -1):
        answer.append([upcoming.get(key, len(stream)) for key in stream[now]])
        upcoming.update(dict.fromkeys(stream[now], now))
    return answer[::-1]


def _replay_by_heap(stream: list[list[int]], capacity: int, policy: Policy) -> Counts:
    """One cache, one heap: priorities change only at a touch, so older entries of a key are skipped."""
    next_uses = _next_uses(stream) if policy.startswith("belady") else None
    heap: list[tuple[int, int, int]] = []
    current: dict[int, int] = {}  # resident key -> the touch that made its only valid heap entry
    num_uses: dict[int, int] = defaultdict(int)
    num_touches = hits = misses = evictions = 0

    def pop_victim() -> int | None:
        while heap:
            _, touch, key = heapq.heappop(heap)
            if current.get(key) == touch:
                del current[key]
                return key
        return None

    for now, keys in enumerate(stream):
        missing = [key for key in keys if key not in current]
        hits += len(keys) - len(missing)
        misses += len(missing)
        if policy != "belady_bypass":
            for key in keys:
                current[key] = -1  # matches no entry: an expert of this event is not a victim
            while len(current) > capacity and pop_victim() is not None:
                evictions += 1
        for column, key in enumerate(keys):
            num_touches += 1
            num_uses[key] += 1
            rank = -next_uses[now][column] if next_uses else num_uses[key] if policy == "lfu" else 0
            current[key] = num_touches
            heapq.heappush(heap, (rank, num_touches, key))
        while len(current) > capacity:  # bypass; or an event that alone demands more than the capacity
            evictions += pop_victim() not in missing or policy != "belady_bypass"
    return Counts(hits, misses, evictions)


def count_hits_fast(
    events: Iterable[Event],
    *,
    num_layers: int,
    num_experts: int,
    capacity: int | Sequence[int],
    policy: Policy,
    scope: Scope,
) -> Counts:
    """`count_hits` for recorded traces: same arguments, same answer, seconds for a million accesses."""
    streams = _streams(events, num_layers, num_experts, capacity, scope)
    return add_counts(_replay_by_heap(stream, room, policy) for room, stream in streams)


# -- access by access ----------------------------------------------------------------------------------------


def count_hits_per_access(accesses: Iterable[int], capacity: int) -> Counts:
    """The textbook LRU: each access in order, the victim leaves at once. Not this project's contract."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = misses = evictions = 0
    for key in accesses:
        if key in cache:
            hits += 1
            cache.move_to_end(key)
            continue
        misses += 1
        if len(cache) == capacity:
            evictions += 1
            cache.popitem(last=False)
        cache[key] = None
    return Counts(hits, misses, evictions)


def libcachesim_lru(accesses: Iterable[int], capacity: int) -> Counts:
    """The same count by the libcachesim package, written by others. ImportError where it is absent."""
    import libcachesim

    cache = libcachesim.LRU(cache_size=capacity, hashpower=12)
    request = libcachesim.Request(obj_size=1)
    hits = num_accesses = 0
    for key in accesses:
        request.obj_id = key
        hits += cache.get(request)
        num_accesses += 1
    misses = num_accesses - hits
    return Counts(hits, misses, misses - cache.get_n_obj())
