"""What a busy host costs, worked out by hand on both sides of each boundary, and that costs of 0 change nothing.

Unless a test says otherwise: attention 100 ns, one expert 10, head 50, one expert's copy 40; all else is free.
Keys of layer 0 are 0 … 9, of layer 1 10 … 19.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from sim.job.setup import Transfer, Workload
from sim.machine.host_bound import HostBoundMachine, machine_for
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.machine.run import run_floor, run_policy
from sim.machine.simulated import HostCosts, SimMachine
from sim.specs.hardware import Stack
from sim.specs.kernel_table import KernelTable
from tests.policy.test_bounds import fits
from tests.support.checked import CheckedMachine
from tests.support.runs import (
    Copy,
    Job,
    Kernel,
    Scripted,
    Stall,
    batches,
    build,
    compose,
    decode,
    run,
)
from tests.support.workloads import HARDWARE, drawn_workload, memory_trace, model_of, policy_for, policy_names, workload
from tests.timing.test_properties import Case, cases

NUM_EXPERTS = 10
RESIDENT = (3, 4, 5, 13)
COSTS = ("classify_ns", "observe_ns", "forward_ns", "group_ns", "copy_start_ns", "release_ns", "release_latency_ns")


def go(*routings: Sequence[Sequence[int]], **given: Any) -> Job:
    """Run one token per routing (routings[f][l] = experts), 3, 4, 5 and 13 resident; `given`: costs, or settings."""
    names = HostCosts.__dataclass_fields__
    costs = HostCosts(**{key: given.pop(key) for key in list(given) if key in names})
    resident = tuple(key for key in RESIDENT if key < NUM_EXPERTS * len(routings[0]))
    return run(
        decode(routings, NUM_EXPERTS),
        num_experts=NUM_EXPERTS,
        num_slots=10,
        initial=resident,
        machine_type=HostBoundMachine,
        costs=costs,
        **given,
    )


# -- classify, observe, forward -------------------------------------------------------------------------------


def test_classifying_comes_between_the_routing_and_the_first_launch_of_each_layer() -> None:
    job = go([[3], [3]], classify_ns=7)
    assert job.timeline.kernels == [
        Kernel("attention", 0, (), 0, 100),
        Kernel("experts", 0, (3,), 107, 117),
        Kernel("attention", 1, (), 117, 217),
        Kernel("experts", 1, (13,), 224, 234),
        Kernel("head", 1, (), 234, 284),
    ]
    assert [demand.known_ns for demand in job.timeline.demands] == [100, 217]
    assert job.counters.overhead_ns == 14


def test_classifying_delays_the_copy_of_a_miss_which_the_stall_contains() -> None:
    job = go([[6]], classify_ns=7)
    assert job.timeline.copies == [Copy(6, 0, 107, 147)]
    assert job.timeline.stalls == [Stall(100, 147, 6, True)]
    assert (job.counters.elapsed_ns, job.counters.overhead_ns) == (207, 0)


def test_observing_a_landing_delays_the_launch_and_is_overhead() -> None:
    job = go([[6]], observe_ns=9)
    assert job.timeline.copies == [Copy(6, 0, 100, 140)]
    assert job.timeline.experts() == [Kernel("experts", 0, (6,), 149, 159)]
    assert job.timeline.stalls == [Stall(100, 140, 6, True)]
    assert (job.counters.elapsed_ns, job.counters.overhead_ns) == (209, 9)


def test_observing_the_tokens_delays_the_next_forward_alone() -> None:
    job = go([[3]], [[3]], observe_ns=9)
    assert job.timeline.ends_ns == [160, 160 + 9 + 160]
    assert job.timeline.demands[1].known_ns == 269


def test_a_chunk_seen_while_attention_runs_is_observed_and_the_routing_classified() -> None:
    policy = compose(predictor=Scripted({(0, 0, 1): (14, 15)}))
    job = go([[3], [3]], policy=policy, channel_depth=1, classify_ns=7, observe_ns=9)
    # 14 is asked for once 3 is launched, 15 once the end of 14 has been observed.
    assert job.timeline.copies == [Copy(14, 0, 107, 147), Copy(15, 0, 156, 196)]
    assert job.timeline.demands[1].known_ns == 217
    assert job.timeline.experts()[1] == Kernel("experts", 1, (13,), 224, 234)


@pytest.mark.parametrize(("observe", "known"), [(9, 215), (10, 215), (11, 216)])
def test_a_host_that_observes_past_the_end_of_attention_reads_the_routing_late(observe: int, known: int) -> None:
    policy = compose(predictor=Scripted({(0, 0, 1): (14, 15)}))
    job = go([[3], [3]], policy=policy, channel_depth=1, chunk_bytes=(100,), gate_sync_ns=5, observe_ns=observe)
    assert job.timeline.copies == [Copy(14, 0, 105, 205)]
    assert job.timeline.kernels[2] == Kernel("attention", 1, (), 115, 215)
    assert job.timeline.demands[1].known_ns == known + 5


def test_every_launch_takes_its_own_time_on_the_stream_and_that_is_compute() -> None:
    job = go([[3]], group_ns=7)
    assert [(kernel.kind, kernel.start_ns, kernel.end_ns) for kernel in job.timeline.kernels] == [
        ("attention", 0, 107),
        ("experts", 107, 124),
        ("head", 124, 181),
    ]
    assert job.counters.compute_ns == 181


@pytest.mark.parametrize("late", [0, 9])
def test_an_idle_link_begins_late(late: int) -> None:
    """Counted as the copy's own time, from its issue on: a real machine knows no event at which a link begins."""
    job = go([[7]], copy_start_ns=late)
    assert (job.timeline.copies[0].start_ns, job.timeline.copies[0].end_ns) == (100, 140 + late)
    assert job.counters.stall_ns == 40 + late


