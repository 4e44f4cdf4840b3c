"""Experts on the host, worked out by hand to the nanosecond: their waits, and the memory that they share with copies.

Unless a test says otherwise: attention 100 ns, one expert 10, head 50, one expert's copy 40, one expert on the host 30,
activations 5 there and results 5 back; all else is free. Keys of layer 0 are 0 … 9, of layer 1 10 … 19; 3, 4, 5 and 13
are resident at the start.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.evictions.lru import LRU
from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.observer import HOST_STALL, LATE, MISS
from expertflow.orders.index import IndexOrder
from expertflow.parts import Place, Placing
from expertflow.places.gpu import Gpu
from expertflow.view import Feedback, View
from sim.machine.host_bound import HostBoundMachine
from sim.machine.shared_memory import ONE, SharedMemory, Stint
from sim.machine.simulated import HostCosts
from tests.support.runs import (
    ConstantLink,
    Copy,
    Host,
    Job,
    Kernel,
    Kernels,
    Scripted,
    Stall,
    batches,
    compose,
    decode,
    run,
)

NUM_EXPERTS = 10
RESIDENT = (3, 4, 5, 13)


class Given(Place):
    """Places on the host, and copies for later, what it is told: by layer-step, in order."""

    def __init__(self, *on_host: Sequence[int], later: Mapping[int, Sequence[int]] | None = None) -> None:
        self.on_host_by_event = on_host
        self.later = later or {}
        self.asked: list[Placing] = []
        self.queued: list[tuple[int, ...]] = []

    def on_host(self, placing: Placing, forward: KnownForward) -> Sequence[int]:
        self.asked.append(placing)
        event = len(self.asked) - 1
        return self.on_host_by_event[event] if event < len(self.on_host_by_event) else ()

    def for_later(self, keys: Sequence[int], queued: Sequence[int]) -> Sequence[int]:
        self.queued.append(tuple(queued))
        return self.later.get(len(self.asked) - 1, ())


def go(place: Place, *routings: Sequence[Sequence[int]], **given: Any) -> Job:
    """Run one token per routing (routings[f][l] = experts)."""
    given.setdefault("host", Host())
    given.setdefault("initial", tuple(key for key in RESIDENT if key < NUM_EXPERTS * len(routings[0])))
    parts = {name: given.pop(name) for name in ("predictor", "eviction", "order") if name in given}
    given.setdefault("num_slots", 10)
    return run(decode(routings, NUM_EXPERTS), num_experts=NUM_EXPERTS, policy=compose(place=place, **parts), **given)


# -- waits ----------------------------------------------------------------------------------------------------------


def test_the_next_launch_waits_for_the_results_and_the_wait_is_host_stall() -> None:
    job = go(Given([6]), [[6]])
    assert job.timeline.products == [(6, 105, 140)]
    assert job.timeline.kernels == [Kernel("attention", 0, (), 0, 100), Kernel("head", 0, (), 140, 190)]
    assert job.timeline.stalls == [Stall(100, 140, 6, HOST_STALL)]
    counters = job.counters
    assert (counters.num_accesses, counters.num_hits, counters.num_misses, counters.num_host) == (1, 0, 0, 1)
    assert (counters.stall_ns, counters.host_stall_ns, counters.elapsed_ns, counters.host_busy_ns) == (40, 40, 190, 35)
    assert job.runtime.queue.num_loads == 0


def test_of_a_host_beside_the_gpu_only_what_sticks_out_is_stall() -> None:
    job = go(Given([6]), [[3, 6]])
    assert job.timeline.kernels[1:] == [Kernel("experts", 0, (3,), 100, 110), Kernel("head", 0, (), 140, 190)]
    assert job.timeline.stalls == [Stall(110, 140, 6, HOST_STALL)]


@pytest.mark.parametrize(("expert", "stall"), [(19, 2), (20, 0), (21, 0)])
def test_a_host_that_ends_no_later_than_the_gpu_is_not_waited_for(expert: int, stall: int) -> None:
    job = go(Given([6]), [[3, 4, 6]], kernels=Kernels(expert=expert))
    assert job.counters.stall_ns == stall
    assert job.counters.elapsed_ns == max(140, 100 + 2 * expert) + 50


def test_the_host_takes_its_experts_in_the_order_given_and_the_last_is_blamed() -> None:
    job = go(Given([7, 6]), [[3, 6, 7], [3]])
    # The first one's products end at 135; only the results of both, at 170, are what the next attention adds.
    assert job.timeline.products == [(7, 105, 135), (6, 135, 170)]
    assert job.timeline.stalls == [Stall(110, 170, 6, HOST_STALL)]
    assert job.timeline.kernels[2] == Kernel("attention", 1, (), 170, 270)


def test_tokens_count_on_the_host() -> None:
    rows = [[[6]], [[6]], [[3]]]
    place = Given([6])
    job = run(
        batches([rows], NUM_EXPERTS),
        num_experts=NUM_EXPERTS,
        num_slots=10,
        initial=(3,),
        policy=compose(place=place),
        host=Host(),
    )
    assert job.timeline.products == [(6, 105, 170)]
    assert (place.asked[0].tokens, list(place.asked[0].costs.host_ns), list(place.asked[0].costs.gpu_ns)) == (
        (2,),
        [60],
        [20],
    )


def test_sending_activations_keeps_the_host_for_as_long_as_issuing_a_copy() -> None:
    job = go(Given([6]), [[3, 6]], costs=HostCosts(issue_ns=4, launch_ns=2, gate_sync_ns=3))
    # Attention is launched at 2 and ends at 102; routing at 105; activations leave at 109 and are there at 114.
    assert job.timeline.products == [(6, 114, 149)]
    assert job.timeline.kernels[1:] == [Kernel("experts", 0, (3,), 111, 121), Kernel("head", 0, (), 151, 201)]
    assert job.timeline.stalls == [Stall(121, 149, 6, HOST_STALL)]


def test_after_a_wake_for_results_a_busy_host_spends_its_time_first() -> None:
    job = go(Given([6]), [[6]], costs=HostCosts(observe_ns=7))
    assert job.timeline.kernels[-1] == Kernel("head", 0, (), 147, 197)
    assert (job.counters.host_stall_ns, job.counters.overhead_ns) == (40, 7)


# -- copies and products --------------------------------------------------------------------------------------------


def test_copies_and_products_that_do_not_slow_each_other() -> None:
    job = go(Given([7]), [[6, 7]])
    assert (job.timeline.copies, job.timeline.products) == ([Copy(6, 0, 100, 140)], [(7, 105, 140)])
    assert job.timeline.stalls == [Stall(100, 140, 6, MISS)]
    assert job.counters.elapsed_ns == 200


def test_copies_and_products_that_share_the_memory_take_longer_while_both_run() -> None:
    job = go(Given([7]), [[6, 7]], host=Host(slower=2.0))
    # Alone until 105: 5 of 40 are copied. Beside each other 30 take 60, up to 165; then 5 of the copy are left.
    assert job.timeline.copies == [Copy(6, 0, 100, 170)]
    assert job.timeline.products == [(7, 105, 170)]
    assert job.timeline.stalls == [Stall(100, 170, 6, MISS)]
    assert job.counters.elapsed_ns == 230


def test_what_is_left_is_rounded_up() -> None:
    job = go(Given([7]), [[6, 7]], host=Host(expert=31, slower=1.5))
    # 31 take 46.5: up to 152. By then 47 / 1.5 = 31 whole ns of the copy's 35 are done, 4 are left.
    assert job.timeline.products == [(7, 105, 157)]
    assert job.timeline.copies == [Copy(6, 0, 100, 156)]


def test_a_copy_that_is_issued_later_times_the_products_anew() -> None:
    class Wants(Scripted):
        """Layer 1's expert 6, at layer 0."""

    place = Given([6])
    job = go(place, [[3, 6], [6]], predictor=Wants({(0, 0, 1): [16]}), host=Host(slower=3.0, expert=60))
    # The prefetch of 16 is issued at 100 too, after the task. Up to 105 it is alone: 35 left. Both take three times as
    # long: the copy ends at 210, when 35 of the products are done; 25 more are alone, up to 235, and 5 back.
    assert job.timeline.copies == [Copy(16, 0, 100, 210)]
    assert job.timeline.products == [(6, 105, 240)]
    assert job.timeline.kernels[2] == Kernel("attention", 1, (), 240, 340)
    assert job.counters.num_hits == 2


