"""Kernels beside a busy link and experts launched at once, worked out by hand on both sides of each boundary.

Unless a test says otherwise: attention 100 ns, one expert 10, head 50, one expert's copy 40; the host is free.
Keys of layer 0 are 0 … 9, of layer 1 10 … 19.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.machine import Mark
from sim.machine.host_bound import HostBoundMachine, machine_for
from sim.machine.simulated import HostCosts, SimMachine
from sim.machine.slowed import SlowedMachine
from tests.support.checked import CheckedMachine
from tests.support.runs import (
    ConstantLink,
    Copy,
    Job,
    Kernel,
    Kernels,
    Scripted,
    Stall,
    batches,
    build,
    compose,
    decode,
    forward_of,
    run,
)
from tests.timing.test_properties import Case, cases

NUM_EXPERTS = 10
ATTENTION, EXPERTS, HEAD = (2.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 1.0, 2.0)
"""Factors of 2 on one kind of kernel alone."""


def go(*routings: Sequence[Sequence[int]], slowdowns: tuple[float, float, float], **given: Any) -> Job:
    """Run one token per routing (routings[f][l] = experts), 3 and 13 resident. expert: ns of one."""
    kernels = Kernels(expert=given.pop("expert", 10), slowdowns=slowdowns)
    resident = (3, 13)[: len(routings[0])]
    return run(
        decode(routings, NUM_EXPERTS),
        num_experts=NUM_EXPERTS,
        num_slots=10,
        initial=resident,
        kernels=kernels,
        machine_type=SlowedMachine,
        **given,
    )


# -- beside a busy link ---------------------------------------------------------------------------------------


def test_on_an_idle_link_no_kernel_is_slowed() -> None:
    job = go([[3]], slowdowns=(2.0, 3.0, 4.0))
    assert job.timeline.kernels == [
        Kernel("attention", 0, (), 0, 100),
        Kernel("experts", 0, (3,), 100, 110),
        Kernel("head", 0, (), 110, 160),
    ]


def test_a_kernel_that_a_copy_covers_takes_the_whole_factor() -> None:
    job = go([[3, 6]], slowdowns=EXPERTS)
    assert job.timeline.copies == [Copy(6, 0, 100, 140)]
    # The copy is over when 6 itself is computed.
    assert job.timeline.experts() == [Kernel("experts", 0, (3,), 100, 120), Kernel("experts", 0, (6,), 140, 150)]
    assert job.timeline.stalls == [Stall(120, 140, 6, True)]
    assert job.counters.elapsed_ns == 200


def test_a_kernel_that_a_copy_covers_in_part_takes_as_much_of_the_factor() -> None:
    job = go([[3, 6]], slowdowns=(1.0, 1.5, 1.0), expert=60)
    # 40 of 60 ns covered: 60 * (1 + 0.5 * 40 / 60) = 80.
    assert job.timeline.experts() == [Kernel("experts", 0, (3,), 100, 180), Kernel("experts", 0, (6,), 180, 240)]
    assert (job.counters.stall_ns, job.counters.compute_ns) == (0, 100 + 80 + 60 + 50)


def test_only_what_is_covered_on_an_idle_link_counts() -> None:
    # Covered from 100 to 140; slowed it runs until 138 of them, but it would have ended at 120.
    job = go([[3, 6]], slowdowns=(1.0, 1.9, 1.0), expert=20)
    assert job.timeline.experts()[0] == Kernel("experts", 0, (3,), 100, 138)


def test_a_copy_that_is_over_at_the_launch_counts_for_nothing() -> None:
    job = go([[3, 6, 7]], slowdowns=EXPERTS, expert=60, costs=HostCosts(issue_ns=60))
    # Issued at 160 and 220, when the host launches 3: of 220 … 280 the second copy covers 40.
    assert job.timeline.copies == [Copy(6, 0, 160, 200), Copy(7, 0, 220, 260)]
    assert job.timeline.experts()[0] == Kernel("experts", 0, (3,), 220, 320)


def test_two_copies_in_a_row_cover_together() -> None:
    job = go([[3, 6, 7]], slowdowns=EXPERTS, expert=70)
    assert job.timeline.copies == [Copy(6, 0, 100, 140), Copy(7, 0, 140, 180)]
    assert job.timeline.experts()[0] == Kernel("experts", 0, (3,), 100, 240)


@pytest.mark.parametrize(
    ("slowdowns", "second_copy_ns", "attention_end_ns", "head_ns"),
    [(ATTENTION, 240, 240, (250, 300)), (HEAD, 210, 210, (220, 300))],
)
def test_a_copy_that_is_issued_after_the_launch_slows_what_still_runs(
    slowdowns: tuple[float, float, float], second_copy_ns: int, attention_end_ns: int, head_ns: tuple[int, int]
) -> None:
    """The decision at layer 0 comes after the launch of layer 1's attention, that at layer 1 after the head's: each
    copy covers 30 of their ns."""
    policy = compose(predictor=Scripted({(0, 0, 1): [14], (0, 1, 1): [4]}))
    job = go([[3], [3]], [[3], [3]], slowdowns=slowdowns, policy=policy)
    assert job.timeline.copies == [Copy(14, 0, 100, 140), Copy(4, 0, second_copy_ns, second_copy_ns + 40)]
    assert job.timeline.kernels[2] == Kernel("attention", 1, (), 110, attention_end_ns)
    assert job.timeline.kernels[4] == Kernel("head", 1, (), *head_ns)


def test_a_copy_that_goes_on_slows_all_attention_that_it_meets() -> None:
    # 14 copies from 100 to 400: all of the second attention, of the next forward's first the 30 ns from 370 on.
    policy = compose(predictor=Scripted({(0, 0, 1): [14]}))
    job = go([[3], [3]], [[3], [3]], slowdowns=ATTENTION, policy=policy, chunk_bytes=(300,))
    attention = [kernel for kernel in job.timeline.kernels if kernel.kind == "attention"]
    assert [(kernel.start_ns, kernel.end_ns) for kernel in attention[:3]] == [(0, 100), (110, 310), (370, 500)]
    job = go([[3], [3]], [[3], [3]], slowdowns=HEAD, policy=policy, chunk_bytes=(300,))
    head = [kernel for kernel in job.timeline.kernels if kernel.kind == "head"]
    assert (head[0].start_ns, head[0].end_ns) == (220, 320)


def test_what_waits_in_the_stream_begins_later_by_what_its_forerunner_is_slowed() -> None:
    """Attention until 100, experts behind it. A copy from 40 on covers 40 of it; the experts' launch is long there."""
    machine = direct(SlowedMachine, ATTENTION)
    machine.attention(0)
    machine.experts(0, [3], None, False)
    machine.now_ns = 40
    machine.copy(1, 0, 5, 0, 40, 0)
    assert [(start, end) for _, start, end in marks_of(machine)] == [(0, 140), (140, 150)]


