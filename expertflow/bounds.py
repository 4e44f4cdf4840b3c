"""A floor under the time of every schedule: what no policy, however clairvoyant, can go below.

floor = max over prefixes i of (loads of events 1…i · fastest load + one expert kernel + serial time of events
i+1…end), and the serial time of everything. An event is one (forward, layer); the loads are those of MIN with
bypass (Belady 1966, with a cache that may refuse): no schedule with the same slots loads less often, prefetch
or not. The last of them ends no sooner than their number times the fastest load; the kernel that waits for it
and all later events follow one after the other on the compute stream. Nothing else in event i need follow, so
its attention is left out. Serial time is the least of any schedule: where it depends on how experts are grouped into
launches, that of the cheapest grouping. One expert kernel is likewise the shortest launch that holds an expert.

With experts on the host the same schedule, with a load in place of each expert that the host computed, is one that
loads, and so has at least as many: loads and experts on the host together are no fewer than MIN's loads. Host and link
each take theirs one after the other, so that a prefix takes at least the least over k of max(k loads and a kernel, the
rest on the host); that copies and the host slow each other only adds to it. The serial time of an event is then that of
the quickest split of its experts between the two (`HostFloor.split_ns`).

With storage below host memory every demanded expert is in host memory when its kernel runs, since that holds what the
GPU does: the same argument holds with host memory in the place of the slots and reads in the place of copies. The floor
is the larger of the two.
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
    fewest loads of any schedule. binding_event: the prefix that binds, -1 if the serial time does. num_reads: the
    fewest reads from storage below host memory, 0 where nothing lies there."""

    floor_ns: int
    serial_ns: int
    num_loads: int
    binding_event: int
    num_reads: int = 0


@dataclass(frozen=True)
class HostFloor:
    """fastest_ns: no expert takes less on the host. round_trip_ns: nor do activations and results."""

    fastest_ns: int
    round_trip_ns: int

    def prefix_ns(self, num_loads: int, load_ns: int, kernel_ns: int) -> int:
        """The least time in which `num_loads` >= 1 experts are loaded, or computed on the host, however they are split.

        The loads' end rises with k, the host's falls: the least of the larger lies where they cross.
        """

        def of(num_loaded: int) -> int:
            on_host = num_loads - num_loaded
            loaded_ns = num_loaded * load_ns + kernel_ns if num_loaded else 0
            return max(loaded_ns, on_host * self.fastest_ns + self.round_trip_ns if on_host else 0)

        low, high = 0, num_loads
        while low < high:
            middle = (low + high) // 2
            on_host = num_loads - middle
            if middle * load_ns + kernel_ns < on_host * self.fastest_ns + self.round_trip_ns:
                low = middle + 1
            else:
                high = middle
        return min(of(low), of(max(low - 1, 0)))

    def split_ns(self, kernels_ns: Sequence[int]) -> int:
        """Least time of a layer's experts, `kernels_ns` [n] being no more than what 0, 1, 2 … of them take on the GPU,
        rising, the others meanwhile on the host."""
        num = len(kernels_ns) - 1
        host_ns = [on_host * self.fastest_ns + self.round_trip_ns if on_host else 0 for on_host in range(num + 1)]
        return min(max(gpu_ns, host_ns[num - on_gpu]) for on_gpu, gpu_ns in enumerate(kernels_ns))


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
    host: HostFloor | None = None,
) -> Floor:
    """totals: `min_loads`. serial_ns [events]: attention, routed experts, shared expert and unavoidable overhead
    of each event, however its experts are grouped. head_ns [forwards]: head with its overhead. kernel_ns: the shortest
    launch of a routed expert. host: None = no expert is computed there."""
    after = 0
    best, binding = 0, -1
    for event in range(len(totals) - 1, -1, -1):
        if event % num_layers == num_layers - 1:
            after += head_ns[event // num_layers]
        if totals[event]:
            if host is None:
                bound = totals[event] * fastest_load_ns + kernel_ns + after
            else:
                bound = host.prefix_ns(totals[event], fastest_load_ns, kernel_ns) + after
            if bound > best:
                best, binding = bound, event
        after += serial_ns[event]
    if after >= best:
        best, binding = after, -1
    return Floor(best, after, totals[-1] if totals else 0, binding)
