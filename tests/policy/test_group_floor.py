"""Where experts launched at once have times of their own: no schedule beats the floor, and sums of singles change
nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from expertflow.bounds import floor, min_loads
from expertflow.future import Future
from sim.job.setup import Workload
from sim.machine.run import run_floor, run_policy
from sim.specs.hardware import Hardware
from sim.specs.kernel_table import GroupPoints, KernelTable
from tests.policy.test_bounds import drawn_events, elapsed, fits, schedules
from tests.support import reference
from tests.support.runs import ConstantLink, Kernels, build, events_of
from tests.support.workloads import drawn_workload, memory_trace, model_of, policy_for, policy_names, workload

SMALL = 60
FREE = Hardware(
    name="free",
    memory_gb=80.0,
    memory_gb_per_s=2000.0,
    tflops=300.0,
    link_gb_per_s=math.inf,
    pageable_gb_per_s=6.0,
    memory_efficiency=1.0,
    compute_efficiency=1.0,
    link_latency_ns=0,
    launch_host_ns=0,
    launch_latency_ns=0,
    issue_copy_ns=0,
    gate_sync_ns=0,
    token_sync_ns=0,
    decide_ns=0,
)
"""Nothing but kernels takes time."""


def drawn_groups(draw: random.Random) -> GroupPoints:
    """Groups that cost less than their experts, as much, or more."""
    experts = [1, *sorted(draw.sample(range(2, 7), draw.randint(1, 2)))]
    tokens = sorted(draw.sample([1, 2, 4, 8], draw.randint(1, 3)))
    each, share = draw.choice([3_000, 40_000]), draw.choice([0.2, 0.7, 1.0, 1.3])
    return tuple(
        (count, per, each * (1 + share * (count - 1)) * (0.8 + 0.1 * per) + draw.randint(0, 500))
        for count in experts
        for per in tokens
    )


def table_of(work: Workload, groups: GroupPoints, **changes: Any) -> KernelTable:
    """A table of the workload's model; one expert by itself as a group of one."""
    alone = tuple((int(tokens), ns) for count, tokens, ns in groups if count == 1)
    shared: Any = ((1, 2_000.0), (4, 3_000.0)) if work.model.shared_intermediate else ()
    plain: dict[str, Any] = {
        "expert": alone,
        "head": ((1, 9_000.0),),
        "attention": ((1, 7_000.0), (4, 8_000.0)),
        "kv": 1.5,
        "shared": shared,
        "groups": groups,
    }
    return KernelTable(**{**plain, **changes})


def with_table(work: Workload, table: KernelTable) -> Workload:
    """The workload on a machine on which the table was measured."""
    return replace(work, hardware=replace(work.hardware, kernel_ns={work.model.name: table}))


def drawn_grouped(seed: int) -> Workload:
    """A small instance of everything, with times of groups, slow-downs and what a launch takes by itself."""
    draw = random.Random(seed)
    work = drawn_workload(seed)
    slowdowns = {
        key: draw.choice([1.0, 1.0, 1.5, 3.0]) for key in ("attention_slowdown", "experts_slowdown", "head_slowdown")
    }
    work = replace(work, stack=replace(work.stack, group_ns=draw.choice([0, 0, 2_500])))
    return with_table(work, table_of(work, drawn_groups(draw), **slowdowns))


@pytest.mark.mostly_slow(keep=4)
@pytest.mark.parametrize("seed", range(SMALL))
def test_no_policy_beats_the_floor(seed: int) -> None:
    work = drawn_grouped(seed)
    limit = run_floor(work).floor_ns
    below = [name for name in policy_names() if fits(work, name) and elapsed(work, name) < limit]
    assert below == []


@pytest.mark.slow
def test_other_floors_are_beaten() -> None:
    """The negative control: the sums of single experts are no floor, and 1 % more than the floor is none."""
    beaten = dict.fromkeys(("singles", "a little more"), 0)
    for seed in range(SMALL):
        work = drawn_grouped(seed)
        table = work.hardware.kernel_ns[work.model.name]
        singles = run_floor(with_table(work, replace(table, groups=()))).floor_ns
        found = min(elapsed(work, name) for name in ("clairvoyant", "belady", "lru") if fits(work, name))
        beaten["singles"] += found < singles
        beaten["a little more"] += found < run_floor(work).floor_ns * 1.01
    assert min(beaten.values()) > 3, beaten


@pytest.mark.slow
def test_a_busy_link_lengthens_kernels_and_leaves_the_floor() -> None:
    longer = 0
    for seed in range(SMALL):
        slowed = drawn_grouped(seed)
        table = slowed.hardware.kernel_ns[slowed.model.name]
        idle = with_table(slowed, replace(table, attention_slowdown=1.0, experts_slowdown=1.0, head_slowdown=1.0))
        assert run_floor(slowed) == run_floor(idle)
        first, second = (run_policy(one, *policy_for(one, "lru"))["compute_ns"] for one in (idle, slowed))
        longer += second > first
    assert longer > SMALL // 10


