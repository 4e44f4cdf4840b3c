"""Experts on a disk, worked out by hand to the nanosecond: reads, the copies that wait for them, and whose wait it is.

Unless a test says otherwise: attention 100 ns, one expert 10, head 50; an expert is 40 bytes in two chunks of 20, which
take the disk 5 ns until the first byte and 2 a byte (40), the link 1 a byte (20); two reads at once, two chunks on the
link; all else is free. Keys of layer 0 are 0 … 9, of layer 1 10 … 19.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from expertflow.evictions.lru import LRU
from expertflow.host_memory import PAGE_CACHE, HostMemorySpec
from expertflow.observer import LATE, MISS, STORAGE_STALL
from expertflow.orders.index import IndexOrder
from expertflow.view import Feedback
from sim.machine.simulated import HostCosts
from tests.support.runs import Copy, Disk, Job, Kernel, Scripted, Stall, compose, decode, run

NUM_EXPERTS = 10


def go(*routings: Sequence[Sequence[int]], rooms: int = 9, depth: int = 2, **given: Any) -> Job:
    """Run one token per routing (routings[f][l] = experts), with so many experts in host memory."""
    given.setdefault("disk", Disk())
    given.setdefault("num_slots", 4)
    given.setdefault("chunk_bytes", (20, 20))
    parts = {name: given.pop(name) for name in ("predictor", "eviction", "order") if name in given}
    storage = HostMemorySpec(rooms, depth, given.pop("host_eviction", "lru"))
    policy = compose(**parts)
    return run(decode(routings, NUM_EXPERTS), num_experts=NUM_EXPERTS, policy=policy, storage=storage, **given)


def test_a_chunk_is_copied_once_its_own_bytes_are_there_while_the_next_is_read() -> None:
    job = go([[6]])
    # Both requests go out at 100; the second one's first byte comes meanwhile.
    assert job.timeline.reads == [Copy(6, 0, 100, 145), Copy(6, 1, 145, 185)]
    assert job.timeline.copies == [Copy(6, 0, 145, 165), Copy(6, 1, 185, 205)]
    assert job.timeline.kernels[1:] == [Kernel("experts", 0, (6,), 205, 215), Kernel("head", 0, (), 215, 265)]
    assert job.timeline.stalls == [Stall(100, 185, 6, STORAGE_STALL), Stall(185, 205, 6, MISS)]
    counters = job.counters
    assert (counters.storage_stall_ns, counters.miss_stall_ns, counters.elapsed_ns) == (85, 20, 265)
    assert (counters.num_reads, counters.read_bytes, counters.storage_busy_ns) == (1, 40, 85)
    assert (counters.host_hits, counters.host_misses, counters.host_evictions) == (0, 1, 0)
    assert (counters.num_misses, counters.num_hits) == (1, 0)


def test_a_part_hears_what_of_a_stall_was_the_disks() -> None:
    """Read until 185, landed at 205; the second layer's expert is in host memory and lands 40 after it is known."""

    class Told(LRU):
        """Notes feedback."""

        def feedback(self, feedback: Feedback) -> None:
            told.append(feedback)

    told: list[Feedback] = []
    go([[6], [3]], [[3], [3]], eviction=Told(), initial=(5, 13), num_slots=1, rooms=4)
    assert told[0] == Feedback(0, 105, 0, 1, 0, 85)
    assert told[1] == Feedback(1, 40, 0, 1)


def test_one_read_at_a_time_waits_for_each_first_byte() -> None:
    job = go([[6]], depth=1)
    assert job.timeline.reads == [Copy(6, 0, 100, 145), Copy(6, 1, 145, 190)]
    assert job.timeline.copies == [Copy(6, 0, 145, 165), Copy(6, 1, 190, 210)]


def test_what_is_in_host_memory_is_copied_at_once() -> None:
    # Host memory holds 6 from the start: the GPU has one slot, which 5 fills.
    job = go([[6]], initial=(5, 6), num_slots=1, rooms=3)
    assert job.timeline.reads == []
    assert job.timeline.copies == [Copy(6, 0, 100, 120), Copy(6, 1, 120, 140)]
    assert job.timeline.stalls == [Stall(100, 140, 6, MISS)]
    assert (job.counters.host_hits, job.counters.host_misses) == (1, 0)


