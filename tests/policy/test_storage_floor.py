"""The floor with storage below host memory: below every run, and what the disk alone leaves where that holds."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from expertflow.bounds import floor, min_loads
from expertflow.clairvoyant import portfolio
from expertflow.future import Future
from expertflow.host_memory import EVICTIONS, HostMemorySpec
from sim.job.setup import Transfer, Workload
from sim.machine.run import run_floor, run_policy
from sim.specs.storage import Storage
from tests.support.runs import Disk, Kernels, build, compose, decode
from tests.support.workloads import drawn_workload, policy_for

NUM_INSTANCES = 48
GROUPS = 4


def drawn(seed: int) -> Workload:
    """A drawn workload over a disk that is slower or faster than its link."""
    work, draw = drawn_workload(seed), random.Random(seed)
    num_keys = work.model.num_layers * work.model.num_experts
    num_slots = min(work.num_slots, max(num_keys - 2, 1))
    disk = Storage(
        "drawn",
        draw.choice([0, 20_000, 1_000_000]),
        draw.choice([0.05, 2.0, 20.0, ((4096, 0.5), (1 << 20, 2.0))]),
        draw.randint(1, 4),
        draw.choice([0, 2_000]),
        draw.choice(EVICTIONS),
    )
    start = "cold" if work.start == "resident" else work.start
    least = min(num_slots + 2, num_keys)
    return replace(work, num_slots=num_slots, storage=disk, host_slots=draw.randint(least, num_keys), start=start)


def test_the_floor_of_reads_is_what_is_left_when_nothing_else_takes_time() -> None:
    # One layer, one expert a token, each another: 40 bytes at 2 ns a byte, no latency, a link in no time.
    forwards = decode([[[key]] for key in range(6)], 6)
    job = build(
        forwards,
        num_experts=6,
        num_slots=1,
        policy=compose(),
        kernels=Kernels(attention=0, head=0),
        disk=Disk(latency_ns=0, ns_per_byte=2),
        storage=HostMemorySpec(2),
        chunk_bytes=(40,),
    ).run()
    reads = min_loads(forwards, Future(forwards, 6), 2)
    assert reads == [1, 2, 3, 4, 5, 6]
    assert floor(reads, [10] * 6, [0] * 6, 80, 10, 1).floor_ns == 6 * 80 + 10
    # Without prefetch each token adds its copy (40) and its kernel (10) to its read.
    assert job.counters.elapsed_ns == 6 * (80 + 40 + 10)


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_no_run_is_below_the_floor(group: int) -> None:
    num_above = 0
    for seed in range(group, NUM_INSTANCES, GROUPS):
        work = drawn(seed)
        bound = run_floor(work)
        alone = run_floor(replace(work, storage=None))
        assert bound.floor_ns >= alone.floor_ns
        assert bound.num_loads == alone.num_loads
        assert alone.num_reads == 0
        num_above += bound.floor_ns > alone.floor_ns
        for name in ("lru", "on_demand", "oracle", "two_level"):
            metrics = run_policy(work, *policy_for(work, name))
            assert metrics["elapsed_ns"] >= bound.floor_ns, f"seed {seed}, {name}"
            assert metrics["storage"]["reads"] >= bound.num_reads, f"seed {seed}, {name}"
        for name, policy in portfolio(work.future).items():
            assert run_policy(work, policy, Transfer())["elapsed_ns"] >= bound.floor_ns, f"seed {seed}, {name}"
    assert num_above > 0