def test_a_schedule_may_split_what_is_slower_at_once() -> None:
    """Expert 0 stays, the other of each token is copied in no time and launched by itself: 2 * 100 us against 300."""
    experts = np.array([[[0, 1 + step % 3]] for step in range(12)], np.uint8)
    work = workload(memory_trace(experts, 4, [0, 12], [0]), model_of(1, 4, 2), 2, hardware=FREE)
    groups = ((1, 1, 100_000.0), (2, 1, 300_000.0))
    split = with_table(work, table_of(work, groups, attention=((1, 7_000.0),), kv=0.0))
    found = run_policy(split, *policy_for(split, "lru"))
    # Both experts of the first token land at once.
    assert found["elapsed_ns"] == 300_000 + 11 * 200_000 + 12 * (7_000 + 9_000)
    assert run_floor(split).floor_ns == 12 * (200_000 + 7_000 + 9_000)


@pytest.mark.mostly_slow(keep=12)
@pytest.mark.parametrize("seed", range(40))
def test_groups_that_are_sums_of_singles_change_no_run(seed: int) -> None:
    work = drawn_workload(seed)
    draw = random.Random(seed)
    alone, token = draw.randint(1_000, 50_000), draw.randint(0, 9_000)
    singles = ((1, float(alone)), (2, float(alone + token)))
    # Linear in experts and tokens, so that the mean of a group says as much as its sum.
    groups = tuple((count, each, float(count * (alone + token * (each - 1)))) for count in (1, 3) for each in (1, 2))
    table = table_of(work, groups, expert=singles)
    plain, grouped = (with_table(work, one) for one in (replace(table, groups=()), table))
    for name in ("lru", "fixed_1", "clairvoyant"):
        if fits(work, name):
            first, second = (run_policy(one, *policy_for(one, name)) for one in (plain, grouped))
            assert first == second
    # The floor may only lose what rounding may: half a nanosecond an expert.
    lost = run_floor(plain).floor_ns - run_floor(grouped).floor_ns
    assert 0 <= lost <= sum(len(keys) for forward in work.batches for keys in forward.demands)


# -- against every schedule there is --------------------------------------------------------------------------


@dataclass(frozen=True)
class ByCount(Kernels):
    """Times of 1, 2, 3 … experts at once."""

    group: tuple[int, ...] = ()

    def experts_ns(self, tokens: Sequence[int]) -> int:
        return self.group[len(tokens) - 1] if tokens else 0


Instance = tuple[list[Any], int, int, int, tuple[int, ...], int]


def drawn_instance(seed: int) -> Instance:
    """(forwards, experts, slots, attention, time by number of experts at once, load); time rises with the number."""
    forwards, num_experts, num_slots = drawn_events(seed, most=5)
    draw = random.Random(seed)
    attention, first, load = draw.randint(1, 9), draw.randint(2, 12), draw.choice([1, 3, 12])
    more = draw.randint(0, first + 3)
    return forwards, num_experts, num_slots, attention, (first, first + more), load


@pytest.mark.parametrize("seed", range(SMALL))
def test_the_optimum_of_all_groupings_lies_between_floor_and_every_schedule(seed: int) -> None:
    forwards, num_experts, num_slots, attention, group, load = drawn_instance(seed)
    events = events_of(forwards, num_experts)
    times = ([attention] * len(events), [1] * len(events), load, num_slots)
    optimum = reference.brute_force_optimum(events, *times, group=group)
    bound = reference.floor_bound(events, *times, group=group)
    assert bound <= optimum
    # The product's floor of the same instance, in the same units.
    num_layers = len(forwards[0].demands)
    serial = [attention + (group[0] if len(keys) == 1 else min(group[1], 2 * group[0])) for _, keys in events]
    totals = min_loads(forwards, Future(forwards, num_layers * num_experts), num_slots)
    assert floor(totals, serial, [0] * len(forwards), load, group[0], num_layers).floor_ns == bound
    machine: dict[str, Any] = {
        "kernels": ByCount(attention, 1, 0, 0, group=group),
        "link": ConstantLink(),
        "chunk_bytes": (load,),
    }
    for policy in schedules(forwards, num_experts):
        job = build(forwards, num_experts=num_experts, num_slots=num_slots, policy=policy, top_k=2, **machine).run()
        assert job.counters.elapsed_ns >= optimum, type(policy).__name__


def test_groups_make_schedules_shorter_and_their_optimum_is_reached() -> None:
    """Else the test before this one could not fail: sums of singles would be too high a floor."""
    above = reached = 0
    for seed in range(SMALL):
        forwards, num_experts, num_slots, attention, group, load = drawn_instance(seed)
        events = events_of(forwards, num_experts)
        times = ([attention] * len(events), [group[0]] * len(events), load, num_slots)
        optimum = reference.brute_force_optimum(events, *times, group=group)
        above += reference.floor_bound(events, *times) > optimum
        reached += reference.floor_bound(events, *times, group=group) == optimum
    assert (above > 5, reached > 5) == (True, True), (above, reached)


def test_singles_at_once_are_the_problem_of_before() -> None:
    """With groups that take as long as their experts one by one the shortest schedule is the same."""
    for seed in range(20):
        forwards, num_experts, num_slots, attention, group, load = drawn_instance(seed)
        events = events_of(forwards, num_experts)
        times = ([attention] * len(events), [group[0]] * len(events), load, num_slots)
        alone = reference.brute_force_optimum(events, *times)
        assert reference.brute_force_optimum(events, *times, group=(group[0], 2 * group[0])) == alone
