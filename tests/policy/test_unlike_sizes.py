"""Experts of unlike sizes: hits, evictions and bytes of a byte budget, against a model that shares no code with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.bounds import min_loads
from expertflow.byte_slots import ByteRoom, ByteSlots, split_by_layer
from expertflow.evictions.lfu import LFU
from expertflow.evictions.lru import LRU
from expertflow.evictions.outlook import Outlook
from expertflow.evictions.two_level_lru import TwoLevelLRU
from expertflow.expert_sizes import most_that_fit
from expertflow.future import Future
from expertflow.horizons.fixed import FixedHorizon
from expertflow.parts import Eviction
from tests.support.runs import (
    IDEAL_LINK,
    Job,
    RandomKeys,
    Scripted,
    compose,
    decode,
    eviction_named,
    run,
)

E = 4


def room_of(sizes: Sequence[int], room_bytes: int, chunk: int = 1 << 30) -> ByteRoom:
    """Chunks of at most `chunk` bytes, the last one what is left."""
    return ByteRoom(room_bytes, tuple((chunk,) * ((size - 1) // chunk) + ((size - 1) % chunk + 1,) for size in sizes))


def job(routings: Any, sizes: Sequence[int], room_bytes: int, *, chunk: int = 1 << 30, **more: Any) -> Job:
    forwards = decode(routings, len(sizes) // len(routings[0]))
    more.setdefault("link", IDEAL_LINK)
    num = len(sizes) // len(routings[0])
    mean = -(-sum(sizes) // len(sizes))
    more |= {"num_slots": max(room_bytes // mean, 1), "chunk_bytes": (mean,)}
    return run(forwards, num_experts=num, room=room_of(sizes, room_bytes, chunk), **more)


def counted(found: Job) -> tuple[int, int, int, int]:
    c = found.counters
    return c.num_hits, c.num_misses, c.num_evictions, c.demand_bytes + c.prefetch_bytes


def lru_by_bytes(events: Sequence[Sequence[int]], sizes: Sequence[int], room: int) -> tuple[int, int, int, int]:
    """Least recently used with so many bytes, an event at a time: its experts are touched, then each miss in turn lets
    the oldest that it does not demand leave until it fits; where that is not enough, what it demands itself."""
    held: set[int] = set()
    used: dict[int, int] = {}
    hits = misses = evictions = moved = 0
    for keys in events:
        missing = [key for key in keys if key not in held]
        hits += len(keys) - len(missing)
        used |= {key: place for place, key in enumerate(keys, max(used.values(), default=0) + 1)}
        for key in missing:
            misses += 1
            moved += sizes[key]
            while sum(sizes[one] for one in held) + sizes[key] > room:
                held.remove(min(held, key=lambda one: (one in keys, used[one])))
                evictions += 1
            held.add(key)
    return hits, misses, evictions, moved


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[list[int]]], list[int], int]:
    """Routings [forwards][2 layers][1 or 2 of E experts], sizes of the keys, and room for at least two experts."""
    layer = st.lists(st.integers(0, E - 1), min_size=2, max_size=2, unique=True).map(sorted)
    routings = draw(st.lists(st.lists(layer, min_size=2, max_size=2), min_size=1, max_size=12))
    sizes = draw(st.lists(st.integers(1, 9), min_size=2 * E, max_size=2 * E))
    return routings, sizes, draw(st.integers(2 * max(sizes), max(sum(sizes), 2 * max(sizes))))


@given(cases(), st.sampled_from([1 << 30, 3]))
@settings(max_examples=150, deadline=None)
def test_lru_counts_hits_evictions_and_bytes_as_a_second_model_does(case: Any, chunk: int) -> None:
    routings, sizes, room = case
    events = [[layer * E + one for one in row] for forward in routings for layer, row in enumerate(forward)]
    assert counted(job(routings, sizes, room, chunk=chunk)) == lru_by_bytes(events, sizes, room)


@given(cases(), st.integers(0, 99), st.sampled_from(["lru", "two_level", "outlook", "lfu"]), st.integers(1, 3))
@settings(max_examples=120, deadline=None)
def test_no_policy_ever_holds_more_than_the_budget(case: Any, seed: int, name: str, depth: int) -> None:
    """Also with prefetches on a slow link, in chunks: identities of bytes are checked by the run."""
    routings, sizes, room = case
    held: list[int] = []

    def watched(cls: type[Any]) -> Eviction:
        class Watched(cls):  # type: ignore[misc]
            def admitted(self, key: int, cause: int) -> None:
                super().admitted(key, cause)
                held.append(sum(sizes[one] for one, state in enumerate(self.view.residency) if state))

        return Watched()  # type: ignore[no-any-return]

    kinds = {"lru": LRU, "two_level": TwoLevelLRU, "outlook": Outlook, "lfu": LFU}
    policy = compose(predictor=RandomKeys(seed, True), horizon=FixedHorizon(1), eviction=watched(kinds[name]))
    found = job(routings, sizes, room, chunk=4, policy=policy, link=None, channel_depth=depth)
    assert max(held) <= room
    copied: dict[int, int] = {}
    for copy in found.timeline.copies:
        copied[copy.key] = copied.get(copy.key, 0) + copy.end_ns - copy.start_ns
    assert all(num % sizes[key] == 0 for key, num in copied.items())  # a byte takes a ns: whole experts alone


@given(cases(), st.integers(0, 99), st.sampled_from(["lru", "two_level", "lfu"]), st.sampled_from(["global", "layer"]))
@settings(max_examples=80, deadline=None)
def test_alike_sizes_by_bytes_run_as_slots_do_to_the_nanosecond(case: Any, seed: int, name: str, scope: str) -> None:
    routings, sizes, _ = case
    num_slots = 2 + sizes[0] % 6
    policies = [
        compose(predictor=RandomKeys(seed, True), horizon=FixedHorizon(1), eviction=eviction_named(name, scope))
        for _ in range(2)
    ]
    forwards = decode(routings, E)
    common: dict[str, Any] = {"num_experts": E, "num_slots": num_slots, "chunk_bytes": (4, 3)}
    slots = run(forwards, policy=policies[0], **common)
    by_bytes = run(forwards, policy=policies[1], room=ByteRoom(7 * num_slots, ((4, 3),) * (2 * E)), **common)
    assert slots.timeline.copies == by_bytes.timeline.copies
    assert slots.timeline.kernels == by_bytes.timeline.kernels
    assert slots.counters == by_bytes.counters


# -- by hand -------------------------------------------------------------------------------------------------


def test_who_leaves_is_decided_for_each_miss_not_after_the_layer() -> None:
    """Least frequently used, room for 8 bytes: 0 and 3 take 4, 1 and 2 take 2.

    When 2 and 3 are demanded, 3 lacks 4 bytes. 2 is pinned, so that 1 leaves, used once, and then 0, used twice; the
    last demand of 0 misses, and 3 leaves for it. After the layer 12 bytes would be held: 1 would leave and then 3, used
    once as well, so that 0 would hit: 3 hits, 4 misses, 2 evictions.
    """
    routings = [[[0]], [[0]], [[1]], [[2]], [[2, 3]], [[0]]]
    found = job(routings, [4, 2, 2, 4], 8, policy=compose(eviction=LFU()), top_k=2)
    assert counted(found) == (2, 5, 3, 16)
    assert [bool(one) for one in found.runtime.view.residency] == [True, False, True, False]


def test_a_prefetch_that_is_refused_midway_evicts_nobody() -> None:
    """3 (4 bytes) is wanted while layer 0 holds 0 (2) and pins 1 (2): one could leave, not both, so that none does."""
    script = {(1, 0, 1): [4 + 3]}
    sizes = [2, 2, 4, 4, 1, 1, 1, 4]
    policy = compose(predictor=Scripted(script), horizon=FixedHorizon(1))
    found = job([[[0], [0]], [[1], [0]]], sizes, 5, policy=policy)
    c = found.counters
    assert (c.dropped_refused, c.prefetch_bytes, c.num_evictions) == (1, 0, 0)
    assert counted(found) == (1, 3, 0, 5)


def test_a_two_size_run_to_the_nanosecond() -> None:
    """Attention 100 ns, an expert 10, head 50, a byte 1 ns. Layers of 40 and 90 bytes an expert, room for 130.

    Forward 0: attention ends at 100, expert 0 lands at 140, runs to 150; attention to 250, expert 4 (90) lands at 340,
    runs to 350; head to 400. Forward 1: attention to 500, expert 1 (40): 0 leaves, lands at 540, runs to 550; attention
    to 650; 5 (90): 4, used before 1, leaves and is enough: lands at 740, runs to 750; head to 800. Forward 2:
    attention to 900, 1 hits, runs to 910; attention to 1010; 4 (90): 5 leaves, lands at 1100, runs to 1110; head to
    1160.
    """
    sizes = [40] * 4 + [90] * 4
    found = job([[[0], [0]], [[1], [1]], [[1], [0]]], sizes, 130, link=None)
    assert [(one.key, one.start_ns, one.end_ns) for one in found.timeline.copies] == [
        (0, 100, 140),
        (4, 250, 340),
        (1, 500, 540),
        (5, 650, 740),
        (4, 1010, 1100),
    ]
    assert [one.end_ns for one in found.timeline.experts()] == [150, 350, 550, 750, 910, 1110]
    assert found.timeline.ends_ns == [400, 800, 1160]
    assert counted(found) == (1, 5, 3, 350)
    # Slots of the mean, 65 bytes, would be two as well, and move 65 bytes each.
    assert found.counters.link_busy_ns == 350


def test_a_copy_waits_for_the_last_reader_of_all_its_victims() -> None:
    """A streamed layer: 0 and 1 (40 bytes each) fit, 2 (80) must wait until both have been read.

    Attention to 100; 0 lands at 140 and runs to 150, 1 lands at 180 and runs to 190 (launched when it landed); 2 takes
    the bytes of both, so that its copy starts no sooner than 190 and ends at 270.
    """
    found = job([[[0, 1, 2]]], [40, 40, 80], 80, link=None, top_k=3)
    assert [(one.key, one.start_ns, one.end_ns) for one in found.timeline.copies] == [
        (0, 100, 140),
        (1, 140, 180),
        (2, 190, 270),
    ]
    assert found.counters.num_streamed_layers == 1


def test_pieces_hand_on_the_last_mark_of_what_is_taken() -> None:
    slots = ByteSlots(1, 4, "global", 0, [3, 3, 2, 5], 8)
    assert (slots.take(0), slots.take(1), slots.take(2)) == (0, 0, 0)
    slots.give(0, 7)
    slots.give(1, 5)
    # 5 bytes: the 3 given up last, then 2 of the others.
    assert slots.take(3) == 7
    assert slots.pieces == [[(1, 7)]]
    assert slots.free_bytes == [1]


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (800, [200, 600]),  # its share of the bytes: half of each
        (500, [200, 300]),  # shares of 125 and 375: one whole expert each, and the 100 left over are one of layer 0
        (1600, [400, 1200]),
    ],
)
def test_a_cache_split_by_layer_gives_each_its_share_of_the_bytes(room: int, expected: list[int]) -> None:
    assert split_by_layer(room, [100] * 4 + [300] * 4, 2) == expected


def fewest_loads(events: Sequence[Sequence[int]], sizes: Sequence[int], room: int) -> int:
    """Of any cache of so many bytes that may refuse what was demanded, by following every set that it could hold."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for keys in events:
        reached: dict[frozenset[int], int] = {}
        for held, loads in best.items():
            pool = sorted(held.union(keys))
            for chosen in range(1 << len(pool)):
                kept = frozenset(key for place, key in enumerate(pool) if chosen >> place & 1)
                if sum(sizes[key] for key in kept) <= room:
                    cost = loads + len(set(keys) - held)
                    reached[kept] = min(cost, reached.get(kept, cost))
        best = reached
    return min(best.values())


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True), min_size=1, max_size=7),
    st.lists(st.integers(1, 6), min_size=4, max_size=4),
    st.integers(0, 12),
)
@settings(max_examples=80, deadline=None)
def test_the_loads_of_the_floor_are_no_more_than_those_of_any_cache(
    events: list[list[int]], sizes: list[int], more: int
) -> None:
    room = max(sizes) + more
    forwards = decode([[keys] for keys in events], 4)
    bound = min_loads(forwards, Future(forwards, 4), most_that_fit(sizes, room))[-1]
    assert bound <= fewest_loads(events, sizes, room)


def test_belady_is_no_bound_where_sizes_differ() -> None:
    """Room for 6 bytes: 0 takes 4, the others 2. Among 0, 1 and 2 Belady evicts 0, needed last, for 3 alone, and so
    does everybody here; with 0 needed just before 1 and 2 it evicts both of these for want of 4 bytes: 6 loads where
    leaving 0 out of the cache takes 5."""
    routings = [[[1]], [[2]], [[0]], [[0]], [[1]], [[2]], [[1]], [[2]]]
    events = [[key] for row in routings for key in row[0]]
    forwards = decode(routings, 3)
    belady = compose(eviction=eviction_named("belady_forced", "global"), future=Future(forwards, 3))
    found = job(routings, [4, 2, 2], 4, policy=belady)
    assert found.counters.num_misses > fewest_loads(events, [4, 2, 2], 4)
