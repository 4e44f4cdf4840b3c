"""Is every nanosecond where it belongs? Timelines worked out by hand, both sides of each boundary.

Unless a test says otherwise: attention 100 ns, one expert 10, head 50, one expert's copy 40; the host is free.
Keys of layer 0 are 0 … 9, of layer 1 10 … 19.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from expertflow.evictions.keep_nothing import KeepNothing
from expertflow.orders.index import IndexOrder
from expertflow.parts import Order
from expertflow.policy import Policy
from sim.machine.simulated import HostCosts
from tests.support.runs import (
    IDEAL_LINK,
    ConstantLink,
    Copy,
    Demand,
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

ATTENTION, EXPERT, HEAD, COPY = 100, 10, 50, 40
NUM_EXPERTS = 10


def go(*routings: Sequence[Sequence[int]], **settings: Any) -> Job:
    """Run one token per routing (routings[f][l] = experts) with plenty of slots unless said."""
    settings.setdefault("num_slots", 10)
    return run(decode(routings, NUM_EXPERTS), num_experts=NUM_EXPERTS, **settings)


def split(job: Job) -> tuple[int, int, int, int]:
    """(compute, late stall, miss stall, overhead)."""
    c = job.counters
    return c.compute_ns, c.late_stall_ns, c.miss_stall_ns, c.overhead_ns


def prefetching(*keys: int) -> Policy:
    """Wants `keys`, best first, once the routing of (forward 0, layer 0) is known."""
    return compose(predictor=Scripted({(0, 0, 1): keys}))


# -- one layer -----------------------------------------------------------------------------------------------


def test_a_hit_runs_at_once() -> None:
    job = go([[3]], initial=(3,))
    assert job.timeline.kernels == [
        Kernel("attention", 0, (), 0, 100),
        Kernel("experts", 0, (3,), 100, 110),
        Kernel("head", 0, (), 110, 160),
    ]
    assert split(job) == (ATTENTION + EXPERT + HEAD, 0, 0, 0)
    assert job.counters.elapsed_ns == 160


def test_a_miss_waits_for_its_copy() -> None:
    job = go([[3]])
    assert job.timeline.copies == [Copy(3, 0, ATTENTION, ATTENTION + COPY)]
    assert job.timeline.stalls == [Stall(ATTENTION, ATTENTION + COPY, 3, True)]
    assert split(job) == (ATTENTION + EXPERT + HEAD, 0, COPY, 0)
    assert job.counters.elapsed_ns == ATTENTION + COPY + EXPERT + HEAD


def test_the_second_of_two_misses_computes_while_it_can() -> None:
    job = go([[3, 4]])
    assert job.timeline.copies == [Copy(3, 0, 100, 140), Copy(4, 0, 140, 180)]
    assert job.timeline.experts() == [Kernel("experts", 0, (3,), 140, 150), Kernel("experts", 0, (4,), 180, 190)]
    assert split(job) == (ATTENTION + 2 * EXPERT + HEAD, 0, COPY + (COPY - EXPERT), 0)


def test_a_second_miss_that_lands_under_the_first_kernel_stalls_nobody() -> None:
    job = go([[3, 4]], kernels=Kernels(expert=COPY + 20))
    assert job.timeline.experts() == [Kernel("experts", 0, (3,), 140, 200), Kernel("experts", 0, (4,), 200, 260)]
    assert split(job) == (ATTENTION + 2 * 60 + HEAD, 0, COPY, 0)


def test_misses_are_issued_best_gate_weight_first() -> None:
    forwards = decode([[[3, 4, 5]]], NUM_EXPERTS)
    forwards[0].issue_order[0] = [5, 3, 4]
    job = run(forwards, num_experts=NUM_EXPERTS, num_slots=10)
    assert [copy.key for copy in job.timeline.copies] == [5, 3, 4]
    assert [kernel.keys for kernel in job.timeline.experts()] == [(5,), (3,), (4,)]


@pytest.mark.parametrize(("over", "stall"), [(-1, 0), (0, 0), (1, 1)])
def test_a_copy_stalls_from_the_end_of_the_last_resident_kernel(over: int, stall: int) -> None:
    resident_ns = 70
    job = go([[3, 4]], initial=(3,), kernels=Kernels(expert=resident_ns), chunk_bytes=(resident_ns + over,))
    assert split(job) == (ATTENTION + 2 * resident_ns + HEAD, 0, stall, 0)
    assert job.timeline.experts()[1].start_ns == ATTENTION + resident_ns + stall


def test_tokens_of_a_forward_lengthen_the_kernels_of_their_experts() -> None:
    forwards = batches([[[[3, 4]], [[3, 5]], [[3, 4]]]], NUM_EXPERTS)
    job = run(forwards, num_experts=NUM_EXPERTS, num_slots=10, initial=(3, 4, 5))
    tokens = {3: 3, 4: 2, 5: 1}
    assert forwards[0].demands == [[5, 3, 4]]
    assert job.timeline.experts() == [Kernel("experts", 0, (5, 3, 4), 100, 100 + EXPERT * sum(tokens.values()))]


def test_of_experts_that_landed_while_the_host_was_busy_the_last_is_blamed() -> None:
    job = go([[3, 4, 5]], costs=HostCosts(issue_ns=100), channel_depth=3)
    # Issued at 200, 300 and 400; at 400 the host is free and finds the first two.
    assert job.timeline.copies == [Copy(3, 0, 200, 240), Copy(4, 0, 300, 340), Copy(5, 0, 400, 440)]
    assert job.timeline.stalls == [Stall(100, 340, 4, True), Stall(400 + 2 * EXPERT, 440, 5, True)]
    assert split(job)[3] == 400 - 340


def test_a_shared_expert_runs_before_the_resident_and_hides_a_copy() -> None:
    job = go([[3, 4]], initial=(3,), kernels=Kernels(shared=25))
    assert job.timeline.experts() == [
        Kernel("experts", 0, (3,), 100, 100 + 25 + EXPERT),
        Kernel("experts", 0, (4,), 140, 150),
    ]
    assert split(job) == (ATTENTION + 25 + 2 * EXPERT + HEAD, 0, COPY - 25 - EXPERT, 0)


def test_a_shared_expert_runs_alone_when_no_routed_one_is_there() -> None:
    job = go([[3]], kernels=Kernels(shared=25))
    assert job.timeline.experts() == [Kernel("experts", 0, (), 100, 125), Kernel("experts", 0, (3,), 140, 150)]
    assert split(job) == (ATTENTION + 25 + EXPERT + HEAD, 0, COPY - 25, 0)


# -- what the host costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "overhead"),
    [
        (HostCosts(launch_ns=2), 2 + 2),  # before attention and before the expert; the head's is hidden
        (HostCosts(launch_latency_ns=3), 3 + 3),
        (HostCosts(gate_sync_ns=5), 5),
        (HostCosts(token_sync_ns=7), 7),
        (HostCosts(layer_overhead_ns=11), 11),
        (HostCosts(head_overhead_ns=13), 13),
        (HostCosts(issue_ns=17), 0),  # nothing to copy
        (HostCosts(decide_ns=19), 0),  # no predictor, no decision
    ],
)
def test_each_host_cost_is_overhead_of_a_hit(costs: HostCosts, overhead: int) -> None:
    job = go([[3]], initial=(3,), costs=costs)
    assert split(job) == (ATTENTION + EXPERT + HEAD, 0, 0, overhead)
    assert job.counters.elapsed_ns == ATTENTION + EXPERT + HEAD + overhead


def test_all_host_costs_together_around_one_miss() -> None:
    costs = HostCosts(
        launch_ns=2,
        launch_latency_ns=3,
        issue_ns=1,
        gate_sync_ns=5,
        token_sync_ns=7,
        layer_overhead_ns=11,
        head_overhead_ns=13,
    )
    job = go([[3]], costs=costs)
    attention_end = (2 + 3) + 11 + ATTENTION
    known = attention_end + 5
    landed = known + 1 + COPY
    start = landed + 2 + 3
    head_start = start + EXPERT + 13
    assert job.timeline.demands == [Demand(known, (), (), (3,))]
    assert job.timeline.copies == [Copy(3, 0, known + 1, landed)]
    assert job.timeline.experts() == [Kernel("experts", 0, (3,), start, start + EXPERT)]
    assert job.timeline.ends_ns == [head_start + HEAD + 7]
    assert job.timeline.stalls == [Stall(known, landed, 3, True)]
    assert split(job) == (ATTENTION + EXPERT + HEAD, 0, landed - known, 2 * (2 + 3) + 5 + 11 + 13 + 7)


def test_launches_of_the_next_layer_hide_under_the_experts_of_this_one() -> None:
    job = go([[3], [3]], initial=(3, 13), costs=HostCosts(launch_ns=1, launch_latency_ns=2))
    # Exposed: attention 0 (3) and, behind each routing that must be read back, the experts (3 each).
    assert split(job) == (2 * (ATTENTION + EXPERT) + HEAD, 0, 0, 3 * 3)


def test_a_decision_is_hidden_under_the_experts_and_the_next_attention() -> None:
    """Both are launched before it, unless an expert is missing: then what follows that expert has to wait for it."""
    hidden = ATTENTION + EXPERT
    for decide_ns, exposed in ((hidden, 0), (hidden + 7, 7)):
        costs = HostCosts(decide_ns=decide_ns)
        job = go([[3], [4], [5]], initial=(3, 14, 25), policy=prefetching(), costs=costs)
        # Under the last decision run its experts and the head.
        last = max(decide_ns - EXPERT - HEAD, 0)
        assert split(job) == (3 * (ATTENTION + EXPERT) + HEAD, 0, 0, 2 * exposed + last)
    costs = HostCosts(decide_ns=hidden)
    job = go([[3], [4]], initial=(14,), policy=prefetching(), costs=costs)
    attention = [kernel for kernel in job.timeline.kernels if kernel.kind == "attention"][1]
    assert attention.start_ns == ATTENTION + max(COPY, hidden) + EXPERT


def test_a_decision_delays_the_copies_it_asks_for() -> None:
    job = go([[3], [4]], initial=(3,), policy=prefetching(14), costs=HostCosts(decide_ns=19, issue_ns=1))
    assert job.timeline.copies == [Copy(14, 0, ATTENTION + 19 + 1, ATTENTION + 19 + 1 + COPY)]


# -- prefetch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_sync_ns", [0, 6])
@pytest.mark.parametrize(("over", "stall"), [(-1, 0), (0, 0), (1, 1), (25, 25)])
def test_a_prefetch_is_a_hit_until_its_copy_outlasts_the_moment_the_routing_is_known(
    gate_sync_ns: int, over: int, stall: int
) -> None:
    window = EXPERT + ATTENTION + gate_sync_ns  # from the decision at layer 0 to the routing of layer 1
    costs = HostCosts(gate_sync_ns=gate_sync_ns)
    job = go([[3], [4]], initial=(3,), policy=prefetching(14), chunk_bytes=(window + over,), costs=costs)
    known = ATTENTION + gate_sync_ns + window
    expected = Demand(known, (), (14,), ()) if stall else Demand(known, (14,), (), ())
    assert job.timeline.demands[1] == expected
    c = job.counters
    assert (c.num_hits, c.num_late, c.num_misses) == (1 + (not stall), int(stall > 0), 0)
    assert (c.prefetch_useful, c.prefetch_late) == (int(not stall), int(stall > 0))
    # Reading the routing back is overhead of a hit and of a late expert alike.
    assert split(job)[1:] == (stall, 0, 2 * gate_sync_ns)
    landed = ATTENTION + gate_sync_ns + window + over
    assert job.timeline.stalls == ([Stall(known, landed, 14, False)] if stall else [])


def test_late_and_missing_experts_of_one_layer_are_blamed_apart() -> None:
    late_ns, known = 150, 210
    job = go([[3], [4, 5]], initial=(3,), policy=prefetching(14), chunk_bytes=(late_ns,), num_slots=5)
    landed = ATTENTION + late_ns
    assert job.timeline.demands[1] == Demand(known, (), (14,), (15,))
    assert job.timeline.stalls == [
        Stall(known, landed, 14, False),
        Stall(landed + EXPERT, landed + late_ns, 15, True),
    ]
    assert split(job)[1:] == (landed - known, late_ns - EXPERT, 0)


def test_a_prefetch_of_the_next_forward_copies_during_the_head() -> None:
    policy = compose(predictor=Scripted({(0, 1, 1): [4]}))
    job = go([[3], [3]], [[4], [3]], initial=(3, 13), policy=policy)
    known = 2 * ATTENTION + EXPERT
    head_start = known + EXPERT
    assert job.timeline.copies == [Copy(4, 0, known, known + COPY)]
    assert head_start < known + COPY < head_start + HEAD
    assert job.counters.num_hits == 4
    assert job.counters.elapsed_ns == 2 * (2 * (ATTENTION + EXPERT) + HEAD)


def test_wrapped_prefetches_are_issued_one_after_another_while_the_host_waits_for_the_head() -> None:
    policy = compose(predictor=Scripted({(0, 1, 1): [4, 5, 6]}))
    job = go([[3], [3]], [[4], [3]], initial=(3, 13), policy=policy, channel_depth=1)
    known = 2 * ATTENTION + EXPERT
    starts = [known, known + COPY, known + 2 * COPY]
    assert job.timeline.copies == [Copy(key, 0, t, t + COPY) for key, t in zip((4, 5, 6), starts, strict=True)]


# -- chunks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "num_issues_exposed"), [(1, 2), (2, 1)])
def test_depth_hides_the_cost_of_issuing_the_second_chunk(depth: int, num_issues_exposed: int) -> None:
    job = go([[3]], chunk_bytes=(20, 20), channel_depth=depth, costs=HostCosts(issue_ns=3))
    assert job.counters.miss_stall_ns == COPY + num_issues_exposed * 3


def test_a_half_issued_prefetch_that_is_demanded_goes_first() -> None:
    job = go([[3], [4, 5]], initial=(3,), policy=prefetching(14), chunk_bytes=(40,) * 4, channel_depth=1)
    first = ATTENTION  # its chunks start at 100, 140, 180; the routing is known at 210, during the third
    landed = first + 4 * 40
    assert job.timeline.demands[1] == Demand(210, (), (14,), (15,))
    assert job.timeline.copies == [
        *(Copy(14, chunk, first + 40 * chunk, first + 40 * chunk + 40) for chunk in range(4)),
        *(Copy(15, chunk, landed + 40 * chunk, landed + 40 * chunk + 40) for chunk in range(4)),
    ]
    assert split(job)[1:] == (landed - 210, 4 * 40 - EXPERT, 0)


@pytest.mark.parametrize("depth", [1, 2])
def test_demand_overtakes_a_prefetch_behind_the_chunks_in_flight(depth: int) -> None:
    num_chunks = 5
    job = go([[3], [5]], initial=(3,), policy=prefetching(14), chunk_bytes=(40,) * num_chunks, channel_depth=depth)
    # The routing is known at 210. Depth 1: the chunk of 180 … 220 is in flight; depth 2: also 220 … 260.
    free = 220 if depth == 1 else 260
    ahead = (free - ATTENTION) // 40
    demand_end = free + 40 * num_chunks
    order = [*((14, c) for c in range(ahead)), *((15, c) for c in range(5)), *((14, c) for c in range(ahead, 5))]
    starts = range(ATTENTION, ATTENTION + 40 * len(order), 40)
    expected = [Copy(key, chunk, t, t + 40) for (key, chunk), t in zip(order, starts, strict=True)]
    assert job.timeline.copies == expected[: len(job.timeline.copies)]
    assert len(job.timeline.copies) >= ahead + num_chunks
    assert job.counters.miss_stall_ns == demand_end - 210


def test_what_is_not_demanded_is_dropped_unless_its_copy_has_begun() -> None:
    job = go([[3], [9]], initial=(3,), policy=prefetching(14, 15, 16, 17), channel_depth=2)
    # Issued by 210: 14, 15 and, as those end at 140 and 180, 16 and 17: all of them.
    assert [copy.key for copy in job.timeline.copies][:4] == [14, 15, 16, 17]
    job = go([[3], [9]], initial=(3,), policy=prefetching(14, 15, 16, 17), channel_depth=1, chunk_bytes=(80,))
    # 100 … 180 and 180 … 260; at 210 the other two are dropped, the demand follows at 260.
    assert job.timeline.copies == [Copy(14, 0, 100, 180), Copy(15, 0, 180, 260), Copy(19, 0, 260, 340)]
    assert (job.counters.prefetch_issued, job.counters.dropped_passed) == (2, 2)


def test_a_queued_prefetch_that_is_demanded_becomes_a_miss() -> None:
    job = go([[3], [6]], initial=(3,), policy=prefetching(14, 15, 16), channel_depth=1, chunk_bytes=(80,))
    assert job.timeline.demands[1] == Demand(210, (), (), (16,))
    assert (job.counters.prefetch_issued, job.counters.dropped_became_demand) == (2, 1)


@pytest.mark.parametrize(("attention", "factor"), [(30, 1.0), (30, 1.5), (100, 1.5)])
def test_a_copy_that_starts_under_a_running_kernel_is_slowed(attention: int, factor: float) -> None:
    link = ConstantLink(slowdown=factor)
    job = go([[3, 4]], initial=(3,), kernels=Kernels(attention=attention), link=link)
    # At the moment the routing is known nothing runs yet: the resident expert is launched after the issue.
    assert job.timeline.copies == [Copy(4, 0, attention, attention + COPY)]
    job = go([[3], [4]], initial=(3,), kernels=Kernels(attention=attention), link=link, policy=prefetching(14))
    assert job.timeline.copies == [Copy(14, 0, attention, attention + round(COPY * factor))]


# -- slots ---------------------------------------------------------------------------------------------------


def test_a_copy_into_a_slot_that_is_still_read_starts_when_its_reader_ends() -> None:
    job = go(
        [[3], [5]],
        initial=(3,),
        num_slots=2,
        policy=prefetching(14, 15),
        channel_depth=1,
        kernels=Kernels(expert=200),
    )
    reader_end = ATTENTION + 200
    assert job.timeline.copies == [Copy(14, 0, 100, 140), Copy(15, 0, reader_end, reader_end + COPY)]
    assert job.timeline.demands[1] == Demand(reader_end + ATTENTION, (15,), (), ())


def test_a_copy_that_waits_for_a_reader_blocks_the_chunk_behind_it() -> None:
    job = go(
        [[3, 4], [5, 6]],
        initial=(3, 4),
        num_slots=3,
        policy=prefetching(15, 16, 17),
        channel_depth=2,
        chunk_bytes=(20, 20),
        kernels=Kernels(expert=100),
    )
    reader_end = ATTENTION + 2 * 100
    assert job.timeline.copies[:6] == [
        Copy(15, 0, 100, 120),
        Copy(15, 1, 120, 140),
        Copy(16, 0, reader_end, reader_end + 20),
        Copy(16, 1, reader_end + 20, reader_end + 40),
        Copy(17, 0, reader_end + 40, reader_end + 60),
        Copy(17, 1, reader_end + 60, reader_end + 80),
    ]


def test_a_demand_without_a_slot_does_not_block_a_prefetch_that_has_one() -> None:
    job = go([[3], [5, 6]], initial=(3,), num_slots=2, policy=prefetching(14), channel_depth=1, chunk_bytes=(40,) * 4)
    # At 210 the third chunk of 14 is in flight and 15 takes the slot of 3; 16 has none before 14 has landed.
    landed_15, landed_14 = 220 + 160, 220 + 160 + 40
    assert job.timeline.copies[3:9] == [
        *(Copy(15, chunk, 220 + 40 * chunk, 260 + 40 * chunk) for chunk in range(4)),
        Copy(14, 3, landed_15, landed_14),
        Copy(16, 0, landed_14, landed_14 + 40),
    ]
    assert job.counters.elapsed_ns == landed_14 + 160 + EXPERT + HEAD


def test_more_demand_than_slots_streams_through_one_slot() -> None:
    job = go([[3, 4, 5]], num_slots=1)
    step = COPY + EXPERT  # each copy waits for the kernel that reads the only slot
    assert job.timeline.copies == [Copy(3 + i, 0, 100 + step * i, 140 + step * i) for i in range(3)]
    assert split(job) == (ATTENTION + 3 * EXPERT + HEAD, 0, 3 * COPY, 0)
    assert (job.counters.num_streamed_layers, job.counters.num_evictions) == (1, 2)


def test_without_a_cache_every_layer_loads_anew() -> None:
    policy = compose(eviction=KeepNothing())
    job = go([[3], [4]], [[3], [4]], policy=policy)
    assert (job.counters.num_hits, job.counters.num_misses, job.counters.num_evictions) == (0, 4, 4)
    assert job.counters.elapsed_ns == 4 * (ATTENTION + COPY + EXPERT) + 2 * HEAD


def test_a_prefetch_is_refused_a_staging_buffer_that_a_demand_may_take() -> None:
    job = go([[3], [4]], initial=(3,), num_slots=1, num_staging=1, policy=prefetching(14))
    assert (job.counters.prefetch_issued, job.counters.dropped_refused) == (0, 1)
    assert job.timeline.copies == [Copy(14, 0, 210, 250)]


# -- order ---------------------------------------------------------------------------------------------------


def test_resident_first_computes_while_the_missing_expert_copies() -> None:
    job = go([[2, 0]], initial=(2,))
    assert job.timeline.experts() == [Kernel("experts", 0, (2,), 100, 110), Kernel("experts", 0, (0,), 140, 150)]
    assert job.counters.miss_stall_ns == COPY - EXPERT


def test_in_index_order_a_missing_expert_holds_up_the_resident_behind_it() -> None:
    job = go([[2, 0]], initial=(2,), policy=compose(order=IndexOrder()))
    assert job.timeline.experts() == [Kernel("experts", 0, (0, 2), 140, 160)]
    assert job.counters.miss_stall_ns == COPY


def test_in_index_order_resident_experts_ahead_of_the_missing_one_run() -> None:
    job = go([[4, 2, 0]], initial=(0, 4), policy=compose(order=IndexOrder()))
    assert job.timeline.experts() == [Kernel("experts", 0, (0,), 100, 110), Kernel("experts", 0, (2, 4), 140, 160)]


def test_in_index_order_the_second_to_land_may_be_the_first_to_run() -> None:
    forwards = decode([[[2, 5]]], NUM_EXPERTS)
    forwards[0].issue_order[0] = [5, 2]
    job = run(forwards, num_experts=NUM_EXPERTS, num_slots=10, policy=compose(order=IndexOrder()))
    assert [copy.key for copy in job.timeline.copies] == [5, 2]
    assert job.timeline.experts() == [Kernel("experts", 0, (2, 5), 180, 200)]


def test_serial_mode_copies_and_computes_in_turns() -> None:
    policy = compose(eviction=KeepNothing(), order=IndexOrder())
    job = go([[7, 3], [4, 8]], policy=policy, serial=True)
    layer_ns = ATTENTION + 2 * (COPY + EXPERT)
    expected = [(3, 0), (7, 0), (14, layer_ns), (18, layer_ns)]
    starts = [start + ATTENTION + (i % 2) * (COPY + EXPERT) for i, (_, start) in enumerate(expected)]
    assert job.timeline.copies == [Copy(key, 0, t, t + COPY) for (key, _), t in zip(expected, starts, strict=True)]
    assert [k.start_ns for k in job.timeline.experts()] == [t + COPY for t in starts]
    assert split(job) == (2 * (ATTENTION + 2 * EXPERT) + HEAD, 0, 4 * COPY, 0)


def test_serial_mode_takes_the_chunks_of_one_expert_back_to_back() -> None:
    policy = compose(eviction=KeepNothing(), order=IndexOrder())
    job = go([[3, 4]], policy=policy, serial=True, chunk_bytes=(30, 10))
    assert job.timeline.copies == [
        Copy(3, 0, 100, 130),
        Copy(3, 1, 130, 140),
        Copy(4, 0, 150, 180),
        Copy(4, 1, 180, 190),
    ]


def overlap_ns(job: Job) -> int:
    """Time in which a copy and an expert kernel run at once."""
    return sum(
        max(0, min(copy.end_ns, kernel.end_ns) - max(copy.start_ns, kernel.start_ns))
        for copy in job.timeline.copies
        for kernel in job.timeline.experts()
    )


def test_serial_mode_does_not_copy_under_the_shared_expert() -> None:
    policy = compose(eviction=KeepNothing(), order=IndexOrder())
    job = go([[3, 4]], policy=policy, serial=True, kernels=Kernels(shared=25))
    assert overlap_ns(job) == 0
    assert job.counters.elapsed_ns == ATTENTION + 25 + 2 * (COPY + EXPERT) + HEAD


@pytest.mark.parametrize("order", [IndexOrder(), None])
def test_serial_mode_does_not_copy_under_a_resident_expert(order: Order | None) -> None:
    job = go([[3, 4]], policy=compose(order=order), serial=True, initial=(3,))
    assert overlap_ns(job) == 0
    assert job.counters.elapsed_ns == ATTENTION + EXPERT + COPY + EXPERT + HEAD


def test_the_measure_of_overlap_sees_what_is_not_serial() -> None:
    assert overlap_ns(go([[3, 4]], initial=(3,))) == EXPERT


# -- when the routing is known -------------------------------------------------------------------------------


def test_the_gate_sync_is_paid_by_a_host_that_was_busy_issuing_when_attention_ended() -> None:
    costs = HostCosts(issue_ns=60, gate_sync_ns=5)
    policy = prefetching(14, 15, 16, 17, 18)
    job = go([[3], [9]], initial=(3,), policy=policy, costs=costs, chunk_bytes=(30,), channel_depth=2)
    attention = [kernel for kernel in job.timeline.kernels if kernel.kind == "attention"][1]
    assert (attention.start_ns, attention.end_ns) == (115, 215)
    last_issue = max(copy.start_ns for copy in job.timeline.copies if copy.key == 15)
    assert last_issue == 225  # the host was issuing until then
    assert job.timeline.demands[1].known_ns == last_issue + 5


def test_the_gate_sync_is_overhead_at_every_layer_that_misses() -> None:
    sync = 5
    job = go([[3], [4], [5]], [[6], [7], [8]], costs=HostCosts(gate_sync_ns=sync))
    layer_ns = ATTENTION + sync + COPY + EXPERT
    starts = [forward * (3 * layer_ns + HEAD) + layer * layer_ns for forward in range(2) for layer in range(3)]
    known = [start + ATTENTION + sync for start in starts]
    keys = (3, 14, 25, 6, 17, 28)
    assert job.timeline.demands == [Demand(t, (), (), (key,)) for t, key in zip(known, keys, strict=True)]
    assert job.timeline.stalls == [Stall(t, t + COPY, key, True) for t, key in zip(known, keys, strict=True)]
    assert split(job) == (6 * (ATTENTION + EXPERT) + 2 * HEAD, 0, 6 * COPY, 6 * sync)


def test_the_gate_sync_is_overhead_after_a_layer_that_was_late() -> None:
    policy = compose(predictor=Scripted({(0, 0, 1): [14], (0, 1, 1): [25]}))
    sync, load = 5, 150
    job = go([[3], [4], [5]], initial=(3,), policy=policy, costs=HostCosts(gate_sync_ns=sync), chunk_bytes=(load,))
    first = ATTENTION + sync + EXPERT + ATTENTION + sync  # the routing of layer 1
    landed = ATTENTION + sync + load  # of the prefetch for it
    second = landed + EXPERT + ATTENTION + sync
    assert [demand.known_ns for demand in job.timeline.demands] == [ATTENTION + sync, first, second]
    late = landed + load  # the second prefetch was asked for meanwhile
    assert job.timeline.stalls == [Stall(first, landed, 14, False), Stall(second, late, 25, False)]
    assert split(job)[1:] == ((landed - first) + (late - second), 0, 3 * sync)


@pytest.mark.parametrize("serial", [False, True])
def test_copies_in_no_time_leave_the_gate_sync_as_overhead(serial: bool) -> None:
    policy = compose(eviction=KeepNothing())
    costs = HostCosts(launch_ns=2, launch_latency_ns=3, gate_sync_ns=5, layer_overhead_ns=7, token_sync_ns=11)
    job = go(
        [[3, 4], [4, 5]],
        [[3, 4], [4, 5]],
        policy=policy,
        costs=costs,
        link=IDEAL_LINK,
        serial=serial,
        chunk_bytes=(20, 20),
    )
    assert (job.counters.num_misses, job.timeline.stalls) == (8, [])
    assert split(job)[1:3] == (0, 0)