def test_a_copy_that_waits_for_a_kernel_slows_nothing_until_it_starts() -> None:
    memory = SharedMemory(lambda num_bytes, copy_ns, host_ns: 2 * ONE)
    memory.products.append(Stint(0, 50))
    memory.copies.append(Stint(30, 40, 40))
    memory.plan()
    # 30 alone; the 20 that are left take 40; then 20 of the copy are left.
    assert [(one.start_ns, one.end_ns) for one in (*memory.products, *memory.copies)] == [(0, 70), (30, 90)]


def test_looking_at_the_memory_in_between_costs_less_than_a_nanosecond_each_time() -> None:
    def ends(looks: Sequence[int]) -> list[int]:
        memory = SharedMemory(lambda num_bytes, copy_ns, host_ns: round(1.37 * ONE))
        stints = [Stint(0, 1000, 1), Stint(100, 700)]
        memory.copies.append(stints[0])
        memory.products.append(stints[1])
        for now in looks:
            memory.advance(now)
            memory.plan()
        memory.plan()
        return [stint.end_ns for stint in stints]

    whole, looked = ends([]), ends(range(1, 1000, 7))
    assert all(0 <= later - sooner <= 143 for sooner, later in zip(whole, looked, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1.0, 1.25, 1.5, 2.0, 3.0]))
