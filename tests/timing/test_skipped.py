"""Where there is nothing to decide, nothing is decided and nothing is charged; and how late the host was is booked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from expertflow.parts import Horizon
from expertflow.policy import Policy
from expertflow.runtime import Runtime
from expertflow.view import View
from sim.machine.simulated import HostCosts, SimMachine
from tests.support.runs import Job, Kernels, Scripted, TakeAll, build, compose, decode

DECIDE_NS = 1000
SLOW = HostCosts(decide_ns=DECIDE_NS)


class At(Horizon):
    """Looks so far ahead, at these layers alone."""

    def __init__(self, layers: Sequence[int], reach: int = 1) -> None:
        self.layers, self.reach = layers, reach

    def start(self, view: View, future: Any) -> None:
        self.view = view

    def distances(self) -> Sequence[int]:
        return list(range(1, self.reach + 1)) if self.view.layer in self.layers else ()


class Counting(SimMachine):
    """Notes every decision that it is told of."""

    told: list[tuple[int, list[int]]]

    def watch(self, runtime: Runtime) -> None:
        self.told, self.view = [], runtime.view

    def decided(self, wants: Sequence[int], effort: float) -> None:
        super().decided(wants, effort)
        self.told.append((self.view.layer, list(wants)))


Script = Mapping[tuple[int, int, int], Sequence[int]]


def job_of(
    layers: Sequence[int],
    script: Script | None = None,
    routings: Sequence[Any] = ([[0], [0], [0]],),
    reach: int = 1,
    **settings: Any,
) -> Job:
    """Three layers of 100 ns attention and 10 ns an expert, 50 ns head, deciding at `layers`."""
    policy = compose(predictor=Scripted(script or {}), horizon=At(layers, reach), selection=TakeAll())
    plain: dict[str, Any] = {"num_experts": 4, "num_slots": 12, "costs": SLOW, "machine_type": Counting}
    made = build(decode(routings, 4), policy=policy, **{**plain, **settings})
    assert isinstance(made.machine, Counting)
    made.machine.watch(made.runtime)
    return made


EVERY = tuple(range(12))


@pytest.mark.parametrize(
    ("layers", "elapsed_ns", "late_ns"),
    [
        # Attention 100, expert 10, three times, and the head.
        ((), 380, 0),
        # Decided until 1100; layer 1's attention had ended at 210. Then 10, 100, 10, 50 for the device alone.
        ((0,), 1270, 890),
        # Decided from 210 to 1210; layer 2's attention had ended at 320.
        ((1,), 1270, 890),
        # Decided from 320 to 1320; the head had ended at 380: that is late as well.
        ((2,), 1320, 940),
        ((0, 1, 2), 3100, 890 + 890 + 940),
    ],
)
def test_what_is_charged_is_what_was_decided(layers: Sequence[int], elapsed_ns: int, late_ns: int) -> None:
    job = job_of(layers, initial=EVERY).run()
    assert isinstance(job.machine, Counting)
    assert job.machine.told == [(layer, []) for layer in layers]
    assert job.counters.elapsed_ns == elapsed_ns
    assert job.runtime.view.late_ns == late_ns
    policy = job.runtime.policy
    assert policy.num_decisions == len(layers)
    assert policy.reach_counts[:2] == [3 - len(layers), len(layers)]


def test_nothing_is_decided_where_the_horizon_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    decide = Policy.decide

    def noting(self: Policy, layer: int) -> Sequence[int] | None:
        told.append(decide(self, layer))
        return told[-1]

    monkeypatch.setattr(Policy, "decide", noting)
    job_of((1,), initial=EVERY).run()
    assert told == [None, [], None]


def test_an_expert_that_lands_while_the_host_decides_is_launched_late() -> None:
    """Layer 0 misses: 40 ns of copy from 100 to 140, decided until 1100, launched then: 960 late. Attention 1 ends at
    1210, decided nowhere else."""
    job = job_of((0,), initial=EVERY[1:]).run()
    (first, *_) = job.timeline.experts()
    assert (first.start_ns, first.end_ns) == (1100, 1110)
    assert job.runtime.view.late_ns == 960
    assert job.counters.elapsed_ns == 1110 + 110 + 110 + 50
    # What the copy took is stall; what the host took is not.
    assert job.counters.stall_ns == 40


def test_read_back_takes_its_time_and_is_late_by_as_much() -> None:
    job = job_of((), initial=EVERY, costs=HostCosts(gate_sync_ns=7, token_sync_ns=20)).run()
    assert job.runtime.view.late_ns == 3 * 7 + 20


def test_what_was_wanted_before_stays_wanted() -> None:
    """Copies of 300 ns one after the other: layer 0 wants 5 and 9, the layers after it decide nothing. 5 is copied from
    500 to 800, and 9, of layer 2, behind it, before layer 2's routing at 1520."""
    script = {(0, 0, 1): [5], (0, 0, 2): [9]}
    settings: dict[str, Any] = {
        "kernels": Kernels(attention=500),
        "chunk_bytes": (300,),
        "costs": HostCosts(),
        "initial": (0, 4, 8),
        "channel_depth": 1,
    }
    job = job_of((0,), script, ([[0], [0], [1]],), 2, **settings).run()
    assert [(copy.key, copy.start_ns, copy.end_ns) for copy in job.timeline.copies] == [(5, 500, 800), (9, 800, 1100)]
    assert isinstance(job.machine, Counting)
    assert job.machine.told == [(0, [5, 9])]
    assert job.counters.prefetch_useful == 1
    assert job.runtime.view.num_used == 1
    assert job.counters.num_misses == 0


def test_what_was_wanted_of_a_layer_that_has_passed_is_dropped() -> None:
    """Copies of 3000 ns: 5 is under way, 6 of the same layer waits behind it when that layer's routing is known."""
    settings: dict[str, Any] = {"chunk_bytes": (3000,), "costs": HostCosts(), "initial": (0, 4, 8), "channel_depth": 1}
    job = job_of((0,), {(0, 0, 1): [5, 6]}, ([[0], [0], [0]],), **settings).run()
    assert (job.counters.prefetch_requested, job.counters.prefetch_issued, job.counters.dropped_passed) == (2, 1, 1)


def test_a_prefetched_expert_counts_once_in_time_or_late() -> None:
    """5 is on its way when layer 1 demands it, and again in the next forward: used once."""
    settings: dict[str, Any] = {"chunk_bytes": (3000,), "costs": HostCosts(), "initial": (0, 4, 8), "channel_depth": 1}
    job = job_of((0,), {(0, 0, 1): [5]}, ([[0], [1], [0]], [[0], [1], [0]]), **settings).run()
    assert (job.counters.prefetch_late, job.counters.num_late) == (1, 1)
    assert job.runtime.view.num_used == 1
