"""Counts of host memory above storage, against a model of two lists that shares no code with it; and random runs of
which only what must hold of every run is known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.copy_queue import CopyQueue
from expertflow.evictions.lru import LRU
from expertflow.host_memory import LRU as HOST_LRU
from expertflow.host_memory import PAGE_CACHE, HostMemorySpec, LeastRecent, PageCache
from expertflow.orders.index import IndexOrder
from expertflow.orders.resident_first import ResidentFirst
from expertflow.view import ABSENT
from tests.support.runs import ConstantLink, Disk, Job, RandomKeys, build, compose, decode

NUM_LAYERS, NUM_EXPERTS = 2, 6


def counted(keys: list[int], num_slots: int, num_rooms: int) -> tuple[int, int, int, int]:
    """(GPU misses, host hits, host misses, host evictions) of one expert after the other, both caches by recency."""
    gpu: list[int] = []
    beside: list[int] = []  # in host memory, and not on the GPU
    misses = hits = reads = evictions = 0
    for key in keys:
        if key in gpu:
            gpu.remove(key)
            gpu.append(key)
            continue
        misses += 1
        if key in beside:
            hits += 1
            beside.remove(key)
        else:
            reads += 1
            if len(gpu) + len(beside) == num_rooms:
                beside.pop(0)
                evictions += 1
        if len(gpu) == num_slots:
            beside.append(gpu.pop(0))
        gpu.append(key)
    return misses, hits, reads, evictions


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_counts_are_those_of_two_lists(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 8))
    num_rooms = data.draw(st.integers(num_slots + 1, 12))
    expert = st.integers(0, NUM_EXPERTS - 1)
    tokens = data.draw(st.lists(st.tuples(expert, expert), min_size=1, max_size=25))
    routings = [[[first], [second]] for first, second in tokens]
    chunks = data.draw(st.sampled_from([(40,), (20, 20), (16, 16, 8)]))
    disk = Disk(latency_ns=data.draw(st.integers(0, 300)), ns_per_byte=data.draw(st.integers(0, 9)))
    job = build(
        decode(routings, NUM_EXPERTS),
        num_experts=NUM_EXPERTS,
        num_slots=num_slots,
        policy=compose(eviction=LRU()),
        chunk_bytes=chunks,
        disk=disk,
        storage=HostMemorySpec(num_rooms, data.draw(st.integers(1, 3))),
    ).run()
    keys = [layer * NUM_EXPERTS + experts[0] for routing in routings for layer, experts in enumerate(routing)]
    found = job.counters
    told = (found.num_misses, found.host_hits, found.host_misses, found.host_evictions)
    assert told == counted(keys, num_slots, num_rooms)


def random_job(seed: int, eviction: str) -> Job:
    """Prefetches at random, several experts a layer, more demand than slots now and then."""
    chance = random.Random(seed)
    top_k = chance.randint(1, 4)
    routings = [
        [chance.sample(range(NUM_EXPERTS), top_k) for _ in range(NUM_LAYERS)] for _ in range(chance.randint(1, 12))
    ]
    num_slots = chance.randint(1, 10)
    return build(
        decode(routings, NUM_EXPERTS),
        num_experts=NUM_EXPERTS,
        num_slots=num_slots,
        policy=compose(
            predictor=RandomKeys(seed, refreshes=chance.random() < 0.5),
            eviction=LRU(),
            order=chance.choice([IndexOrder, ResidentFirst])(),
        ),
        link=ConstantLink(ns_per_byte=chance.randint(0, 4)),
        chunk_bytes=chance.choice([(40,), (20, 20), (16, 16, 8)]),
        channel_depth=chance.randint(1, 3),
        disk=Disk(chance.randint(0, 200), chance.randint(0, 9), chance.choice([0, 3])),
        storage=HostMemorySpec(chance.randint(min(num_slots + 1, 12), 12), chance.randint(1, 4), eviction),
        initial=tuple(chance.sample(range(12), chance.choice([0, 5]))),
    )


@pytest.mark.parametrize("eviction", [HOST_LRU, PAGE_CACHE])
@pytest.mark.parametrize("group", range(4))
def test_random_runs_end_with_sound_books_and_wait_for_every_byte(group: int, eviction: str) -> None:
    for seed in range(group, 160, 4):
        job = random_job(seed, eviction).run()
        told, tier = job.timeline, job.runtime.tier
        assert tier is not None
        assert max((room for room in tier.memory.room_of), default=-1) < tier.memory.spec.num_slots
        counters, stalls = job.counters, [0, 0, 0, 0]
        for stall in told.stalls:
            stalls[stall.kind] += stall.end_ns - stall.start_ns
        assert stalls == [counters.late_stall_ns, counters.miss_stall_ns, 0, counters.storage_stall_ns]
        ends: dict[tuple[int, int], int] = {}
        events = sorted(
            [(read.end_ns, 0, read) for read in told.reads] + [(one.start_ns, 1, one) for one in told.copies]
        )
        for _, is_copy, one in events:
            if not is_copy:
                ends[one.key, one.chunk] = one.end_ns
            elif (one.key, one.chunk) in ends:
                assert one.start_ns >= ends[one.key, one.chunk]
            else:
                # It was in host memory from the start.
                assert one.key in job.runtime.config.initial
        assert all(after.start_ns >= before.end_ns for before, after in zip(told.reads, told.reads[1:], strict=False))


def test_what_the_gpu_holds_never_leaves_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    num_checked = 0
    retire = CopyQueue.retire

    def checked(queue: CopyQueue, chunks: object) -> None:
        nonlocal num_checked
        retire(queue, chunks)  # type: ignore[arg-type]
        memory = queue.memory  # type: ignore[attr-defined]
        held = [key for key, where in enumerate(queue.state) if where != ABSENT]
        assert all(memory.room_of[key] >= 0 for key in held)
        num_checked += len(held)

    monkeypatch.setattr(CopyQueue, "retire", checked)
    for seed in range(40):
        random_job(seed, HOST_LRU).run()
    assert num_checked > 1000


def test_the_slots_of_a_run_are_worth_no_more_with_all_in_host_memory() -> None:
    """A disk whose host memory holds all from the start costs nothing: the run is that without it."""
    for seed in range(30):
        chance = random.Random(seed)
        routings = [[chance.sample(range(NUM_EXPERTS), 2) for _ in range(NUM_LAYERS)] for _ in range(8)]

        def job(disk: Disk | None, routings: list[list[list[int]]] = routings, seed: int = seed) -> Job:
            return build(
                decode(routings, NUM_EXPERTS),
                num_experts=NUM_EXPERTS,
                num_slots=5,
                policy=compose(predictor=RandomKeys(seed)),
                chunk_bytes=(20, 20),
                disk=disk,
                storage=None if disk is None else HostMemorySpec(12),
                initial=tuple(range(12)),
            ).run()

        with_disk, without = job(Disk()), job(None)
        assert with_disk.timeline.reads == []
        assert with_disk.timeline.copies == without.timeline.copies
        assert with_disk.timeline.kernels == without.timeline.kernels


# -- evictions by hand ----------------------------------------------------------------------------------------------


def test_by_recency_what_was_freed_longest_ago_leaves_unless_it_is_kept() -> None:
    eviction = LeastRecent()
    for key in (1, 2, 3):
        eviction.read(key)
        eviction.freed(key)
    eviction.used(1)
    assert eviction.victim({2}) == 3
    assert eviction.victim({2}) is None
    eviction.freed(1)
    assert [eviction.victim(()), eviction.victim(()), eviction.victim(())] == [2, 1, None]


def read_and_use(cache: PageCache, key: int, times: int = 1) -> None:
    """`key` is read, and copied to the GPU and given up by it so often."""
    cache.read(key)
    for _ in range(times):
        cache.used(key)
        cache.freed(key)


def test_what_was_used_twice_outlives_a_scan_in_the_page_cache() -> None:
    cache = PageCache(expert_bytes=1000)
    read_and_use(cache, 1, times=2)
    for key in (2, 3, 4):
        read_and_use(cache, key)
    # One active, three inactive: below a gigabyte the active list may be as long as the inactive one.
    assert [cache.victim(()), cache.victim(())] == [2, 3]
    read_and_use(cache, 5)
    assert [cache.victim(()), cache.victim(()), cache.victim(())] == [4, 5, 1]
    assert cache.victim(()) is None


def test_an_active_list_that_is_too_long_gives_its_oldest_to_the_inactive_one() -> None:
    cache = PageCache(expert_bytes=1000)
    for key in (1, 2, 3):
        read_and_use(cache, key, times=2)
    read_and_use(cache, 4)
    # Three active beside one inactive: 1 becomes inactive behind 4, and two stand beside two.
    assert [cache.victim(()), cache.victim({2, 3}), cache.victim(())] == [4, 1, 2]


def test_at_ten_gigabytes_the_active_list_may_be_ten_times_as_long() -> None:
    cache = PageCache(expert_bytes=1 << 30)
    for key in range(1, 10):
        read_and_use(cache, key, times=2)
    read_and_use(cache, 10)
    assert cache.victim(()) == 10


def test_what_is_read_again_soon_after_it_left_is_active_at_once() -> None:
    cache = PageCache(expert_bytes=1000)
    for key in (1, 2):
        read_and_use(cache, key, times=2)
    for key in (3, 4):
        read_and_use(cache, key)
    assert cache.victim(()) == 3
    # Nothing has left since: 3 would still be there, were the cache larger by the two active ones.
    cache.read(3)
    cache.freed(3)
    read_and_use(cache, 5)
    assert cache.victim(()) == 4
    # When 4 left, 1 became inactive behind 5: three were active, beside 4 and 5.
    read_and_use(cache, 6)
    # Inactive 5, 1, 6, active 2, 3; 2 follows 6 when that is inactive alone.
    assert [cache.victim(()) for _ in range(5)] == [5, 1, 6, 2, 3]