@pytest.mark.parametrize(("depth", "last"), [(2, 189), (1, 198)])
def test_a_copy_that_waits_behind_another_follows_at_once(depth: int, last: int) -> None:
    # With depth 1 the second is issued at 149, when the first has ended: the link has gone idle.
    job = go([[7, 8]], copy_start_ns=9, channel_depth=depth)
    assert [(copy.start_ns, copy.end_ns) for copy in job.timeline.copies] == [(100, 149), (149, last)]


def test_a_forward_begins_with_its_own_time_on_the_host() -> None:
    job = go([[3]], [[3]], forward_ns=11)
    starts = [kernel.start_ns for kernel in job.timeline.kernels if kernel.kind == "attention"]
    assert starts == [11, 171 + 11]
    assert job.timeline.ends_ns == [171, 342]
    assert job.counters.overhead_ns == 22


# -- every run ------------------------------------------------------------------------------------------------


class CheckedHostBound(CheckedMachine, HostBoundMachine):
    """A host-bound machine that watches its slots."""


def job_of(case: Case, machine_type: type[SimMachine], costs: HostCosts) -> Job:
    """The case's job on another machine."""
    return build(
        case.forwards,
        num_experts=case.num_experts,
        policy=case.policy(),
        machine_type=machine_type,
        **{**case.settings, "costs": costs},
    )


many = settings(deadline=None, max_examples=200)


@pytest.mark.slow
@given(case=cases())
@many
def test_costs_of_0_leave_every_run_as_it_was(case: Case) -> None:
    costs = replace(case.settings["costs"], **dict.fromkeys(COSTS, 0))
    plain, bound = (job_of(case, kind, costs).run() for kind in (SimMachine, HostBoundMachine))
    assert bound.timeline == plain.timeline
    assert bound.counters == plain.counters


@pytest.mark.slow
@given(case=cases())
@many
def test_with_any_costs_the_books_balance_and_no_slot_is_overwritten_while_read(case: Case) -> None:
    job = job_of(case, CheckedHostBound, case.settings["costs"])
    assert isinstance(job.machine, CheckedMachine)
    job.machine.watch(job.runtime)
    job.run()
    assert job.counters.num_forwards == len(case.forwards)
    ends = [kernel.end_ns for kernel in job.timeline.kernels]
    assert ends == sorted(ends)


# -- choosing the machine, and the floor ----------------------------------------------------------------------


def with_costs(work: Workload, **costs: Any) -> Workload:
    """The workload under a stack with these costs as well."""
    return replace(work, stack=replace(work.stack, **costs))


@pytest.mark.parametrize("key", COSTS[:-1])
def test_one_cost_is_enough_for_the_machine_that_charges_it(key: str) -> None:
    work = drawn_workload(0)
    bare, link = Stack("bare", 1000, 1000), Link(HARDWARE)
    kernels = KernelTimes(work.model, HARDWARE, bare)
    found = [
        type(machine_for(kernels, link, HostCosts.of(HARDWARE, stack), (10,)))
        for stack in (bare, Stack("bare", 1000, 1000, **{key: 1}))
    ]
    assert found == [SimMachine, HostBoundMachine]


def elapsed(work: Workload, policy: str) -> int:
    """Time of one run."""
    found: int = run_policy(work, *policy_for(work, policy))["elapsed_ns"]
    return found


def alone(**costs: Any) -> Workload:
    """Resident experts in one layer, from which a forward follows the other: nothing overlaps but the head."""
    work = next(work for work in map(drawn_workload, range(100)) if work.start == "resident")
    hardware = replace(HARDWARE, token_sync_ns=70_000)
    return with_costs(replace(work, hardware=hardware, stack=Stack("none", 0, 300_000)), **costs)