def test_a_launch_that_arrives_after_its_forerunner_ended_is_not_moved() -> None:
    """Attention until 100, or 120; the head's launch arrives at 130 all the same."""
    machine = direct(SlowedMachine, ATTENTION)
    machine.attention(0)
    machine.now_ns = 130
    machine.head()
    machine.now_ns = 80
    machine.copy(1, 0, 5, 0, 40, 0)
    assert [(start, end) for _, start, end in marks_of(machine)] == [(0, 120), (130, 180)]


def test_of_two_copies_each_slows_its_own_part() -> None:
    """From 20 to 60 and from 90 to 130: 40 and 10 ns of attention."""
    machine = direct(SlowedMachine, ATTENTION)
    machine.attention(0)
    for issued_ns in (20, 90):
        machine.now_ns = issued_ns
        machine.copy(1, 0, 5, 0, 40, 0)
    assert [(start, end) for _, start, end in marks_of(machine)] == [(0, 150)]


def direct(machine_type: type[SimMachine], slowdowns: tuple[float, float, float], **costs: int) -> SimMachine:
    """A machine at the begin of a forward of one token, to be called without a runtime."""
    kernels, link = cast(Any, Kernels(slowdowns=slowdowns)), cast(Any, ConstantLink())
    machine = machine_type(kernels, link, HostCosts(**costs), (40,))
    machine.begin_forward(forward_of(0, [[[3]]], NUM_EXPERTS))
    return machine