def test_what_is_there_overtakes_what_is_read_and_runs_first() -> None:
    # Of one layer, 6 on the disk and 7 in host memory: 7 is copied and computed while 6 is read.
    job = go([[6, 7]], initial=(4, 5, 7), num_slots=2, rooms=5)
    assert job.timeline.copies == [
        Copy(7, 0, 100, 120),
        Copy(7, 1, 120, 140),
        Copy(6, 0, 145, 165),
        Copy(6, 1, 185, 205),
    ]
    assert [kernel.keys for kernel in job.timeline.experts()] == [(7,), (6,)]
    assert job.timeline.experts()[0] == Kernel("experts", 0, (7,), 140, 150)
    assert job.timeline.stalls == [
        Stall(100, 140, 7, MISS),
        Stall(150, 185, 6, STORAGE_STALL),
        Stall(185, 205, 6, MISS),
    ]


def test_a_strict_order_waits_for_the_one_that_is_read() -> None:
    job = go([[6, 7]], initial=(4, 5, 7), num_slots=2, rooms=5, order=IndexOrder())
    assert [(kernel.keys, kernel.start_ns) for kernel in job.timeline.experts()] == [((6, 7), 205)]


def test_a_link_slower_than_the_disk_holds_the_copy_and_the_stall_says_so() -> None:
    job = go([[6]], disk=Disk(latency_ns=0, ns_per_byte=0))
    assert job.timeline.copies == [Copy(6, 0, 100, 120), Copy(6, 1, 120, 140)]
    assert job.timeline.stalls == [Stall(100, 140, 6, MISS)]
    assert job.counters.storage_stall_ns == 0
    assert job.counters.host_misses == 1


def test_what_the_gpu_gives_up_stays_in_host_memory() -> None:
    # One slot: 6 and 7 push each other out of it, but not out of host memory.
    job = go([[6]], [[7]], [[6]], [[7]], num_slots=1, rooms=2)
    assert job.counters.num_misses == 4
    assert (job.counters.host_misses, job.counters.host_hits, job.counters.host_evictions) == (2, 2, 0)
    assert {read.key for read in job.timeline.reads} == {6, 7}


def test_the_least_recently_used_leaves_host_memory_and_is_read_again() -> None:
    # Two rooms, one of which the GPU's slot holds: of 5, 6, 7, 5 each is read.
    job = go([[5]], [[6]], [[7]], [[5]], num_slots=1, rooms=2)
    assert (job.counters.host_misses, job.counters.host_hits, job.counters.host_evictions) == (4, 0, 2)
    assert [read.key for read in job.timeline.reads[::2]] == [5, 6, 7, 5]
    # With a third room 5, the oldest, leaves for none of them.
    job = go([[5]], [[6]], [[7]], [[5]], num_slots=1, rooms=3)
    assert (job.counters.host_misses, job.counters.host_hits, job.counters.host_evictions) == (3, 1, 0)


def test_a_read_waits_for_room_until_the_gpu_has_given_up_an_expert() -> None:
    # The slot holds 4, the other room 6 once it is read; 7 finds room when 6 takes the slot from 4, at 145.
    job = go([[6, 7]], initial=(4,), num_slots=1, rooms=2)
    assert job.timeline.reads == [
        Copy(6, 0, 100, 145),
        Copy(6, 1, 145, 185),
        Copy(7, 0, 185, 225),
        Copy(7, 1, 225, 265),
    ]
    # 7 takes the slot when 6 has been computed: 6 landed at 205.
    assert job.timeline.copies[2:] == [Copy(7, 0, 225, 245), Copy(7, 1, 265, 285)]
    assert job.counters.num_streamed_layers == 1
    assert job.counters.host_evictions == 1


def test_a_prefetch_is_read_and_copied_while_the_gpu_computes() -> None:
    # Wanted at 100 for layer 1, read until 185, copied until 205: layer 1 is routed at 210.
    script = {(0, 0, 1): [16]}
    job = go([[3], [6]], initial=(3,), predictor=Scripted(script))
    assert job.timeline.reads == [Copy(16, 0, 100, 145), Copy(16, 1, 145, 185)]
    assert job.timeline.copies == [Copy(16, 0, 145, 165), Copy(16, 1, 185, 205)]
    assert job.counters.stall_ns == 0
    assert (job.counters.prefetch_useful, job.counters.host_misses) == (1, 1)


