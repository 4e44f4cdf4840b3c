"""Does the link idle while the queue has work that may be issued? Eight chunks per load against one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from expertflow.horizons.fixed import FixedHorizon
from sim.machine.simulated import HostCosts
from tests.support.runs import Copy, Job, Kernels, Scripted, compose, decode, run

NUM_EXPERTS = 16
EXPERT_BYTES = 8_000
LONG = Kernels(attention=9_000, expert=5_000, head=9_000)


def prefetched(num_chunks: int, **settings: Any) -> Job:
    """Layer 0 is resident; at its routing all that layers 1 and 2 need is wanted; kernels outlast copies."""
    routing = [[0, 1], [2, 3], [4, 5]]
    first, second = (18, 19), (36, 37)
    policy = compose(predictor=Scripted({(0, 0, 1): first, (0, 0, 2): second}), horizon=FixedHorizon(depth=2))
    return go([routing], num_chunks, policy=policy, initial=(0, 1), **settings)


def go(routings: Sequence[Sequence[Sequence[int]]], num_chunks: int, **settings: Any) -> Job:
    """Run with experts of `num_chunks` equal chunks."""
    settings = {"num_slots": 40, "kernels": LONG, **settings}
    chunk_bytes = (EXPERT_BYTES // num_chunks,) * num_chunks
    return run(decode(routings, NUM_EXPERTS), num_experts=NUM_EXPERTS, chunk_bytes=chunk_bytes, **settings)


def idle_ns(copies: Sequence[Copy]) -> int:
    """Gaps between the first start and the last end."""
    return copies[-1].end_ns - copies[0].start_ns - sum(copy.end_ns - copy.start_ns for copy in copies)


def share_lost(eight: Job, one: Job) -> float:
    """How much longer the same loads take in eight chunks, from first start to last end."""
    spans = [job.timeline.copies[-1].end_ns - job.timeline.copies[0].start_ns for job in (eight, one)]
    return spans[0] / spans[1] - 1


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("num_chunks", [1, 8])
def test_with_a_free_host_prefetches_are_copied_back_to_back(num_chunks: int, depth: int) -> None:
    job = prefetched(num_chunks, channel_depth=depth)
    assert len(job.timeline.copies) == 4 * num_chunks
    assert idle_ns(job.timeline.copies) == 0


@pytest.mark.parametrize("depth", [2, 4])
def test_eight_chunks_keep_the_link_as_busy_as_one(depth: int) -> None:
    costs = HostCosts(issue_ns=100, launch_ns=50, decide_ns=300)
    eight, one = (prefetched(count, channel_depth=depth, costs=costs) for count in (8, 1))
    assert share_lost(eight, one) <= 0.02
    assert idle_ns(eight.timeline.copies) == 0


def test_a_channel_of_depth_one_loses_the_issue_cost_of_every_chunk() -> None:
    costs = HostCosts(issue_ns=500)
    eight, one = (prefetched(count, channel_depth=1, costs=costs) for count in (8, 1))
    assert idle_ns(one.timeline.copies) == (4 - 1) * 500
    assert idle_ns(eight.timeline.copies) >= (4 * 8 - 1) * 500
    assert share_lost(eight, one) > 0.02


@pytest.mark.parametrize("num_chunks", [1, 8])
def test_a_run_of_misses_is_copied_back_to_back(num_chunks: int) -> None:
    job = go([[[0, 1, 2, 3]]], num_chunks, channel_depth=2)
    assert idle_ns(job.timeline.copies) == 0
    assert job.counters.link_busy_ns == 4 * EXPERT_BYTES


def test_demand_in_eight_chunks_stalls_as_long_as_in_one() -> None:
    routings = [[[i, i + 1], [i + 2, i + 3], [i, i + 2]] for i in range(8)]
    costs = HostCosts(issue_ns=100, launch_ns=50)
    eight, one = (go(routings, count, costs=costs, num_slots=6) for count in (8, 1))
    assert eight.counters.num_misses == one.counters.num_misses > 20
    assert abs(eight.counters.elapsed_ns / one.counters.elapsed_ns - 1) <= 0.02


def test_prefetches_over_several_layers_keep_the_link_busy_through_waits_of_every_kind() -> None:
    script = {(0, 0, 3): range(49, 57), (0, 1, 3): range(1, 8)}  # layer 3, and layer 0 of the next forward
    policy = compose(predictor=Scripted(script), horizon=FixedHorizon(depth=3))
    initial = tuple(layer * NUM_EXPERTS for layer in range(4))
    kernels = Kernels(attention=25_000, expert=5_000, head=30_000)
    routing = [[0]] * 4
    job = go([routing, routing], 8, policy=policy, initial=initial, kernels=kernels)
    copies, head_start = job.timeline.copies, 4 * (25_000 + 5_000)
    assert (copies[0].start_ns, len(copies)) == (25_000, 15 * 8)
    assert copies[-1].end_ns == 25_000 + 15 * EXPERT_BYTES > head_start
    assert idle_ns(copies) == 0


def test_a_started_prefetch_goes_on_when_its_chunk_ends_as_the_routing_becomes_known() -> None:
    # Chunk 0 ends exactly with the attention of layer 1, whose experts are all there; chunk 1 may be issued then.
    script = {(0, 0, 1): [NUM_EXPERTS + 9]}
    policy = compose(predictor=Scripted(script))
    half_ns = 100 + 10
    job = run(
        decode([[[0], [1], [2]]], NUM_EXPERTS),
        num_experts=NUM_EXPERTS,
        num_slots=40,
        policy=policy,
        initial=(0, NUM_EXPERTS + 1, 2 * NUM_EXPERTS + 2),
        chunk_bytes=(half_ns, half_ns),
        channel_depth=1,
    )
    assert job.timeline.copies == [
        Copy(NUM_EXPERTS + 9, 0, 100, 100 + half_ns),
        Copy(NUM_EXPERTS + 9, 1, 100 + half_ns, 100 + 2 * half_ns),
    ]


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6])
def test_the_channel_must_hold_as_much_as_the_host_takes_to_read_the_routing_back(depth: int) -> None:
    sync_ns, chunk_ns = 4_000, EXPERT_BYTES // 8
    job = prefetched(8, channel_depth=depth, costs=HostCosts(gate_sync_ns=sync_ns))
    # A chunk ends exactly with the attention of layer 1; nothing is issued before its routing is known.
    assert idle_ns(job.timeline.copies) == max(0, sync_ns - (depth - 1) * chunk_ns)