def test_the_memory_is_shared_as_it_would_be_in_exact_fractions(seed: int, slower: float) -> None:
    """Enqueued one by one at rising times, against small steps of exact time; each look rounds up once."""
    rng = random.Random(seed)
    memory, stretch = SharedMemory(lambda num_bytes, copy_ns, host_ns: round(slower * ONE)), Fraction(slower)
    exact: tuple[list[list[Fraction]], list[list[Fraction]]] = ([], [])
    stints: tuple[list[Stint], list[Stint]] = ([], [])
    arrivals, now = [], 0
    for _ in range(rng.randint(1, 7)):
        now += rng.randint(0, 30)
        side, work, wait = rng.randrange(2), rng.randint(1, 60), rng.randint(0, 20)
        arrivals.append(now)
        memory.advance(now)
        stint = Stint(now + wait, work, work)
        (memory.copies, memory.products)[side].append(stint)
        stints[side].append(stint)
        exact[side].append([Fraction(now + wait), Fraction(work)])
    memory.plan()
    for found, wanted in zip(stints, _exact_ends(exact, stretch), strict=True):
        for stint, end in zip(found, wanted, strict=True):
            assert end <= stint.end_ns <= end + 4 * stretch * (len(arrivals) + sum(map(len, exact)))


def _exact_ends(
    queues: tuple[list[list[Fraction]], list[list[Fraction]]], stretch: Fraction
) -> tuple[list[Fraction], list[Fraction]]:
    """Ends of both queues in exact time: from each change of who runs to the next."""
    heads, now = [0, 0], Fraction(0)
    ends: tuple[list[Fraction], list[Fraction]] = ([], [])
    while any(heads[side] < len(queues[side]) for side in (0, 1)):
        waiting = [side for side in (0, 1) if heads[side] < len(queues[side])]
        running = [side for side in waiting if queues[side][heads[side]][0] <= now]
        changes = [queues[side][heads[side]][0] for side in waiting if side not in running]
        rate = stretch if len(running) == 2 else Fraction(1)
        changes += [now + queues[side][heads[side]][1] * rate for side in running]
        step = min(changes) - now
        now += step
        for side in running:
            queues[side][heads[side]][1] -= step / rate
            if queues[side][heads[side]][1] == 0:
                ends[side].append(now)
                heads[side] += 1
    return ends


# -- what is placed there -------------------------------------------------------------------------------------------


def test_a_resident_or_late_expert_is_not_asked_about() -> None:
    place = Given()
    job = go(place, [[3], [6, 3, 7]], predictor=Scripted({(0, 0, 1): [16]}), chunk_bytes=(400,))
    asked = place.asked[1]
    assert (tuple(asked.resident), tuple(asked.in_flight), tuple(asked.missing)) == ((13,), (16,), (17,))
    assert (job.counters.num_late, job.counters.num_misses, job.counters.num_host) == (1, 1, 0)
    assert [stall.kind for stall in job.timeline.stalls] == [LATE, MISS]


class Hears(LRU):
    """Notes what it is told."""

    def start(self, view: View, future: Future | None) -> None:
        super().start(view, future)
        self.heard: list[tuple[Any, ...]] = []

    def touched(self, keys: Sequence[int]) -> None:
        self.heard.append(("touched", *keys))
        super().touched(keys)

    def admitted(self, key: int, cause: int) -> None:
        self.heard.append(("admitted", key, cause))
        super().admitted(key, cause)

    def layer_end(self, layer: int, keys: Sequence[int]) -> None:
        self.heard.append(("layer_end", *keys))


