"""What is in GPU memory from the start and never leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from expertflow.future import Future
from expertflow.parts import Eviction
from expertflow.places.host_experts import HostExperts
from expertflow.view import RESIDENT, View
from sim.job.setup import Transfer, Workload, run_config, start_note
from sim.machine.run import best_clairvoyant, run_floor, run_policy
from tests.policy.places.test_host_floor import HOST, places
from tests.support.commands import routing
from tests.support.runs import Host, build, compose, decode, eviction_named, run
from tests.support.workloads import HARDWARE, memory_trace, model_of, policy_conf, policy_for, workload

ROUTING = [
    [[0, 1], [0, 6], [4, 0]],
    [[1, 4], [0, 6], [4, 7]],
    [[1, 4], [4, 1], [6, 0]],
    [[1, 6], [4, 6], [6, 0]],
    [[1, 6], [4, 6], [5, 6]],
    [[4, 5], [0, 6], [5, 0]],
    [[5, 1], [0, 1], [0, 5]],
    [[6, 3], [7, 0], [6, 0]],
]
"""Eight tokens of a model of 3 layers, 8 experts and top-2: 48 accesses."""


def static(num_slots: int = 12, **changes: Any) -> Workload:
    """The tokens above, the most used experts pinned."""
    trace = memory_trace(np.array(ROUTING, np.uint8), 8, [0, 8], [0])
    return workload(trace, model_of(3, 8, 2), num_slots, start="pinned", **changes)


def test_of_twelve_pinned_experts_four_of_48_accesses_miss() -> None:
    work = static()
    metrics = run_policy(work, *policy_for(work, "on_demand", "policy.transfer.staging_slots=2"))
    assert (metrics["num_accesses"], metrics["num_hits"], metrics["num_misses"]) == (48, 44, 4)
    assert metrics["num_evictions"] == 4


@pytest.mark.parametrize("slots", [1, 5, 12, 20, 23])
def test_pinned_experts_miss_what_is_not_among_the_most_used(slots: int) -> None:
    """Whatever the eviction: it has the staging slots alone."""
    counts = np.bincount([layer * 8 + expert for token in ROUTING for layer, row in enumerate(token) for expert in row])
    wanted = int(np.sort(counts)[::-1][slots:].sum())
    for name in ("on_demand", "lru", "lfu", "two_level", "belady"):
        work = static(slots)
        policy, transfer = policy_for(work, name, "policy.transfer.staging_slots=2")
        metrics = run_policy(work, policy, transfer)
        assert metrics["num_misses"] == wanted if name == "on_demand" else metrics["num_misses"] <= wanted
        assert metrics["num_hits"] >= 48 - wanted


def test_the_floor_holds_for_a_pinned_start() -> None:
    for slots in (5, 12, 20):
        work = static(slots)
        for name in ("on_demand", "lru", "belady"):
            policy, transfer = policy_for(work, name, "policy.transfer.staging_slots=2")
            assert run_policy(work, policy, transfer)["elapsed_ns"] >= run_floor(work, 2).floor_ns


def test_without_a_slot_for_the_others_a_pinned_start_is_refused() -> None:
    work = static()
    message = (
        r"start pins experts into all 12 slots, and none is left .*\.staging_slots=1 or more, or a place that keeps"
    )
    with pytest.raises(ValueError, match=message):
        run_policy(work, *policy_for(work, "lru"))
    assert run_policy(static(24), *policy_for(work, "lru"))["num_misses"] == 0


class Tries(Eviction):
    """Answers whatever is resident first, if that is not shown as pinned."""

    def start(self, view: View, future: Future | None) -> None:
        self.view = view
        self.heard: set[int] = set()

    def touched(self, keys: Sequence[int]) -> None:
        self.heard.update(keys)

    def admitted(self, key: int, cause: int) -> None:
        self.heard.add(key)

    def victim(self, key: int, cause: int) -> int | None:
        view = self.view
        return next(
            (one for one, state in enumerate(view.residency) if state == RESIDENT and one not in view.pinned), None
        )


def test_no_part_hears_of_what_never_leaves_but_by_what_is_pinned() -> None:
    eviction = Tries()
    routing_of = [[[0, 1]], [[2, 3]], [[1, 3]], [[0, 2]]]
    forwards = decode(routing_of, 4)
    job = run(forwards, num_experts=4, num_slots=3, policy=compose(eviction=eviction), initial=(1, 0), num_pinned=2)
    assert job.runtime.slots.state[0] == job.runtime.slots.state[1] == RESIDENT
    assert eviction.heard == {2, 3}
    assert (job.counters.num_hits, job.counters.num_misses) == (5, 3)


def test_whole_layers_are_pinned_from_the_last_on_and_the_rest_is_an_ordinary_cache() -> None:
    trace = memory_trace(routing((4, 6, 2), 30), 6, [0, 30], [0])
    work = workload(trace, model_of(4, 6, 2), 15, start="pinned_layers")
    assert work.initial() == tuple(range(12, 24))
    job = build(list(work.batches), num_experts=6, num_slots=15, initial=work.initial(), num_pinned=12)
    job.run()
    state = job.runtime.slots.state
    assert all(state[key] == RESIDENT for key in range(12, 24))
    assert sum(state[key] == RESIDENT for key in range(12)) == 3
    config = run_config(work, Transfer(), (1,))
    assert (config.num_pinned, config.all_initial) == (12, True)
    # Split by layer the last layers have no more slots than the others.
    with pytest.raises(ValueError, match=r"the start needs room for 12 experts, and 7 find a slot; raise residency"):
        run_policy(work, *policy_for(work, "lru_per_layer"))


@pytest.mark.parametrize("start", ["pinned", "pinned_layers"])
def test_with_places_on_the_host_nothing_else_needs_room(start: str) -> None:
    """All but the pinned is computed on the host where the place says so, and nothing is ever copied."""
    work = replace(static(8), start=start, hardware=replace(HARDWARE, **HOST))
    stays = sorted(set(range(24)) - set(work.initial()[:8]))
    policy, transfer = policy_for(work, "lru")
    placed = type(policy)(*policy.parts[:5], place=HostExperts(stays))  # type: ignore[arg-type]
    metrics = run_policy(work, placed, transfer)
    assert (metrics["num_misses"], metrics["bytes"]["demand"]) == (0, 0)
    assert metrics["num_hits"] + metrics["num_host"] == 48


def test_a_pinned_start_reads_ahead_and_pinned_layers_do_not() -> None:
    starts = ("cold", "resident", "popular", "pinned", "pinned_layers")
    found = [replace(static(), start=start).start_reads_ahead for start in starts]
    assert found == [False, False, True, True, False]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("eviction", ["lru", "lfu", "belady_forced", "two_level"])
def test_what_is_pinned_stays_under_every_eviction_and_place(eviction: str, scope: str) -> None:
    forwards = decode([[[row % 5, (row * 3 + 1) % 5], [row % 4, 4]] for row in range(20)], 5)
    for place in places():
        future = Future(forwards, 10)
        policy = compose(eviction=eviction_named(eviction, scope), future=future, place=place)
        job = run(
            forwards, num_experts=5, num_slots=8, policy=policy, initial=(1, 7, 2), num_pinned=3, host=Host(slower=1.5)
        )
        kept = [key for key in (1, 7, 2) if key not in policy.stays_on_host]
        assert [key for key in range(10) if key in (1, 7, 2) and job.runtime.slots.state[key] == RESIDENT] == sorted(
            kept
        )


def test_a_clairvoyant_schedule_keeps_what_is_pinned() -> None:
    work = static(6)
    name, metrics = best_clairvoyant(work, transfer=Transfer(staging_slots=2))
    assert name
    assert metrics["elapsed_ns"] >= run_floor(work, 2).floor_ns


@pytest.mark.parametrize(
    ("policy", "start", "told"),
    [
        ("on_demand", "popular", True),
        ("on_demand", "cold", False),
        ("on_demand", "pinned", False),
        ("lru", "popular", False),
    ],
)
def test_a_policy_that_drops_what_it_began_with_says_so(policy: str, start: str, told: bool) -> None:
    note = start_note({"policy": policy_conf(policy), "start": start})
    assert (note is not None) == told
    if note:
        assert note.startswith("start=popular: on_demand gives up every expert when its layer has run")
