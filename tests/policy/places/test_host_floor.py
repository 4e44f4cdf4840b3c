"""With experts on the host no schedule beats the floor, which is held against all schedules of tiny instances."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from expertflow.bounds import HostFloor, floor, min_loads
from expertflow.forward import Forward
from expertflow.future import Future
from expertflow.parts import Place
from expertflow.places.balanced import Balanced
from expertflow.places.capped import Capped
from expertflow.places.cheaper import Cheaper
from expertflow.places.host_layers import HostLayers
from sim.job.setup import Workload
from sim.machine.run import run_floor, run_policy
from tests.attack.hostile_table import HOST
from tests.policy.test_bounds import drawn_events
from tests.support import reference
from tests.support.runs import ConstantLink, Host, Kernels, build, compose, events_of, eviction_named
from tests.support.workloads import drawn_workload, policy_for

SMALL = 60


def places() -> list[Place]:
    """One of each kind that may answer anything on any trace."""
    return [Cheaper(), Balanced(), Capped(1), Capped(1, behind=False), HostLayers(1)]


def bound(
    forwards: list[Forward], attention: int, kernel: int, load: int, host: int, num_slots: int, experts: int
) -> int:
    """The floor of an instance in the units of the exhaustive search."""
    num_layers = len(forwards[0].demands)
    told = HostFloor(host, 0)
    serial = [
        attention + told.split_ns([kernel * num for num in range(len(keys) + 1)])
        for forward in forwards
        for keys in forward.demands
    ]
    totals = min_loads(forwards, Future(forwards, num_layers * experts), num_slots)
    return floor(totals, serial, [0] * len(forwards), load, kernel, num_layers, told).floor_ns


@pytest.mark.parametrize("seed", range(SMALL))
def test_the_optimum_lies_between_floor_and_every_schedule(seed: int) -> None:
    forwards, num_experts, num_slots = drawn_events(seed, most=4)
    events = events_of(forwards, num_experts)
    draw = random.Random(seed)
    attention, kernel, load, host = draw.randint(1, 9), draw.randint(1, 5), draw.randint(1, 20), draw.randint(1, 20)
    times = ([attention] * len(events), [kernel] * len(events), load, num_slots)
    optimum = reference.brute_force_optimum(events, *times, host=host)
    assert optimum <= reference.brute_force_optimum(events, *times)
    assert bound(forwards, attention, kernel, load, host, num_slots, num_experts) <= optimum
    machine: dict[str, Any] = {
        "kernels": Kernels(attention, kernel, 0, 0),
        "link": ConstantLink(),
        "chunk_bytes": (load,),
        "host": Host(expert=host, way=0),
    }
    for place in places():
        policy = compose(eviction=eviction_named("lru", "global"), place=place)
        job = build(forwards, num_experts=num_experts, num_slots=num_slots, policy=policy, top_k=2, **machine).run()
        assert job.counters.elapsed_ns >= optimum, type(place).__name__


def test_the_optimum_is_sometimes_above_the_floor_and_sometimes_reached() -> None:
    """Else the test before this one could not fail; and the host makes a difference to both."""
    above = reached = lower = 0
    for seed in range(SMALL):
        forwards, num_experts, num_slots = drawn_events(seed, most=4)
        events = events_of(forwards, num_experts)
        times = ([3] * len(events), [2] * len(events), 10, num_slots)
        optimum = reference.brute_force_optimum(events, *times, host=7)
        found = bound(forwards, 3, 2, 10, 7, num_slots, num_experts)
        above += found < optimum
        reached += found >= optimum - 3
        lower += found < reference.floor_bound(events, *times)
    assert min(above, reached, lower) > 5, (above, reached, lower)


@pytest.mark.parametrize("seed", range(40))
def test_a_prefix_takes_the_least_over_all_splits(seed: int) -> None:
    draw = random.Random(seed)
    told = HostFloor(draw.randint(1, 50), draw.choice([0, draw.randint(1, 100)]))
    load, kernel = draw.randint(0, 50), draw.randint(1, 100)
    for num in range(1, 30):
        splits = [
            max(
                loaded * load + kernel if loaded else 0,
                (num - loaded) * told.fastest_ns + told.round_trip_ns if loaded < num else 0,
            )
            for loaded in range(num + 1)
        ]
        assert told.prefix_ns(num, load, kernel) == min(splits)


def with_host(seed: int) -> Workload:
    """A drawn workload whose hardware says what its host can do."""
    work = drawn_workload(seed)
    start = "popular" if work.start == "resident" else work.start
    return replace(work, hardware=replace(work.hardware, **HOST), start=start)


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("group", range(8))
def test_no_place_beats_the_floor_on_any_machine(group: int) -> None:
    on_host = 0
    for seed in range(group, 80, 8):
        work = with_host(seed)
        found = run_floor(work, with_host=True)
        assert found.floor_ns <= run_floor(work).floor_ns
        for name in ("lru", "on_demand", "fixed_1", "two_level", "lfu", "belady"):
            if name == "fixed_1" and work.model.num_layers < 2:
                continue
            for place in places():
                policy, transfer = policy_for(work, name)
                placed = type(policy)(*policy.parts[:5], future=policy.future, place=place)  # type: ignore[arg-type]
                metrics = run_policy(work, placed, transfer)
                assert metrics["elapsed_ns"] >= found.floor_ns, f"seed {seed}, {name}, {type(place).__name__}"
                counts = ("num_hits", "num_late", "num_misses", "num_host")
                assert metrics["num_accesses"] == sum(metrics[key] for key in counts)
                on_host += metrics["num_host"]
    assert on_host > 0
