"""A floor under the time of every schedule: what no policy, however clairvoyant, can go below.

floor = max over prefixes i of (loads of events 1…i · fastest load + one expert kernel + serial time of events
i+1…end), and the serial time of everything. An event is one (forward, layer); the loads are those of MIN with
bypass (Belady 1966, with a cache that may refuse): no schedule with the same slots loads less often, prefetch
or not. The last of them ends no sooner than their number times the fastest load; the kernel that waits for it
and all later events follow one after the other on the compute stream. Nothing else in event i need follow, so
its attention is left out. Serial time is the least of any schedule: where it depends on how experts are grouped into
launches, that of the cheapest grouping. One expert kernel is likewise the shortest launch that holds an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from expertflow.forward import Forward
from expertflow.future import Future


@dataclass(frozen=True)
class Floor:
    """floor_ns: lower bound of elapsed_ns. serial_ns: compute and unavoidable overhead alone. num_loads: the
    fewest loads of any schedule. binding_event: the prefix that binds, -1 if the serial time does."""

    floor_ns: int
    serial_ns: int
    num_loads: int
    binding_event: int


def min_loads(forwards: Iterable[Forward], future: Future, num_slots: int, initial: Sequence[int] = ()) -> list[int]:
    """Loads that MIN with bypass has made by the end of each event, one pool of `num_slots`."""
    next_use = future.first_uses()
    # Which of `initial` fit depends on the cache's pools; that any of them may be there bounds them all.
    resident = set(initial)
    heap = [(-next_use[key], key) for key in resident]
    heapify(heap)
    loads, totals, event = 0, [], 0
    for forward in forwards:
        for keys in forward.demands:
            loads += sum(key not in resident for key in keys)
            for key, after in zip(keys, future.next_uses(event), strict=True):
                next_use[key] = after
                heappush(heap, (-after, key))
            resident.update(keys)
            while len(resident) > num_slots:
                rank, key = heappop(heap)
                if key in resident and -rank == next_use[key]:
                    resident.remove(key)
            if len(heap) > 8 * len(next_use):
                heap = [(-next_use[key], key) for key in resident]
                heapify(heap)
            totals.append(loads)
            event += 1
    return totals


def floor(
    totals: Sequence[int],
    serial_ns: Sequence[int],
    head_ns: Sequence[int],
    fastest_load_ns: int,
    kernel_ns: int,
    num_layers: int,
) -> Floor:
    """totals: `min_loads`. serial_ns [events]: attention, routed experts, shared expert and unavoidable overhead
    of each event, however its experts are grouped. head_ns [forwards]: head with its overhead. kernel_ns: the shortest
    launch of a routed expert."""
    after = 0
    best, binding = 0, -1
    for event in range(len(totals) - 1, -1, -1):
        if event % num_layers == num_layers - 1:
            after += head_ns[event // num_layers]
        if totals[event]:
            bound = totals[event] * fastest_load_ns + kernel_ns + after
            if bound > best:
                best, binding = bound, event
        after += serial_ns[event]
    if after >= best:
        best, binding = after, -1
    return Floor(best, after, totals[-1] if totals else 0, binding)