@pytest.mark.parametrize("key", ["classify_ns", "forward_ns", "observe_ns"])
def test_a_run_without_overlap_is_as_long_as_its_floor_to_the_nanosecond(key: str) -> None:
    work = alone(**{key: 12_345})
    assert run_floor(work).floor_ns == elapsed(work, "lru")
    assert run_floor(work).floor_ns > run_floor(alone()).floor_ns


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_no_policy_beats_the_floor_of_a_busy_host(seed: int) -> None:
    work = drawn_workload(seed)
    scale = (300, 20_000, 400_000)[seed % 3]
    costs: dict[str, Any] = {key: 1 + (7919 * (seed + 1) * (place + 1)) % scale for place, key in enumerate(COSTS)}
    busy = with_costs(work, **costs)
    limit = run_floor(busy).floor_ns
    # Experts that are launched ahead may begin earlier than they would be launched.
    released = {key: costs[key] for key in COSTS if key.startswith("release")}
    assert limit >= run_floor(with_costs(work, **released)).floor_ns
    names = [name for name in policy_names() if fits(work, name)]
    assert [name for name in names if elapsed(busy, name) < limit] == []


def test_a_little_more_than_the_floor_of_a_busy_host_is_beaten() -> None:
    work = alone(classify_ns=12_345)
    taken = run_policy(work, policy_for(work, "lru")[0], Transfer())["elapsed_ns"]
    assert taken < run_floor(work).floor_ns * 1.01


def test_the_kernel_after_the_last_load_is_as_short_as_any_of_the_table() -> None:
    """Points need not rise: two tokens may be faster than one, and the floor must not take them for longer."""
    experts = np.array([[[0]], [[1]], [[2]]], np.uint8)
    work = workload(memory_trace(experts, 4, [0, 3], [0]), model_of(1, 4, 1), 1)

    def floor_ns(fast_ns: float) -> int:
        points = ((1, 5000.0), (2, fast_ns))
        table = KernelTable(expert=points, head=((1, 1.0),), attention=((1, 1.0),), kv=0.0)
        hardware = replace(HARDWARE, link_gb_per_s=0.001, pageable_gb_per_s=0.001, kernel_ns={work.model.name: table})
        found = run_floor(replace(work, hardware=hardware))
        assert found.binding_event == 2
        return found.floor_ns

    assert floor_ns(6000.0) - floor_ns(3000.0) == 2000


# -- experts launched ahead -----------------------------------------------------------------------------------

AHEAD = {"launch_ns": 20, "launch_latency_ns": 3, "release_ns": 2, "release_latency_ns": 1}


def test_experts_that_are_launched_ahead_are_only_told_to_begin() -> None:
    """Launching them takes the host as long as attention, behind it; telling them 2, and they begin 1 later."""
    job = go([[3], [3]], **AHEAD)
    assert job.timeline.kernels == [
        Kernel("attention", 0, (), 23, 123),
        Kernel("experts", 0, (3,), 126, 136),
        Kernel("attention", 1, (), 125 + 23, 248),
        Kernel("experts", 1, (13,), 251, 261),
        Kernel("head", 1, (), 250 + 23, 323),
    ]


def test_a_host_that_still_launches_ahead_knows_the_routing_later() -> None:
    """Attention is launched at 70 and over at 173; what may follow it is launched by 140, then by 210."""
    job = go([[3]], **(AHEAD | {"launch_ns": 70}))
    assert [demand.known_ns for demand in job.timeline.demands] == [173]
    job = go([[3]], **(AHEAD | {"launch_ns": 105}))
    assert [demand.known_ns for demand in job.timeline.demands] == [210]


def test_while_experts_are_missing_the_next_launch_is_made_ahead_again() -> None:
    """It is made by 145, behind the copies; a host that finds a copy landed at 143 comes late by 2."""
    job = go([[3, 6]], **AHEAD)
    assert job.timeline.copies == [Copy(6, 0, 123, 163)]
    assert job.timeline.experts() == [Kernel("experts", 0, (3,), 126, 136), Kernel("experts", 0, (6,), 166, 176)]
    job = go([[3, 6]], **AHEAD, chunk_bytes=(20,))
    assert job.timeline.experts()[1] == Kernel("experts", 0, (6,), 148, 158)


def test_forwards_of_several_tokens_are_launched_as_they_are_known() -> None:
    forwards = batches([[[[3]], [[4]]]], NUM_EXPERTS)
    job = run(
        forwards,
        num_experts=NUM_EXPERTS,
        num_slots=10,
        initial=(3, 4),
        machine_type=HostBoundMachine,
        costs=HostCosts(**AHEAD),
    )
    assert job.timeline.demands[0].known_ns == 123
    assert job.timeline.experts()[0].start_ns == 123 + 20 + 3


def test_where_a_release_takes_as_long_as_a_launch_the_floor_is_none_the_lower() -> None:
    work = alone(classify_ns=12_345)
    launch_ns, latency_ns = HARDWARE.launch_host_ns, HARDWARE.launch_latency_ns
    limit = run_floor(work).floor_ns
    assert run_floor(with_costs(work, release_ns=launch_ns, release_latency_ns=latency_ns)).floor_ns == limit
    assert run_floor(with_costs(work, release_ns=10 * launch_ns)).floor_ns == limit
    assert run_floor(with_costs(work, release_ns=1)).floor_ns < limit