def test_a_prefetch_that_is_demanded_half_read_stalls_on_the_disk() -> None:
    slow = Disk(latency_ns=5, ns_per_byte=4)
    job = go([[3], [6]], initial=(3,), predictor=Scripted({(0, 0, 1): [16]}), disk=slow)
    # Read from 100: 185, 265; its first chunk is copied before the routing at 210, so that it is late.
    assert job.timeline.copies == [Copy(16, 0, 185, 205), Copy(16, 1, 265, 285)]
    assert job.timeline.stalls == [Stall(210, 265, 16, STORAGE_STALL), Stall(265, 285, 16, LATE)]
    assert (job.counters.prefetch_late, job.counters.num_late) == (1, 1)


def test_demand_is_read_before_prefetches_but_a_read_that_was_begun_goes_on() -> None:
    # 16 and 17 are wanted at 100; 12 is demanded at 210, when both chunks of 16 and one of 17 were asked for.
    slow = Disk(latency_ns=5, ns_per_byte=4)
    job = go([[3], [2]], initial=(3,), predictor=Scripted({(0, 0, 1): [16, 17]}), disk=slow)
    keys = [(read.key, read.chunk) for read in job.timeline.reads]
    assert keys[:5] == [(16, 0), (16, 1), (17, 0), (12, 0), (12, 1)]
    assert job.counters.dropped_passed + job.counters.prefetch_issued == 2


def test_a_read_that_nobody_wants_any_more_is_finished_and_leaves_for_the_demand() -> None:
    # 16 is wanted at 100 and read until 265. 12 is demanded at 210 and finds no room until then: the slot holds 3.
    slow = Disk(latency_ns=5, ns_per_byte=4)
    script = Scripted({(0, 0, 1): [6 + NUM_EXPERTS]})
    job = go([[3], [2]], initial=(3,), num_slots=1, rooms=2, predictor=script, chunk_bytes=(40,), disk=slow)
    assert job.timeline.reads == [Copy(16, 0, 100, 265), Copy(12, 0, 265, 430)]
    assert job.timeline.copies == [Copy(12, 0, 430, 470)]
    assert job.timeline.stalls == [Stall(210, 430, 12, STORAGE_STALL), Stall(430, 470, 12, MISS)]
    counters = job.counters
    assert (counters.num_reads, counters.host_misses, counters.reads_in_vain, counters.host_evictions) == (2, 1, 1, 1)


def test_an_issued_read_keeps_the_host_busy() -> None:
    job = go([[6]], disk=Disk(issue_ns=3), costs=HostCosts(issue_ns=1))
    # Two requests are issued by 103 and 106, the copies a nanosecond after their bytes were seen.
    assert job.timeline.reads == [Copy(6, 0, 103, 148), Copy(6, 1, 148, 188)]
    assert job.timeline.copies == [Copy(6, 0, 149, 169), Copy(6, 1, 189, 209)]


def test_in_turn_the_next_expert_is_read_when_the_one_before_has_been_computed() -> None:
    job = go([[6, 7]], serial=True)
    assert [read.key for read in job.timeline.reads] == [6, 6, 7, 7]
    assert job.timeline.reads[2].start_ns >= job.timeline.copies[1].end_ns


def test_host_memory_holds_what_the_gpu_does_and_one_more() -> None:
    with pytest.raises(ValueError, match="host_memory_gb: 4 experts fit, and host memory holds what the GPU's 4 slots"):
        go([[6]], rooms=4)
    assert go([[6]], num_slots=10, rooms=10).counters.num_reads == 1


@pytest.mark.parametrize("eviction", ["lru", PAGE_CACHE])
def test_an_eviction_is_chosen_by_name(eviction: str) -> None:
    assert go([[6]], host_eviction=eviction).counters.host_misses == 1
    with pytest.raises(ValueError, match=r"storage\.eviction='fifo' is unknown; choose one of: lru, page_cache"):
        go([[6]], host_eviction="fifo")