def marks_of(machine: SimMachine) -> Sequence[Mark]:
    """Every kernel launched so far."""
    return machine.record(10_000)[2]


@pytest.mark.parametrize(("start", "end"), [(39, 39 + 50 + 1), (40, 40 + 50), (41, 41 + 50)])
def test_a_copy_that_ends_as_the_kernel_starts_covers_none_of_it(start: int, end: int) -> None:
    machine = direct(SlowedMachine, HEAD, launch_latency_ns=start)
    machine.copy(1, 0, 3, 0, 40, 0)
    machine.head()
    assert marks_of(machine) == [(1, start, end)]


@pytest.mark.parametrize(("size", "end"), [(49, 199), (50, 200), (51, 200)])
def test_a_copy_that_begins_as_the_kernel_starts_covers_it_from_there(size: int, end: int) -> None:
    machine = direct(SlowedMachine, HEAD)
    attention = machine.attention(0)
    machine._chunk_ns[size] = size
    machine.copy(1, 0, 3, 0, size, attention)
    machine.head()
    assert marks_of(machine) == [(1, 0, 100), (2, 100, end)]


@pytest.mark.parametrize(("late", "end"), [(49, 51), (50, 50), (51, 50)])
def test_a_copy_that_begins_as_the_kernel_would_end_covers_none_of_it(late: int, end: int) -> None:
    machine = direct(HostBoundMachine, HEAD, copy_start_ns=late)
    machine.copy(1, 0, 3, 0, 40, 0)
    machine.head()
    assert marks_of(machine) == [(1, 0, end)]


def test_what_a_launch_takes_on_the_stream_is_slowed_with_its_kernels() -> None:
    machine = direct(HostBoundMachine, HEAD, group_ns=7)
    machine.copy(1, 0, 3, 0, 40, 0)
    machine.head()
    # 40 of 57 ns covered.
    assert marks_of(machine) == [(1, 0, 97)]


def test_a_copy_into_a_slot_that_a_slowed_kernel_reads_waits_for_it() -> None:
    machine = direct(SlowedMachine, HEAD)
    machine.copy(1, 0, 3, 0, 40, 0)
    head = machine.head()
    machine.copy(2, 0, 4, 0, 40, head)
    # 50 + 40: the second copy covers nothing of a kernel that was launched before it.
    assert machine.record(10_000)[1:] == ([(1, 0, 0, 40), (2, 0, 90, 130)], [(1, 0, 90)])


def test_the_time_is_rounded_once() -> None:
    machine = direct(SlowedMachine, (1.0, 1.0, 1.26))
    machine.copy(1, 0, 3, 0, 40, 0)
    machine.head()
    assert marks_of(machine) == [(1, 0, 60)]  # 50 + 0.26 * 40 = 60.4


@pytest.mark.parametrize(
    ("slowdowns", "costs", "expected"),
    [
        ((1.0, 1.0, 1.0), {}, SimMachine),
        ((1.0, 1.0, 1.0), {"launch_ns": 5}, SimMachine),
        *[(one, {}, SlowedMachine) for one in (ATTENTION, EXPERTS, HEAD)],
        (HEAD, {"observe_ns": 1}, HostBoundMachine),
    ],
)
def test_one_factor_is_enough_for_the_machine_that_charges_it(
    slowdowns: tuple[float, float, float], costs: dict[str, int], expected: type[SimMachine]
) -> None:
    kernels, link = cast(Any, Kernels(slowdowns=slowdowns)), cast(Any, ConstantLink())
    assert type(machine_for(kernels, link, HostCosts(**costs), (40,))) is expected