def test_an_expert_on_the_host_is_neither_touched_nor_admitted() -> None:
    eviction = Hears()
    job = go(Given([6], [16]), [[6, 3], [6]], [[3], [3]], eviction=eviction, initial=())
    told = [("touched", 3), ("admitted", 3, 0), ("layer_end", 3), ("layer_end",)]
    assert eviction.heard == [
        *told,
        ("touched", 3),
        ("layer_end", 3),
        ("touched", 13),
        ("admitted", 13, 0),
        ("layer_end", 13),
    ]
    assert (job.counters.num_host, job.counters.num_misses, job.counters.num_hits) == (2, 2, 1)


SLOW = Scripted({(0, 0, 1): [17, 16]})
"""At layer 0 both are wanted; a copy of 300 ns lets one of them be issued before layer 1's routing is read."""


def test_the_queued_prefetch_of_an_expert_on_the_host_is_dropped() -> None:
    job = go(Given([], [16]), [[3], [6]], predictor=SLOW, chunk_bytes=(300,), channel_depth=1)
    counters = job.counters
    assert (counters.dropped_became_host, counters.dropped_passed, counters.prefetch_issued) == (1, 0, 1)
    assert (counters.prefetch_requested, job.runtime.queue.wanted) == (2, [])
    assert [copy.key for copy in job.timeline.copies] == []  # 17 is still under way when the run ends


def test_one_that_is_fetched_for_later_stays_queued_and_is_asked_for_once() -> None:
    place = Given([], [16], later={1: [16]})
    job = go(place, [[3], [6]], [[3], [6]], predictor=SLOW, chunk_bytes=(300,), channel_depth=1)
    assert place.queued == [(16,)]
    counters = job.counters
    assert (counters.dropped_became_host, counters.prefetch_requested, counters.prefetch_issued) == (0, 2, 2)
    # 17 from 110 on, then 16, for its next use at 580.
    assert [copy.key for copy in job.timeline.copies] == [17, 16]
    assert job.timeline.copies[1].start_ns == job.timeline.copies[0].end_ns


def test_what_is_fetched_for_later_goes_behind_the_demand_and_no_decision_replaces_it() -> None:
    place = Given([6], later={0: [6]})
    wants = Scripted({(0, 0, 1): [17, 18]})
    job = go(place, [[6, 7], [3]], [[6, 7], [3]], predictor=wants, channel_depth=1, chunk_bytes=(20, 20))
    assert [copy.key for copy in job.timeline.copies[:8:2]] == [7, 6, 17, 18]
    counters = job.counters
    assert (counters.prefetch_requested, counters.prefetch_issued, counters.prefetch_useful) == (3, 3, 1)
    assert (counters.num_hits, counters.num_host) == (4, 1)


def test_nothing_is_launched_on_the_gpu_where_all_is_on_the_host() -> None:
    kinds = [kernel.kind for kernel in go(Given([6, 7]), [[6, 7]]).timeline.kernels]
    assert kinds == ["attention", "head"]
    shared = go(Given([6, 7]), [[6, 7]], kernels=Kernels(shared=25)).timeline.kernels
    assert [(kernel.kind, kernel.keys, kernel.end_ns) for kernel in shared] == [
        ("attention", (), 100),
        ("experts", (), 125),
        ("head", (), 220),
    ]


def test_a_strict_order_runs_without_the_experts_of_the_host() -> None:
    job = go(Given([6]), [[6, 7, 3]], order=IndexOrder())
    assert [kernel.keys for kernel in job.timeline.experts()] == [(3,), (7,)]


def test_a_part_hears_of_the_stall_and_of_how_many_were_on_the_host() -> None:
    class Told(Given):
        """Notes feedback."""

        def feedback(self, feedback: Feedback) -> None:
            told.append(feedback)

    told: list[Feedback] = []
    go(Told([6]), [[6], [3]])
    assert told == [Feedback(0, 40, 0, 0, 1)]


def test_a_machine_of_a_host_that_is_not_asked_for_anything_is_the_other_machine() -> None:
    costs = HostCosts(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)
    routings = ([[3, 6], [3, 7]], [[6, 8], [1, 7]])
    ways: list[dict[str, Any]] = [{"host": Host(slower=2.0)}, {"host": None, "machine_type": HostBoundMachine}]
    for link in (ConstantLink(), ConstantLink(slowdown=1.5)):
        found = []
        for way in ways:
            place = Given() if way["host"] else Gpu()
            wants = Scripted({(0, 0, 1): [17, 18], (1, 0, 1): [11]})
            job = go(place, *routings, predictor=wants, costs=costs, link=link, chunk_bytes=(25, 15), **way)
            found.append((job.timeline, job.counters))
        assert found[0] == found[1]
