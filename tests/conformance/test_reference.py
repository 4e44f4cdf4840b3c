"""Is the oracle right? Known answers, cases by hand, exhaustive search, and a cache simulator by others."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tests.conformance import CONTRACT
from tests.support.recordings import named, recordings
from tests.support.reference import (
    POLICIES,
    Counts,
    Event,
    Policy,
    Scope,
    batched_events,
    brute_force_optimum,
    count_hits,
    count_hits_fast,
    count_hits_per_access,
    fewest_misses,
    floor_bound,
    libcachesim_lru,
    min_loads,
    per_layer_capacity,
    single_accesses,
    ties_reversed,
    trace_events,
)

NUM_LAYERS, NUM_EXPERTS = 2, 5  # of the generated streams

MICRO: list[dict[str, Any]] = CONTRACT["micro"]

no_deadline = settings(deadline=None)  # a search takes as long as its instance is hard

experts_of_one_event = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=3, unique=True)
streams = st.lists(st.tuples(st.integers(0, NUM_LAYERS - 1), experts_of_one_event), max_size=30)
short_streams = st.lists(st.tuples(st.integers(0, NUM_LAYERS - 1), experts_of_one_event), max_size=9)


def one_cache(events: list[Event], capacity: int, policy: Policy, fast: bool = False) -> Counts:
    """Counts of one cache over all layers, with as many layers and experts as any test here needs."""
    count = count_hits_fast if fast else count_hits
    return count(events, num_layers=8, num_experts=8, capacity=capacity, policy=policy, scope="global")


def one_layer(*demands: list[int]) -> list[Event]:
    """Events of a model of one layer."""
    return [(0, demand) for demand in demands]


# -- known answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [count_hits, count_hits_fast])
@pytest.mark.parametrize("policy", ["lru", "lfu", "belady_forced"])
def test_toy_of_the_contract(count: Any, policy: Policy) -> None:
    toy = CONTRACT["toy_of_2608_07911"]
    layers, experts, capacity = toy["num_layers"], toy["num_experts"], toy["capacity_per_layer"]
    events = [(layer, demand) for demand in toy["demand_per_step_each_layer"] for layer in range(layers)]
    counts = count(
        events,
        num_layers=layers,
        num_experts=experts,
        capacity=[capacity] * layers,
        policy=policy,
        scope="layer",
    )
    assert counts._asdict() == toy["expect"]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("micro", MICRO)
def test_micro_traces_of_the_contract(micro: dict[str, Any], fast: bool) -> None:
    events, capacity = one_layer(*micro["events"]), micro["capacity"]
    found: dict[str, Any] = {
        name: list(one_cache(events, capacity, name, fast)) for name in ("lru", "lfu", "belady_forced")
    }
    found["belady_bypass_hits"] = one_cache(events, capacity, "belady_bypass", fast).hits
    assert found == micro["expect"]


@pytest.mark.parametrize("micro", MICRO)
def test_near_misses_of_the_contract_are_told_apart(micro: dict[str, Any]) -> None:
    events, capacity = one_layer(*micro["events"]), micro["capacity"]
    accesses = list(single_accesses(events))
    found = {
        "lru, ties reversed": list(one_cache(list(ties_reversed(events)), capacity, "lru")),
        "lru, access by access": list(one_cache(accesses, capacity, "lru")),
        "belady forced, access by access": list(one_cache(accesses, capacity, "belady_forced")),
        "belady bypass hits, access by access": one_cache(accesses, capacity, "belady_bypass").hits,
    }
    assert found == micro["wrong"]


# -- hand-made cases -----------------------------------------------------------------------------------------


def test_hits_are_classified_before_the_event_loads() -> None:
    events = one_layer([0, 1], [2, 0])
    assert one_cache(events, 2, "lru") == Counts(1, 3, 1)
    # Access by access, loading 2 would have evicted 0 first.
    assert one_cache(list(single_accesses(events)), 2, "lru") == Counts(0, 4, 2)


def test_the_later_column_is_the_more_recent() -> None:
    assert one_cache(one_layer([0, 1], [2], [1]), 2, "lru").hits == 1
    assert one_cache(one_layer([1, 0], [2], [1]), 2, "lru").hits == 0


def test_an_lfu_count_outlives_eviction() -> None:
    # 2 evicts 1, which comes back with a count of 2, as many as 0; so 3 evicts 0, the least recently touched.
    assert one_cache(one_layer([0], [0], [1], [2], [1], [3], [1]), 2, "lfu") == Counts(2, 5, 3)


def test_an_lfu_count_is_one_per_event_and_ties_go_to_the_least_recently_touched() -> None:
    assert one_cache(one_layer([0], [1], [2], [1]), 2, "lfu").hits == 1
    assert one_cache(one_layer([0], [1], [2], [0]), 2, "lfu").hits == 0


def test_bypass_passes_by_what_forced_admission_must_keep() -> None:
    events = one_layer([0], [1], [0])
    assert one_cache(events, 1, "belady_forced") == Counts(0, 3, 2)
    assert one_cache(events, 1, "belady_bypass") == Counts(1, 2, 0)


def test_belady_evicts_the_farthest_next_use_outside_the_event() -> None:
    assert one_cache(one_layer([0], [1], [2], [1], [0]), 2, "belady_forced") == Counts(1, 4, 2)


def test_layers_share_a_global_cache_and_not_their_experts() -> None:
    events: list[Event] = [(0, [0]), (1, [0]), (0, [0])]
    arguments: dict[str, Any] = {"num_layers": 2, "num_experts": 1, "policy": "lru"}
    assert count_hits(events, capacity=1, scope="global", **arguments) == Counts(0, 3, 2)
    assert count_hits(events, capacity=[1, 1], scope="layer", **arguments) == Counts(1, 2, 0)


@pytest.mark.parametrize(("slots", "expected"), [(6, [2, 2, 2]), (7, [3, 2, 2]), (8, [3, 3, 2]), (2, [1, 1, 0])])
def test_first_layers_get_the_slots_left_over(slots: int, expected: list[int]) -> None:
    assert per_layer_capacity(slots, 3) == expected


def test_a_batch_touches_each_expert_at_its_last_occurrence() -> None:
    experts = np.array([[[0, 1]], [[2, 0]], [[3, 255]]], dtype=np.uint8)
    assert list(batched_events(experts, [[0, 1], [2]])) == [(0, [1, 2, 0]), (0, [3])]
    assert list(batched_events(experts, [[1, 0]])) == [(0, [2, 0, 1])]
    assert list(trace_events(experts)) == [(0, [0, 1]), (0, [2, 0]), (0, [3])]
    assert list(trace_events(experts, padding=0)) == [(0, [1]), (0, [2]), (0, [3, 255])]


@pytest.mark.parametrize(
    ("event", "capacity", "scope", "complaint"),
    [
        ((0, [0, 0]), 2, "global", "touches an expert twice"),
        ((2, [0]), 2, "global", "outside 2 layers"),
        ((0, [5]), 2, "global", "outside 2 layers"),
        ((0, [0]), 2, "layer", "capacity per layer"),
        ((0, [0]), [2, 2], "global", "a list needs scope 'layer'"),
        ((0, [0]), [2], "layer", "2 entries"),
        ((0, [0]), [1, 0], "layer", "at least 1"),
    ],
)
def test_what_has_no_meaning_is_refused(event: Event, capacity: Any, scope: Scope, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        count_hits([event], num_layers=2, num_experts=5, capacity=capacity, policy="lru", scope=scope)


# -- properties ----------------------------------------------------------------------------------------------


@given(streams, st.integers(1, 10), st.sampled_from(POLICIES), st.booleans())
def test_both_implementations_agree(events: list[Event], slots: int, policy: Policy, split: bool) -> None:
    arguments: dict[str, Any] = {
        "num_layers": NUM_LAYERS,
        "num_experts": NUM_EXPERTS,
        "policy": policy,
        "capacity": per_layer_capacity(slots + 1, NUM_LAYERS) if split else slots,
        "scope": "layer" if split else "global",
    }
    assert count_hits(events, **arguments) == count_hits_fast(events, **arguments)


@no_deadline
@given(short_streams, st.integers(3, 6))
def test_belady_is_the_best_of_all_choices(events: list[Event], capacity: int) -> None:
    forced = fewest_misses(events, capacity=capacity, bypass=False)
    assert one_cache(events, capacity, "belady_forced").misses == forced
    assert one_cache(events, capacity, "belady_bypass").misses == min_loads(events, capacity)


@no_deadline
@given(short_streams, st.integers(1, 6))
def test_bypass_makes_the_fewest_loads_on_every_prefix(events: list[Event], slots: int) -> None:
    for length in range(len(events) + 1):
        prefix = events[:length]
        assert min_loads(prefix, slots) == fewest_misses(prefix, capacity=slots, bypass=True)


@given(streams, st.integers(3, 10))
def test_belady_hits_most(events: list[Event], capacity: int) -> None:
    hits = {policy: one_cache(events, capacity, policy).hits for policy in POLICIES}
    assert max(hits["lru"], hits["lfu"]) <= hits["belady_forced"] <= hits["belady_bypass"]


@given(streams, st.integers(1, 10))
def test_more_capacity_never_hurts_lru(events: list[Event], capacity: int) -> None:
    accesses = [layer * NUM_EXPERTS + expert for layer, experts in events for expert in experts]
    assert count_hits_per_access(accesses, capacity).hits <= count_hits_per_access(accesses, capacity + 1).hits
    assert one_cache(events, capacity, "lru").hits <= one_cache(events, capacity + 1, "lru").hits


@given(streams, st.sampled_from(POLICIES))
def test_room_for_all_leaves_compulsory_misses(events: list[Event], policy: Policy) -> None:
    accesses = [(layer, expert) for layer, experts in events for expert in experts]
    compulsory = len(set(accesses))
    expected = Counts(len(accesses) - compulsory, compulsory, 0)
    assert one_cache(events, NUM_LAYERS * NUM_EXPERTS, policy) == expected


@given(streams, st.integers(1, 10))
def test_per_access_lru_is_event_lru_on_single_accesses(events: list[Event], capacity: int) -> None:
    accesses = [layer * 8 + expert for layer, experts in events for expert in experts]
    by_event = one_cache(list(single_accesses(events)), capacity, "lru")
    assert count_hits_per_access(accesses, capacity) == by_event


# -- other authors' cache simulator, and a recorded trace ----------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 7, 40, 100])
def test_per_access_lru_agrees_with_libcachesim(capacity: int) -> None:
    pytest.importorskip("libcachesim")
    accesses = np.minimum(np.random.default_rng(0).zipf(1.3, 20_000), 100).tolist()
    counts = count_hits_per_access(accesses, capacity)
    assert counts == libcachesim_lru(accesses, capacity)
    assert counts != libcachesim_lru(accesses, capacity + 1) or capacity == 100


def recorded_events(path: Path, num_tokens: int | None = None) -> list[Event]:
    """Events of the first tokens of a recording: 24 layers of 32 experts, 4 of them chosen."""
    return list(trace_events(load_file(path)["experts"][:num_tokens]))


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("path", recordings("eval"), ids=named)
@pytest.mark.parametrize("num_slots", [192, 384, 576])
def test_per_access_lru_agrees_with_libcachesim_on_a_recorded_trace(path: Path, num_slots: int) -> None:
    pytest.importorskip("libcachesim")
    accesses = [layer * 32 + expert for layer, experts in recorded_events(path) for expert in experts]
    assert count_hits_per_access(accesses, num_slots) == libcachesim_lru(accesses, num_slots)


@pytest.mark.parametrize("path", recordings("eval"), ids=named)
@pytest.mark.parametrize("policy", POLICIES)
def test_both_implementations_agree_on_a_recorded_trace(path: Path, policy: Policy) -> None:
    events = recorded_events(path, num_tokens=60)
    shape: dict[str, Any] = {"num_layers": 24, "num_experts": 32, "policy": policy}
    caches: list[tuple[Any, Scope]] = [(192, "global"), (per_layer_capacity(192, 24), "layer")]
    for capacity, scope in caches:
        slow = count_hits(events, capacity=capacity, scope=scope, **shape)
        assert slow == count_hits_fast(events, capacity=capacity, scope=scope, **shape)
        assert slow.hits + slow.misses == 60 * 24 * 4


# -- the shortest schedule and its floor ---------------------------------------------------------------------

Instance = tuple[list[Event], list[int], list[int], int, int]


def random_instance(seed: int) -> Instance:
    """A timing problem of three to six events, one or two layers and at most four experts a layer."""
    rng = random.Random(seed)
    layers, num_events, experts = rng.randint(1, 2), rng.randint(3, 6), rng.choice([3, 4])
    events = [(event % layers, rng.sample(range(experts), rng.randint(1, 2))) for event in range(num_events)]
    attention = [rng.randint(1, 4) for _ in events]
    kernel = [rng.randint(1, 3) for _ in events]
    if rng.random() < 0.5:  # a decode of equal layers, the usual case
        attention, kernel = attention[:1] * num_events, kernel[:1] * num_events
    return events, attention, kernel, rng.randint(1, 8), rng.randint(1, 3)


def serial_times(instance: Instance) -> list[int]:
    """Compute of each event of an instance."""
    events, attention, kernel, _, _ = instance
    return [start + each * len(demand) for (_, demand), start, each in zip(events, attention, kernel, strict=True)]


@pytest.mark.parametrize(("load", "expected"), [(4, 7), (5, 7), (6, 8)])
def test_a_first_load_hides_behind_the_first_attention(load: int, expected: int) -> None:
    assert brute_force_optimum([(0, [0])], [5], [2], load, slots=1) == expected


@pytest.mark.parametrize(("slots", "expected"), [(1, 10), (2, 8)])
def test_one_slot_loads_only_after_the_kernel_before(slots: int, expected: int) -> None:
    # Load 0 ends at 3, its kernel at 5. Load 1 ends at 8 in the same slot, at 6 in another; kernel 1 2 later.
    assert brute_force_optimum([(0, [0, 1])], [1], [2], 3, slots) == expected


@pytest.mark.parametrize(("slots", "expected"), [(1, 30), (2, 21)])
def test_a_retained_expert_is_not_loaded_again(slots: int, expected: int) -> None:
    # One slot: three times a load of 9 and a kernel of 1. Two: loads end at 9 and 18, then 3 of compute.
    assert brute_force_optimum(one_layer([0], [1], [0]), [1] * 3, [1] * 3, 9, slots) == expected


def test_the_shortest_schedule_may_leave_a_ready_kernel_waiting() -> None:
    # Loads 0 and 1 end at 10 and 20, the second attention at 19. Running 1 first, at 20, frees a slot at 25,
    # so that load 2 ends at 35 and its kernel at 36; running 0 at once, at 19, would make that 40.
    events = one_layer([0], [0, 1], [0, 2])
    assert brute_force_optimum(events, [1, 8, 1], [1, 5, 1], 10, slots=2) == 36


@pytest.mark.mostly_slow(keep=25)
@pytest.mark.parametrize("seed", range(0, 200, 2))
def test_starting_at_every_tick_finds_nothing_shorter(seed: int) -> None:
    instance = random_instance(seed)
    assert brute_force_optimum(*instance) == brute_force_optimum(*instance, every_tick=True)


@pytest.mark.slow
@no_deadline
@given(st.integers(0, 10**6))
def test_with_room_for_all_the_link_runs_ahead_in_order_of_first_use(seed: int) -> None:
    events, attention, kernel, load, _ = random_instance(seed)
    landed: dict[tuple[int, int], int] = {}
    now = 0
    for (layer, experts), start, each in zip(events, attention, kernel, strict=True):
        now += start
        for expert in experts:
            landed.setdefault((layer, expert), (len(landed) + 1) * load)
        for ready in sorted(landed[layer, expert] for expert in experts):
            now = max(now, ready) + each
    assert brute_force_optimum(events, attention, kernel, load, slots=8) == now


@pytest.mark.slow
@no_deadline
@given(st.integers(0, 10**6))
def test_slots_and_a_faster_link_never_hurt_the_shortest_schedule(seed: int) -> None:
    events, attention, kernel, load, slots = random_instance(seed)
    optimum = brute_force_optimum(events, attention, kernel, load, slots)
    assert brute_force_optimum(events, attention, kernel, load, slots + 1) <= optimum
    assert optimum <= brute_force_optimum(events, attention, kernel, load + 1, slots)


@no_deadline
@given(st.integers(0, 10**6))
def test_no_schedule_beats_the_floor(seed: int) -> None:
    instance = random_instance(seed)
    assert sum(serial_times(instance)) <= floor_bound(*instance) <= brute_force_optimum(*instance)


@pytest.mark.slow
def test_the_floor_is_often_reached_and_seldom_far() -> None:
    pairs = [(floor_bound(*each), brute_force_optimum(*each)) for each in map(random_instance, range(300))]
    assert all(floor <= optimum for floor, optimum in pairs)
    assert sum(floor == optimum for floor, optimum in pairs) >= 120
    assert sum(optimum / floor for floor, optimum in pairs) / len(pairs) < 1.2


def test_a_floor_that_counts_compute_before_its_loads_is_no_floor() -> None:
    # The attention of event i, and its kernels but one, can run before the last of the loads has ended.
    events = one_layer([0])
    too_high = min_loads(events, slots=1) * 3 + sum(serial_times((events, [5], [2], 3, 1)))
    assert (floor_bound(events, [5], [2], 3, 1), too_high) == (7, 10)
    assert brute_force_optimum(events, [5], [2], 3, slots=1) == 7


def test_the_floor_of_a_hand_made_instance() -> None:
    # Loads by prefix 1, 2, 2 with two slots: max(9 + 1 + 4, 18 + 1 + 2, 18 + 1) = 21, above the compute of 6.
    assert floor_bound(one_layer([0], [1], [0]), [1] * 3, [1] * 3, 9, slots=2) == 21


@pytest.mark.parametrize("change", [{"attention": [0]}, {"kernel": [1, 1]}, {"load": 0}, {"slots": 0}])
def test_a_timing_problem_without_meaning_is_refused(change: dict[str, Any]) -> None:
    instance: dict[str, Any] = {"events": [(0, [0])], "attention": [1], "kernel": [1], "load": 1, "slots": 1}
    with pytest.raises(ValueError, match=r"at least 1|one kernel time per event"):
        brute_force_optimum(**(instance | change))
