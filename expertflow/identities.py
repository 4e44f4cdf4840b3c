"""The identities that hold over every whole run, in both worlds."""

from __future__ import annotations

from collections.abc import Mapping

from expertflow.copy_queue import CopyQueue
from expertflow.counters import Counters
from expertflow.tiered_queue import TieredQueue
from expertflow.view import ABSENT


def check_identities(counters: Counters, queue: CopyQueue, num_on_host: int = 0) -> None:
    """AssertionError if the books of a finished run do not balance: a mistake of ours, never the user's.

    num_on_host: results that came from the host.
    """
    c = counters
    issued = c.prefetch_useful + c.prefetch_late + c.prefetch_evicted_unused + queue.num_fresh
    dropped = c.dropped_replaced + c.dropped_passed + c.dropped_refused + c.dropped_became_demand
    dropped += c.dropped_became_host
    checks = {
        "experts launched + computed on the host = experts demanded": (
            queue.num_launched + num_on_host,
            c.num_accesses,
        ),
        "accesses = hits + late + misses + host": (
            c.num_accesses,
            c.num_hits + c.num_late + c.num_misses + c.num_host,
        ),
        "placed on the host = computed there": (c.num_host, num_on_host),
        "elapsed = compute + stall + overhead": (c.elapsed_ns, c.compute_ns + c.stall_ns + c.overhead_ns),
        "prefetches issued = used + evicted unused + unused at end": (c.prefetch_issued, issued),
        "bytes = chunks x size": (c.demand_bytes + c.prefetch_bytes, queue.loaded_bytes()),
        "requested = issued + dropped + queued at end": (
            c.prefetch_requested,
            c.prefetch_issued + dropped + len(queue.wanted),
        ),
    }
    _hold(checks)
    if c.link_busy_ns > c.elapsed_ns:
        raise AssertionError(f"link busy {c.link_busy_ns} ns in a run of {c.elapsed_ns} ns")
    if c.host_busy_ns > c.elapsed_ns:
        raise AssertionError(f"host busy {c.host_busy_ns} ns in a run of {c.elapsed_ns} ns")


def check_storage(counters: Counters, queue: TieredQueue) -> None:
    """The same of what lies below host memory."""
    c, memory = counters, queue.memory
    asked = c.num_reads * sum(queue.chunk_bytes) - sum(
        sum(queue.chunk_bytes[memory.asked[key] :]) for key in queue.partial
    )
    asked -= sum(queue.chunk_bytes[chunk] for _, chunk in queue.reading)
    held = sum(room >= 0 for room in memory.room_of)
    on_gpu_alone = sum(where != ABSENT and memory.room_of[key] < 0 for key, where in enumerate(queue.slots.state))
    _hold(
        {
            "loads = host hits + host misses": (queue.num_loads, c.host_hits + c.host_misses),
            "reads = host misses + read in vain + not copied at end": (
                c.num_reads,
                c.host_misses + c.reads_in_vain + memory.num_fresh,
            ),
            "there at the start + reads = evictions + there at the end": (
                memory.num_initial + c.num_reads,
                c.host_evictions + held,
            ),
            "rooms = taken + free": (memory.spec.num_slots, held + len(memory.free)),
            "bytes read = chunks x size": (c.read_bytes, asked),
            "experts on the GPU that host memory does not hold": (on_gpu_alone, 0),
        }
    )
    if c.storage_busy_ns > c.elapsed_ns:
        raise AssertionError(f"storage busy {c.storage_busy_ns} ns in a run of {c.elapsed_ns} ns")


def _hold(checks: Mapping[str, tuple[int, int]]) -> None:
    for name, (left, right) in checks.items():
        if left != right:
            raise AssertionError(f"identity broken: {name}: {left} != {right}")