class CheckedSlowed(CheckedMachine, SlowedMachine):
    """A slowed machine that watches its slots."""


def job_of(case: Case, machine_type: type[SimMachine], **changes: Any) -> Job:
    """The case's job on another machine."""
    return build(
        case.forwards,
        num_experts=case.num_experts,
        policy=case.policy(),
        machine_type=machine_type,
        **{**case.settings, **changes},
    )


many = settings(deadline=None, max_examples=150)


@pytest.mark.slow
@given(case=cases())
@many
def test_factors_of_1_leave_every_run_as_it_was(case: Case) -> None:
    plain, slowed = (job_of(case, kind).run() for kind in (SimMachine, SlowedMachine))
    assert slowed.timeline == plain.timeline
    assert slowed.counters == plain.counters


@pytest.mark.slow
@given(case=cases(), factors=st.tuples(*[st.sampled_from([1.0, 1.3, 4.0])] * 3))
@many
def test_with_any_factors_the_books_balance_and_no_slot_is_overwritten_while_read(
    case: Case, factors: tuple[float, float, float]
) -> None:
    job = job_of(case, CheckedSlowed, kernels=replace(case.settings["kernels"], slowdowns=factors))
    assert isinstance(job.machine, CheckedMachine)
    job.machine.watch(job.runtime)
    job.run()
    assert job.counters.num_forwards == len(case.forwards)
    ends = [kernel.end_ns for kernel in job.timeline.kernels]
    assert ends == sorted(ends)


# -- experts launched at once ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grouped(Kernels):
    """Experts at once: 10 ns, 4 more for each but the first, 1 more for each token but their first."""

    def experts_ns(self, tokens: Sequence[int]) -> int:
        return 10 + 4 * (len(tokens) - 1) + sum(tokens) - len(tokens) if tokens else 0


def grouped(*routings: Sequence[Sequence[int]], **given: Any) -> Job:
    """Run one token per routing on kernels for several experts."""
    kernels = Grouped(shared=given.pop("shared", 0))
    return run(decode(routings, NUM_EXPERTS), num_experts=NUM_EXPERTS, num_slots=10, kernels=kernels, **given)


def test_experts_of_one_launch_take_the_time_of_their_group() -> None:
    job = grouped([[3, 4, 5]], initial=(3, 4, 5))
    assert job.timeline.experts() == [Kernel("experts", 0, (3, 4, 5), 100, 118)]


def test_a_layer_in_two_launches_takes_two_groups() -> None:
    job = grouped([[3, 4, 5]], initial=(3, 5))
    assert job.timeline.experts() == [Kernel("experts", 0, (3, 5), 100, 114), Kernel("experts", 0, (4,), 140, 150)]


def test_tokens_count_into_the_group_of_their_launch() -> None:
    forwards = batches([[[[3, 4]], [[3, 5]], [[3, 4]]]], NUM_EXPERTS)
    job = run(forwards, num_experts=NUM_EXPERTS, num_slots=10, initial=(3, 4, 5), kernels=Grouped())
    # Three experts over six tokens: 10 + 2 * 4 + 3.
    assert job.timeline.experts() == [Kernel("experts", 0, (5, 3, 4), 100, 121)]


def test_shared_experts_are_added_to_the_group_of_their_launch() -> None:
    job = grouped([[3, 4]], initial=(3,), shared=25)
    assert job.timeline.experts() == [Kernel("experts", 0, (3,), 100, 135), Kernel("experts", 0, (4,), 140, 150)]
    alone = grouped([[4]], shared=25)
    assert alone.timeline.experts()[0] == Kernel("experts", 0, (), 100, 125)
