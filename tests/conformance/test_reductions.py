"""Does the timed runtime reduce to counts without time? Ideal link, no prefetch, demand that fits the slots.

The counts come from `tests.support.reference`, written from the contract alone, and from the answers in
`tests.conformance`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from expertflow.forward import Forward
from sim.machine.simulated import HostCosts
from tests.conformance import CONTRACT
from tests.support.recordings import SHIPPED, beside, named
from tests.support.reference import Policy, Scope, count_hits, count_hits_fast, per_layer_capacity
from tests.support.runs import (
    ConstantLink,
    Kernels,
    batches,
    decode,
    decode_events,
    events_of,
    run,
    run_counts,
)

MICRO: list[dict[str, Any]] = CONTRACT["micro"]

FORCED: tuple[Policy, ...] = ("lru", "lfu", "belady_forced")
SCOPES: tuple[Scope, ...] = ("global", "layer")
FREE = Kernels(attention=0, expert=0, head=0)
SLOW_HOST = HostCosts(launch_ns=3, launch_latency_ns=5, issue_ns=7, gate_sync_ns=11, token_sync_ns=13)


def reference(
    forwards: list[Forward], num_experts: int, num_slots: int, policy: Policy, scope: Scope, *, fast: bool = False
) -> tuple[int, int, int]:
    """(hits, misses, evictions) by the oracle."""
    num_layers = len(forwards[0].demands)
    count = count_hits_fast if fast else count_hits
    return tuple(
        count(
            events_of(forwards, num_experts),
            num_layers=num_layers,
            num_experts=num_experts,
            capacity=num_slots if scope == "global" else per_layer_capacity(num_slots, num_layers),
            policy=policy,
            scope=scope,
        )
    )


# -- random traces -------------------------------------------------------------------------------------------


@st.composite
def small_traces(draw: st.DrawFn) -> tuple[list[Forward], int, int]:
    """(forwards, experts per layer, slots): batch of 1 or 2, every demand fits the slots of its layer."""
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    top_k, batch = draw(st.integers(1, min(3, num_experts))), draw(st.integers(1, 2))
    row = st.lists(
        st.permutations(range(num_experts)).map(lambda order: order[:top_k]),
        min_size=num_layers,
        max_size=num_layers,
    )
    routings = draw(st.lists(st.lists(row, min_size=batch, max_size=batch), min_size=1, max_size=12))
    widest = min(num_experts, top_k * batch)
    num_slots = draw(st.integers(widest * num_layers, num_experts * num_layers))
    return batches(routings, num_experts), num_experts, num_slots


@pytest.mark.mostly_slow(keep=4)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", FORCED)
@pytest.mark.parametrize(("kernels", "costs"), [(Kernels(), SLOW_HOST), (FREE, HostCosts())])
@given(trace=small_traces())
@settings(deadline=None, max_examples=60)
def test_random_traces_count_as_the_reference(
    trace: tuple[list[Forward], int, int], kernels: Kernels, costs: HostCosts, policy: Policy, scope: Scope
) -> None:
    forwards, num_experts, num_slots = trace
    counts = run_counts(
        forwards,
        num_experts=num_experts,
        num_slots=num_slots,
        eviction=policy,
        scope=scope,
        kernels=kernels,
        costs=costs,
    )
    assert counts == reference(forwards, num_experts, num_slots, policy, scope)


@pytest.mark.parametrize("policy", FORCED)
@given(trace=small_traces(), num_slots=st.integers(1, 15))
@settings(deadline=None, max_examples=60)
def test_a_global_cache_as_small_as_one_demand_counts_as_the_reference(
    trace: tuple[list[Forward], int, int], num_slots: int, policy: Policy
) -> None:
    forwards, num_experts, _ = trace
    num_slots = max(num_slots, *(len(keys) for forward in forwards for keys in forward.demands), 1)
    counts = run_counts(forwards, num_experts=num_experts, num_slots=num_slots, eviction=policy)
    assert counts == reference(forwards, num_experts, num_slots, policy, "global")


@pytest.mark.parametrize("scope", SCOPES)
@given(trace=small_traces(), extra=st.integers(0, 2))
@settings(deadline=None, max_examples=60)
def test_belady_with_staging_hits_as_often_as_min_with_bypass(
    trace: tuple[list[Forward], int, int], extra: int, scope: Scope
) -> None:
    forwards, num_experts, num_slots = trace
    widest = max(len(keys) for forward in forwards for keys in forward.demands)
    counts = run_counts(
        forwards,
        num_experts=num_experts,
        num_slots=num_slots,
        eviction="belady_bypass",
        scope=scope,
        num_staging=widest + extra,
    )
    assert counts[:2] == reference(forwards, num_experts, num_slots, "belady_bypass", scope)[:2]


@given(trace=small_traces())
@settings(deadline=None, max_examples=60)
def test_all_experts_resident_from_the_start_never_stall(trace: tuple[list[Forward], int, int]) -> None:
    forwards, num_experts, _ = trace
    num_keys = len(forwards[0].demands) * num_experts
    job = run(forwards, num_experts=num_experts, num_slots=num_keys, initial=tuple(range(num_keys)))
    c = job.counters
    assert (c.stall_ns, c.overhead_ns, c.num_misses, c.num_hits) == (0, 0, 0, c.num_accesses)
    assert c.elapsed_ns == c.compute_ns


@given(trace=small_traces())
@settings(deadline=None, max_examples=60)
def test_infinite_capacity_gives_compulsory_misses_only(trace: tuple[list[Forward], int, int]) -> None:
    forwards, num_experts, _ = trace
    demanded = [key for forward in forwards for keys in forward.demands for key in keys]
    counts = run_counts(forwards, num_experts=num_experts, num_slots=3 * num_experts, eviction="lru")
    assert counts == (len(demanded) - len(set(demanded)), len(set(demanded)), 0)


# -- known answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", FORCED)
def test_the_toy_of_the_contract(policy: Policy) -> None:
    toy = CONTRACT["toy_of_2608_07911"]
    num_layers, num_experts = toy["num_layers"], toy["num_experts"]
    forwards = decode([[demand] * num_layers for demand in toy["demand_per_step_each_layer"]], num_experts)
    counts = run_counts(
        forwards,
        num_experts=num_experts,
        num_slots=toy["capacity_per_layer"] * num_layers,
        eviction=policy,
        scope="layer",
    )
    assert dict(zip(("hits", "misses", "evictions"), counts, strict=True)) == toy["expect"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", FORCED)
@pytest.mark.parametrize("number", range(3))
def test_the_micro_traces_of_the_contract(number: int, policy: Policy, scope: Scope) -> None:
    micro = MICRO[number]
    forwards = decode_events(micro["events"], micro["num_layers"], micro["num_experts"])
    counts = run_counts(
        forwards, num_experts=micro["num_experts"], num_slots=micro["capacity"], eviction=policy, scope=scope
    )
    assert list(counts) == micro["expect"][policy]


@pytest.mark.parametrize("number", range(3))
def test_bypass_on_the_micro_traces_of_the_contract(number: int) -> None:
    micro = MICRO[number]
    forwards = decode_events(micro["events"], micro["num_layers"], micro["num_experts"])
    hits, _, _ = run_counts(
        forwards,
        num_experts=micro["num_experts"],
        num_slots=micro["capacity"],
        eviction="belady_bypass",
        num_staging=micro["top_k"],
    )
    assert hits == micro["expect"]["belady_bypass_hits"]


@pytest.mark.parametrize("number", range(3))
def test_the_micro_traces_notice_reversed_ties(number: int) -> None:
    micro = MICRO[number]
    backwards = [demand[::-1] for demand in micro["events"]]
    forwards = decode_events(backwards, micro["num_layers"], micro["num_experts"])
    counts = run_counts(forwards, num_experts=micro["num_experts"], num_slots=micro["capacity"], eviction="lru")
    assert list(counts) == micro["wrong"]["lru, ties reversed"] != micro["expect"]["lru"]


# -- a recorded trace ----------------------------------------------------------------------------------------

WHOLE = 1 << 30


@cache
def recorded(path: Path, num_tokens: int) -> list[Forward]:
    """The first tokens of a recording at batch 1."""
    experts: np.ndarray[Any, np.dtype[Any]] = load_file(path)["experts"][:num_tokens]
    return decode(experts.tolist(), 32)


def recorded_cases() -> list[Any]:
    """Every policy, scope and residency on a piece of a recording; every policy once on all of it."""
    short = [(p, s, share, 500) for p in FORCED for s in SCOPES for share in (0.25, 0.5, 0.75)]
    whole = [("lru", "global", 0.5, WHOLE), ("lfu", "layer", 0.5, WHOLE), ("belady_forced", "global", 0.25, WHOLE)]
    shipped = [(SHIPPED, *case) for case in (*short, *whole)]
    larger = [(path, *case) for path in beside("eval") for case in (*short, *whole)]
    return [*shipped, *(pytest.param(*case, marks=pytest.mark.slow) for case in larger)]


@pytest.mark.mostly_slow(keep=4)
@pytest.mark.parametrize(("path", "policy", "scope", "share", "num_tokens"), recorded_cases(), ids=named)
def test_a_recorded_trace_counts_as_the_reference(
    path: Path, policy: Policy, scope: Scope, share: float, num_tokens: int
) -> None:
    forwards, num_slots = recorded(path, num_tokens), int(share * 24 * 32)
    counts = run_counts(forwards, num_experts=32, num_slots=num_slots, eviction=policy, scope=scope, kernels=FREE)
    assert counts == reference(forwards, 32, num_slots, policy, scope, fast=True)


# -- order of the policies -----------------------------------------------------------------------------------


@given(trace=small_traces())
@settings(deadline=None, max_examples=60)
def test_no_policy_misses_less_than_belady(trace: tuple[list[Forward], int, int]) -> None:
    forwards, num_experts, num_slots = trace
    misses = {
        name: run_counts(forwards, num_experts=num_experts, num_slots=num_slots, eviction=name)[1]
        for name in ("belady_forced", "lru", "lfu", "two_level")
    }
    assert misses["belady_forced"] == min(misses.values())


@given(trace=small_traces())
@settings(deadline=None, max_examples=60)
def test_copies_that_take_time_change_no_count_of_a_run_without_prefetch(
    trace: tuple[list[Forward], int, int],
) -> None:
    forwards, num_experts, num_slots = trace
    size = {"num_experts": num_experts, "num_slots": num_slots}
    timed = run_counts(forwards, **size, eviction="lru", link=ConstantLink(3), chunk_bytes=(7, 6))
    assert timed == run_counts(forwards, **size, eviction="lru")
