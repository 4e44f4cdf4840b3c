"""Does each part of a policy do what its docstring says? Parts alone, on a view made by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest

from expertflow.evictions.belady import Belady
from expertflow.evictions.keep_nothing import KeepNothing
from expertflow.evictions.lfu import LFU
from expertflow.evictions.lru import LRU
from expertflow.evictions.two_level_lru import TwoLevelLRU
from expertflow.forward import Forward, KnownForward
from expertflow.future import NEVER, Future
from expertflow.horizons.adaptive import AdaptiveHorizon
from expertflow.horizons.fixed import FixedHorizon
from expertflow.orders.index import IndexOrder
from expertflow.parts import (
    DEMAND,
    PREFETCH,
    Eviction,
    Horizon,
    Order,
    Part,
    Place,
    Prediction,
    Predictor,
    Selection,
)
from expertflow.policy import Policy
from expertflow.predictors.none import NoPredictor
from expertflow.predictors.ranking import rank_scores
from expertflow.predictors.transition import BLOCK, TransitionPredictor
from expertflow.selections.mass import Mass
from expertflow.selections.threshold import Threshold
from expertflow.selections.top_k import TopK
from expertflow.slots import Slots, split_by_layer
from expertflow.transitions import TransitionCounts
from expertflow.units import SCORE_ONE
from expertflow.view import ABSENT, LOADING, RESIDENT, Feedback
from tests.support.runs import Kernels, Scripted, TakeAll, compose, decode, forward_of, run
from tests.support.workloads import progress_of, view_of


class World:
    """A view whose facts the test sets; `touch` and `admit` keep residency and the eviction in step."""

    def __init__(
        self,
        num_layers: int = 4,
        num_experts: int = 10,
        num_slots: int = 8,
        top_k: int = 2,
        by_layer: bool = False,
        expert_bytes: int = 40,
    ) -> None:
        self.state = bytearray(num_layers * num_experts)
        slots = split_by_layer(num_slots, num_layers) if by_layer else []
        self.view = view_of(
            num_layers,
            num_experts,
            top_k,
            state=self.state,
            expert_bytes=expert_bytes,
            num_slots=num_slots,
            slots_by_layer=slots,
        )
        progress_of(self.view).forward = 0

    def start(self, part: Any, future: Future | None = None) -> Any:
        """Bind `part` to this world."""
        part.start(self.view, future)
        return part

    def admit(self, eviction: Eviction, *keys: int, cause: int = DEMAND) -> None:
        """`keys` take a slot and land."""
        for key in keys:
            self.state[key] = RESIDENT
            eviction.admitted(key, cause)

    def demand(self, eviction: Eviction, layer: int, *keys: int) -> None:
        """A whole layer: touched, loaded where absent, run, ended."""
        progress_of(self.view).layer = layer
        progress_of(self.view).event += 1
        progress_of(self.view).pinned = keys
        eviction.touched(keys)
        self.admit(eviction, *(key for key in keys if not self.state[key]))
        progress_of(self.view).pinned = ()
        eviction.layer_end(layer, keys)

    def evict(self, eviction: Eviction, key: int, cause: int = DEMAND) -> int | None:
        """The victim for `key`, evicted."""
        victim = eviction.victim(key, cause)
        if victim is not None:
            self.state[victim] = ABSENT
            eviction.evicted(victim, False)
        return victim

    def drain(self, eviction: Eviction, key: int = 0) -> list[int]:
        """All victims, first to leave first."""
        victims = []
        while (victim := self.evict(eviction, key)) is not None:
            victims.append(victim)
        return victims


# -- the contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Part, Predictor, Horizon, Selection, Eviction, Order, Place])
def test_a_misspelt_hook_is_refused_when_the_class_is_made(base: type[Part]) -> None:
    with pytest.raises(TypeError, match=r"Late\.evictd is not in the contract of .*evicted"):
        type("Late", (base,), {"evictd": lambda self, key, unused: None})


def test_a_hook_of_another_kind_of_part_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.victim is not in the contract of Horizon"):
        type("Wrong", (Horizon,), {"victim": lambda self, key, cause: None})


def test_helpers_with_an_underscore_data_and_inherited_hooks_are_allowed() -> None:
    names = {"_helper": lambda self: None, "limit": 3, "victim": LRU.victim, "evicted": LRU.evicted}
    assert issubclass(type("Fine", (LRU,), names), Eviction)


def test_a_part_that_needs_the_future_refuses_a_policy_without_one() -> None:
    with pytest.raises(ValueError, match="Belady needs the future of the trace"):
        compose(eviction=Belady())


def test_a_policy_says_whether_it_reads_ahead() -> None:
    future = Future(decode([[[1]]], 10), 10)
    assert compose(eviction=Belady(), future=future).uses_future is True
    assert compose(eviction=LRU(), future=future).uses_future is False


# -- slots ---------------------------------------------------------------------------------------------------


def test_the_first_layers_get_one_slot_more() -> None:
    assert split_by_layer(11, 4) == [3, 3, 3, 2]


@pytest.mark.parametrize(("num_slots", "message"), [(0, "no expert fits"), (3, "cannot be split over 4 layers")])
def test_too_few_slots_are_refused(num_slots: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Slots(4, 10, num_slots, "layer", 0)


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="scope='model' is unknown; choose global or layer"):
        Slots(4, 10, 8, "model", 0)


def test_filling_keeps_the_best_that_fit_and_leaves_staging_free() -> None:
    slots = Slots(2, 10, 3, "layer", 2)
    assert slots.fill([1, 2, 3, 11, 12, 1]) == [1, 2, 11]
    assert [len(free) for free in slots.free] == [2, 2]


# -- evictions -----------------------------------------------------------------------------------------------


def test_lru_gives_up_the_least_recently_demanded() -> None:
    world = World()
    lru = world.start(LRU())
    world.demand(lru, 0, 1, 2)
    world.demand(lru, 1, 11, 12)
    world.demand(lru, 0, 1)
    assert world.drain(lru) == [2, 11, 12, 1]


def test_lru_of_one_layer_knows_no_other() -> None:
    world = World(by_layer=True)
    lru = world.start(LRU(scope="layer"))
    world.demand(lru, 0, 1, 2)
    world.demand(lru, 1, 11)
    assert world.drain(lru, key=15) == [11]
    assert world.drain(lru, key=5) == [1, 2]


@pytest.mark.parametrize("eviction", [LRU, LFU, TwoLevelLRU, KeepNothing])
def test_no_eviction_gives_up_what_is_pinned_or_still_loading(eviction: type[Eviction]) -> None:
    world = World()
    part = world.start(eviction())
    world.demand(part, 0, 1, 2, 3)
    world.state[1] = LOADING
    progress_of(world.view).pinned = (2,)
    assert world.evict(part, 9) == 3
    assert world.evict(part, 9) is None


def test_lfu_counts_outlive_eviction_and_ties_leave_the_least_recent() -> None:
    world = World()
    lfu = world.start(LFU())
    for _ in range(3):
        world.demand(lfu, 0, 1)
    world.demand(lfu, 0, 2, 3)
    assert world.evict(lfu, 9) == 2
    assert world.drain(lfu) == [3, 1]
    world.demand(lfu, 0, 1)
    world.demand(lfu, 0, 4)
    assert world.drain(lfu) == [4, 1]


def test_belady_gives_up_the_farthest_next_use() -> None:
    forwards = decode([[[1, 2, 3]], [[3]], [[1]]], 10)
    world = World(num_layers=1)
    belady = world.start(Belady(), Future(forwards, 10))
    world.demand(belady, 0, 1, 2, 3)
    assert belady.next_use[1:4] == [2, NEVER, 1]
    assert world.drain(belady) == [2, 1, 3]


@pytest.mark.parametrize(("do_no_harm", "victim"), [(True, None), (False, 1)])
def test_a_prefetch_never_displaces_what_is_needed_sooner(do_no_harm: bool, victim: int | None) -> None:
    forwards = decode([[[1, 5]], [[1]], [[5]]], 10)
    world = World(num_layers=1)
    belady = world.start(Belady(do_no_harm=do_no_harm), Future(forwards, 10))
    world.demand(belady, 0, 1, 5)
    world.state[5] = ABSENT
    belady.evicted(5, False)
    assert belady.victim(5, PREFETCH) == victim
    assert belady.victim(5, DEMAND) == 1


def test_ranked_evictions_keep_a_heap_of_bounded_size() -> None:
    world = World(num_layers=1, num_slots=10)
    lfu = world.start(LFU())
    for step in range(5000):
        world.demand(lfu, 0, step % 10)
    assert len(lfu.heaps[0]) <= 8 * 10 + 64 + 1
    assert world.drain(lfu) == list(range(10))


def test_keep_nothing_releases_what_is_resident_of_its_layer() -> None:
    world = World()
    part = world.start(KeepNothing())
    world.demand(part, 0, 1, 2)
    world.state[2] = LOADING
    assert list(part.release(0, [1, 2, 3])) == [1]
    assert list(world.start(LRU()).release(0, [1])) == []


# -- two-level LRU -------------------------------------------------------------------------------------------


def two_level(world: World, **settings: Any) -> TwoLevelLRU:
    """Started on `world`."""
    return cast(TwoLevelLRU, world.start(TwoLevelLRU(**settings)))


def test_what_has_run_leaves_before_what_was_loaded_ahead() -> None:
    world = World()
    part = two_level(world)
    world.admit(part, 21, cause=PREFETCH)
    world.demand(part, 0, 1, 2)
    assert (list(part.low[0]), list(part.high[0])) == ([1, 2], [21])
    assert world.drain(part) == [1, 2, 21]


@pytest.mark.parametrize(("apart", "level"), [(15, "high"), (16, "low")])
def test_a_second_use_within_the_frequent_forwards_stays_high(apart: int, level: str) -> None:
    world = World()
    part = two_level(world, frequent_forwards=16)
    world.demand(part, 0, 1)
    progress_of(world.view).forward = apart
    world.demand(part, 0, 1)
    assert 1 in getattr(part, level)[0]
    assert len(part.low[0]) + len(part.high[0]) == 1


def test_no_use_is_frequent_at_zero_forwards() -> None:
    world = World()
    part = two_level(world, frequent_forwards=0)
    for progress_of(world.view).forward in range(3):
        world.demand(part, 0, 1)
    assert (list(part.low[0]), list(part.high[0])) == ([1], [])


def test_the_predicted_rise_to_the_high_level() -> None:
    world = World()
    part = two_level(world)
    world.demand(part, 0, 1, 2, 3)
    part.predicted([2, 7], 0, ([2, 7], [1, 1]))
    assert (list(part.low[0]), list(part.high[0])) == ([1, 3], [2])


def test_the_high_level_overflows_its_oldest_into_the_low_level() -> None:
    world = World(num_slots=8)
    part = two_level(world, high_share=0.5)
    world.admit(part, 21, 22, 23, 24)
    assert (list(part.low[0]), list(part.high[0])) == ([], [21, 22, 23, 24])
    world.admit(part, 25)
    assert (list(part.low[0]), list(part.high[0])) == ([21], [22, 23, 24, 25])


def test_a_prefetch_unused_when_its_layer_ends_is_the_first_victim() -> None:
    world = World()
    part = two_level(world)
    world.demand(part, 0, 1)
    world.admit(part, 12, 13, cause=PREFETCH)
    world.demand(part, 1, 12)
    assert world.drain(part) == [13, 1, 12]


def test_a_resident_that_was_predicted_in_vain_keeps_its_place() -> None:
    world = World()
    part = two_level(world)
    world.demand(part, 1, 13)
    part.predicted([13], 1, ([13], [1]))
    world.demand(part, 1, 12)
    assert world.drain(part) == [12, 13]


def test_the_two_levels_are_split_by_layer_where_the_cache_is() -> None:
    world = World(num_slots=8, by_layer=True)
    part = two_level(world, scope="layer", high_share=1.0)
    world.admit(part, 1, 2, 3, 11)
    assert part.limits == [2, 2, 2, 2]
    assert (list(part.low[0]), list(part.high[0]), list(part.high[1])) == ([1], [2, 3], [11])
    assert world.drain(part, key=19) == [11]


@pytest.mark.parametrize("settings", [{"high_share": 0.0}, {"high_share": 1.1}, {"frequent_forwards": -1}])
def test_two_level_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"TwoLevelLRU {next(iter(settings))}="):
        TwoLevelLRU(**settings)


# -- horizons ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"depth": 1, "distances": [1]}, {"depth": 0}, {"distances": []}, {"distances": [0, 2]}]
)
def test_a_fixed_horizon_takes_a_depth_or_distances_of_at_least_one(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="FixedHorizon"):
        FixedHorizon(**settings)


def test_a_fixed_horizon_is_a_depth_or_a_set() -> None:
    assert FixedHorizon(depth=3).distances() == [1, 2, 3]
    assert FixedHorizon(distances=[4, 2, 2]).distances() == [2, 4]


def test_a_fixed_horizon_beyond_the_model_is_refused() -> None:
    world = World(num_layers=4)
    world.start(FixedHorizon(depth=3))
    with pytest.raises(ValueError, match="looks 4 layers ahead, but the model has 4 MoE layers: at most 3"):
        world.start(FixedHorizon(depth=4))


BEGIN = forward_of(0, [[[0]]], 10)


class Steps:
    """An adaptive horizon over a view with 8-fold room, and what happens to it."""

    def __init__(self, num_layers: int = 27, expert_bytes: int = 40, **settings: Any) -> None:
        self.world = World(num_layers=num_layers, expert_bytes=expert_bytes)
        self.view = self.world.view
        self.horizon = cast(AdaptiveHorizon, self.world.start(AdaptiveHorizon(**settings)))

    def observe(self, num_bytes: int, busy_ns: int, layer_ns: int, layers: int = 1) -> None:
        """What the machine has shown since the last forward."""
        progress_of(self.view).link_bytes += num_bytes
        progress_of(self.view).link_busy_ns += busy_ns
        progress_of(self.view).layer_time_ns += layer_ns
        progress_of(self.view).num_layers_timed += layers

    def begin(self, forward: int) -> int:
        """The size after the begin of a forward."""
        progress_of(self.view).forward = forward
        self.horizon.begin_forward(BEGIN)
        return self.size

    def stall(self, times: int = 1, late: int = 1, misses: int = 0) -> int:
        """The size after so many stalled layers."""
        for _ in range(times):
            self.horizon.feedback(Feedback(0, 5, late, misses))
        return self.size

    def waste(self, times: int = 1) -> int:
        """The size after so many prefetches evicted unused."""
        for _ in range(times):
            self.horizon.evicted(3, True)
        return self.size

    @property
    def size(self) -> int:
        """S."""
        assert list(self.horizon.distances()) == list(range(1, self.horizon.size + 1))
        return self.horizon.size


def test_the_step_size_of_deepseek_v2_lite_is_two() -> None:
    steps = Steps(expert_bytes=17_300_000)
    steps.horizon.num_expected = 6
    steps.observe(64_000, 1_000, 1_000_000)  # 64 GB/s, layers of 1 ms
    assert pytest.approx(1.62, abs=0.01) == 6 * 17.3e6 / (64e9 * 1e-3)
    assert steps.begin(0) == 2


@pytest.mark.parametrize(("layer_ns", "size"), [(101, 1), (100, 1), (99, 2), (50, 2), (49, 3), (1, 8), (10_000, 1)])
def test_the_formula_rounds_up_and_stays_within_its_limits(layer_ns: int, size: int) -> None:
    steps = Steps(expert_bytes=50)
    steps.horizon.num_expected = 2
    steps.observe(1_000, 1_000, layer_ns)  # 1 byte/ns, so S = 100 / T_l
    assert steps.begin(0) == size


def test_the_formula_takes_top_k_until_a_selection_was_seen() -> None:
    steps = Steps(expert_bytes=100)
    steps.observe(1_000, 1_000, 100)
    assert steps.begin(0) == steps.view.top_k == 2


def test_bandwidth_and_layer_time_are_exponential_means_of_what_was_new() -> None:
    steps = Steps(memory=0.9)
    steps.observe(2_000, 1_000, 300, layers=3)
    steps.begin(0)
    steps.observe(1_000, 1_000, 200, layers=1)
    steps.begin(1)
    assert steps.horizon.formula.pace.bytes_per_ns == pytest.approx(0.9 * 2 + 0.1 * 1, rel=1e-12)
    assert steps.horizon.formula.pace.layer_ns == pytest.approx(0.9 * 100 + 0.1 * 200, rel=1e-12)
    steps.begin(2)  # nothing new: nothing changes
    assert steps.horizon.formula.pace.layer_ns == pytest.approx(110, rel=1e-12)


@pytest.mark.parametrize(("moved", "size"), [(3, 3), (4, 4), (5, 5)])
def test_feedback_owns_the_step_until_the_formula_moves_by_two(moved: int, size: int) -> None:
    steps = Steps(memory=0.0, expert_bytes=50)
    steps.horizon.num_expected = 2
    steps.observe(1_000, 1_000, 50)
    assert steps.begin(0) == 2
    assert steps.stall(3) == 3
    steps.observe(1_000, 1_000, -(-100 // moved))
    assert steps.begin(1) == size


def test_the_third_stall_lengthens_the_step_and_the_eighth_waste_shortens_it() -> None:
    steps = Steps()
    steps.begin(0)
    assert steps.stall(2) == 1
    assert steps.stall(1) == 2
    progress_of(steps.view).forward = 10
    assert steps.waste(7) == 2
    assert steps.waste(1) == 1


@pytest.mark.parametrize(("num_forwards", "size"), [(1, 2), (2, 3)])
def test_a_change_is_followed_by_one_forward_without_another(num_forwards: int, size: int) -> None:
    steps = Steps(stall_threshold=3)
    steps.begin(0)
    assert steps.stall(3) == 2
    assert steps.stall(30) == 2
    steps.begin(num_forwards)
    assert steps.stall(30 if num_forwards == 1 else 3) == size


def test_counters_halve_at_every_forward() -> None:
    steps = Steps(stall_threshold=3)
    steps.begin(0)
    steps.stall(2)
    steps.begin(1)
    assert steps.horizon.signs.num_stalls == 1.0
    assert steps.stall(1) == 1
    assert steps.stall(1) == 2


def test_a_change_resets_both_counters() -> None:
    steps = Steps()
    steps.begin(0)
    steps.waste(7)
    assert steps.stall(3) == 2
    assert (steps.horizon.signs.num_stalls, steps.horizon.signs.num_overfetched) == (0.0, 0.0)


@pytest.mark.parametrize(("count", "size"), [("any", 2), ("late", 1)])
def test_a_wait_for_a_miss_counts_only_where_any_stall_does(count: str, size: int) -> None:
    steps = Steps(count=count)
    steps.begin(0)
    assert steps.stall(3, late=0, misses=1) == size
    assert steps.stall(3) == 2


def test_a_layer_without_stall_counts_nothing() -> None:
    steps = Steps()
    steps.horizon.feedback(Feedback(0, 0, 1, 0))
    assert steps.horizon.signs.num_stalls == 0.0


def test_experts_there_too_early_count_only_while_the_step_is_above_one() -> None:
    steps = Steps(overfetch_threshold=2)
    steps.horizon.overfetched()
    assert steps.horizon.signs.num_overfetched == 0.0
    steps.stall(3)
    progress_of(steps.view).forward = 9
    steps.horizon.overfetched()
    steps.horizon.overfetched()
    assert steps.size == 1


def test_the_step_stays_below_the_number_of_layers_and_is_nothing_for_one_layer() -> None:
    steps = Steps(num_layers=3, stall_threshold=1)
    for forward in range(0, 20, 2):
        progress_of(steps.view).forward = forward
        steps.stall(1)
    assert steps.size == 2
    assert list(Steps(num_layers=1).horizon.distances()) == []


def test_waste_at_the_shortest_step_does_not_forget_the_stalls() -> None:
    steps = Steps()
    steps.begin(5)
    steps.stall(2)
    steps.waste(8)  # S is 1 already: nothing changes
    assert steps.stall(1) == 2


def test_stalls_at_the_longest_step_do_not_forget_the_waste() -> None:
    steps = Steps(max_distance=2)
    steps.begin(0)
    assert steps.stall(3) == 2
    progress_of(steps.view).forward = 5
    steps.waste(7)
    steps.stall(3)  # S is at its limit: nothing changes
    assert steps.waste(1) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"max_distance": 0},
        {"memory": 1.0},
        {"memory": -0.1},
        {"stall_threshold": 0},
        {"overfetch_threshold": 0},
        {"count": "miss"},
    ],
)
def test_adaptive_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="AdaptiveHorizon"):
        AdaptiveHorizon(**settings)


class Ears(FixedHorizon):
    """Keeps what the runtime feeds back."""

    def feedback(self, feedback: Feedback) -> None:
        heard = (feedback.layer, feedback.stall_ns, feedback.num_late, feedback.num_misses)
        self.__dict__.setdefault("heard", []).append(heard)


def test_feedback_tells_of_a_layer_that_stalled_when_the_next_routing_is_known() -> None:
    ears = Ears(depth=1)
    policy = compose(predictor=Scripted({(0, 0, 1): [14]}), horizon=ears)
    forwards = decode([[[3], [4], [5]]] * 2, 10)
    # 14 is queued behind the demand of layer 0: it copies from 260 to 420; the routing of layer 1 is known at 370.
    run(forwards, num_experts=10, num_slots=9, policy=policy, chunk_bytes=(160,), initial=(25,))
    assert ears.heard == [(0, 160, 0, 1), (1, 50, 1, 0)]  # type: ignore[attr-defined]


def test_feedback_on_the_last_layer_comes_with_the_next_forward() -> None:
    ears = Ears(depth=1)
    run(
        decode([[[3], [4]]] * 2, 10),
        num_experts=10,
        num_slots=9,
        initial=(3,),
        policy=compose(predictor=Scripted({}), horizon=ears),
    )
    assert ears.heard == [(1, 40, 0, 1)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("head", [0, 50])
def test_layer_time_holds_neither_stall_nor_head(head: int) -> None:
    job = run(decode([[[3], [4], [5]]] * 2, 10), num_experts=10, num_slots=9, kernels=Kernels(head=head))
    view = job.runtime.view
    # From the first gate of a forward to the last: two layers of one expert and the next attention.
    assert (view.num_layers_timed, view.layer_time_ns) == (2 * 2, 2 * 2 * (10 + 100))


# -- selections ----------------------------------------------------------------------------------------------

SCORES = Prediction([13, 11, 17, 10, 19], [40_000, 30_000, 20_000, 9_000, 1_000])  # 100,000 in all
ONE = forward_of(0, [[[0, 1]] * 4], 10)
THREE = forward_of(0, [[[0, 1]] * 4, [[2, 3]] * 4, [[0, 3]] * 4], 10)


@pytest.mark.parametrize(("mass", "count"), [(0.01, 2), (0.7, 2), (0.71, 3), (0.9, 3), (0.91, 4), (0.99, 4), (1.0, 5)])
def test_mass_takes_experts_until_the_share_is_covered_and_never_fewer_than_top_k(mass: float, count: int) -> None:
    selection = World(top_k=2).start(Mass(mass=mass))
    assert list(selection.select(SCORES, ONE)) == SCORES[0][:count]


def test_mass_stops_at_its_limit_and_at_the_end_of_the_scores() -> None:
    world = World(top_k=2)
    assert list(world.start(Mass(mass=1.0, at_most=3)).select(SCORES, ONE)) == [13, 11, 17]
    assert list(world.start(Mass(mass=0.1)).select(Prediction([13], [5]), ONE)) == [13]
    assert list(world.start(Mass()).select(Prediction([], []), ONE)) == []


@pytest.mark.parametrize(("extra", "count"), [(0, 2), (1, 3), (9, 5)])
def test_top_k_takes_the_best_and_a_margin(extra: int, count: int) -> None:
    selection = World(top_k=2).start(TopK(extra=extra))
    assert list(selection.select(SCORES, ONE)) == SCORES[0][:count]


def test_top_k_of_three_tokens_takes_the_expected_union() -> None:
    keys = list(range(10, 20))
    selection = World(top_k=2).start(TopK())
    assert pytest.approx(4.88) == 10 * (1 - 0.8**3)
    assert list(selection.select(Prediction(keys, [1] * 10), THREE)) == keys[:5]


@pytest.mark.parametrize(
    ("threshold", "count"), [(SCORE_ONE // 2, 1), (32_769, 0), (32_768, 1), (1, 3), (20_000, 2), (20_001, 1)]
)
def test_a_threshold_is_met_by_equality(threshold: int, count: int) -> None:
    scores = Prediction([13, 11, 17], [32_768, 20_000, 1])
    selection = World().start(Threshold(probability=threshold / SCORE_ONE))
    assert list(selection.select(scores, ONE)) == scores[0][:count]


def test_a_threshold_stops_at_its_limit() -> None:
    selection = World().start(Threshold(probability=0.001, at_most=2))
    assert list(selection.select(SCORES, ONE)) == [13, 11]


@pytest.mark.parametrize(
    ("selection", "count"),
    [(TopK(extra=1), 3), (Mass(mass=0.71), 3), (Threshold(probability=0.3), 3), (TakeAll(), 5)],
)
def test_the_policy_counts_what_is_selected_whatever_selects(selection: Selection, count: int) -> None:
    predictor = Told({(0, 0, 1): SCORES, (0, 1, 1): Prediction([20], [60_000])})
    policy = compose(predictor=predictor, selection=selection)
    policy.start(World(top_k=2).view)
    expected = {0: 0.0, 1: (count + 1) / 2, 2: (count + 1) / 2}  # a forward that predicted nothing keeps the last
    for index in range(3):
        forward = forward_of(index, [[[1]] * 4], 10)
        policy.begin_forward(forward)
        assert policy.num_expected == policy.horizon.num_expected == expected[index]
        for layer in range(4):
            policy.routed(layer)
            policy.decide(layer)
        policy.end_forward()


@pytest.mark.parametrize(
    ("selection", "settings"),
    [
        (Mass, {"mass": 0.0}),
        (Mass, {"mass": 1.1}),
        (Mass, {"at_most": -1}),
        (TopK, {"extra": -1}),
        (Threshold, {"probability": 0.0}),
        (Threshold, {"probability": 1.1}),
        (Threshold, {"at_most": -1}),
    ],
)
def test_selection_settings_out_of_range_are_refused(selection: type[Any], settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        selection(**settings)


def test_index_order_sorts_and_is_strict() -> None:
    assert (IndexOrder().arrange([7, 3, 5]), IndexOrder().strict) == ([3, 5, 7], True)


# -- the policy's window -------------------------------------------------------------------------------------


class Told(Predictor):
    """Says what it is told: script[forward, layer, distance]."""

    def __init__(self, script: Mapping[tuple[int, int, int], Prediction]) -> None:
        self.script = script

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        return self.script.get((forward.index, layer, distance))


class Asked(Scripted):
    """Keeps the (forward, layer, distance) it was asked for."""

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        self.__dict__.setdefault("calls", []).append((forward.index, layer, distance))
        return super().predict(forward, layer, distance)


def calls_of(predictor: Asked, depth: int) -> list[tuple[int, int, int]]:
    """What is asked over one forward of three layers."""
    policy = compose(predictor=predictor, horizon=FixedHorizon(depth=depth))
    run(decode([[[1], [1], [1]]], 10), num_experts=10, num_slots=30, policy=policy)
    return predictor.calls  # type: ignore[attr-defined,no-any-return]


def test_only_distances_not_predicted_before_are_predicted() -> None:
    script = {(0, layer, distance): [(layer + distance) % 3 * 10] for layer in range(3) for distance in (1, 2)}
    assert calls_of(Asked(script), 2) == [(0, 0, 1), (0, 0, 2), (0, 1, 2), (0, 2, 2)]


def test_where_there_was_no_idea_the_predictor_is_asked_again_nearer_by() -> None:
    script = {(0, 0, 1): [10], (0, 1, 2): [0]}
    assert calls_of(Asked(script), 2) == [(0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2), (0, 2, 2)]


def test_a_refreshing_predictor_is_asked_for_every_distance() -> None:
    predictor = Asked({})
    predictor.refreshes = True
    assert calls_of(predictor, 2) == [(0, layer, distance) for layer in range(3) for distance in (1, 2)]


def test_wants_come_near_layers_first_without_what_is_there() -> None:
    world = World(num_layers=4)
    script = {(0, 0, 1): [12, 11, 13], (0, 0, 2): [25, 21]}
    policy = Policy(Scripted(script), FixedHorizon(depth=2), TakeAll(), LRU(), IndexOrder())
    policy.start(world.view)
    world.state[11], world.state[25] = LOADING, RESIDENT
    progress_of(world.view).event = 0
    policy.begin_forward(ONE)
    assert policy.decide(0) == [12, 13, 21]
    world.state[12] = RESIDENT
    progress_of(world.view).event = 1
    assert policy.decide(1) == [21]


# -- ranking and counts --------------------------------------------------------------------------------------


def test_scores_are_ranked_best_first_and_ties_by_expert() -> None:
    keys, scores = rank_scores(np.array([[5, 9, 5, 0, 9]], np.int64), 20, 4)
    assert (keys.tolist(), scores.tolist()) == ([[21, 24, 20, 22]], [[9, 9, 5, 5]])


@pytest.mark.parametrize("num_experts", [1, 2, 8, 9, 256, 512, 8191, 8193, 20_000])
def test_ranking_is_exact_at_the_largest_score_whatever_the_number_of_experts(num_experts: int) -> None:
    scores = np.zeros(num_experts, np.int64)
    scores[-1] = SCORE_ONE
    keys, values = rank_scores(scores, 0, min(num_experts, 3))
    assert (keys[0], values[0]) == (num_experts - 1, SCORE_ONE)
    assert keys[1:].tolist() == list(range(min(num_experts, 3) - 1))


def test_a_forward_of_many_tokens_teaches_its_shares() -> None:
    counts = TransitionCounts(2, 3, 1)
    first, second = np.zeros((2, 3)), np.zeros((2, 3))
    first[0, 1] = first[1, 2] = 1
    second[0] = [4, 0, 0]
    second[1] = [1, 3, 0]
    counts.learn([(first, 1), (second, 4)])
    assert counts.num_forwards == 1
    assert counts.frequency.tolist() == [[1, 0, 0], [0.25, 0.75, 0]]
    assert counts.persistence[0].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert counts.cross[0, 0].tolist() == [[0.25, 0.75, 0], [0, 0, 0], [0, 0, 0]]
    assert counts.cross[0, 1].tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]  # past the last layer: forward to forward


# -- transition predictor ------------------------------------------------------------------------------------

SIZE = {"num_layers": 3, "num_experts": 6, "num_slots": 9, "top_k": 2}


def random_forwards(num: int, rows: Sequence[int] = (1,), seed: int = 0) -> list[Forward]:
    """Forwards of three layers, two of six experts; `rows` tokens in turn, one per entry."""
    rng = random.Random(seed)
    sizes = [rows[index % len(rows)] for index in range(num)]
    return [
        forward_of(index, [[rng.sample(range(6), 2) for _ in range(3)] for _ in range(size)], 6)
        for index, size in enumerate(sizes)
    ]


def predictions(forwards: list[Forward], block: int, **settings: Any) -> list[Any]:
    """Every answer of a transition predictor, `block` forwards prepared at a time (0 = one by one)."""
    predictor = TransitionPredictor(**settings)
    predictor.start(World(**SIZE).view, None)
    answers = []
    for index, forward in enumerate(forwards):
        if block and index % block == 0:
            predictor.announced().prepare(forwards[index : index + block])
        predictor.begin_forward(forward)
        for layer in range(3):
            for distance in (1, 2, 3):
                scores = predictor.predict(forward, layer, distance)
                answers.append(None if scores is None else (list(scores[0]), list(scores[1])))
        predictor.end_forward(forward)
    return answers


@pytest.mark.parametrize("block", [1, 7, BLOCK, 3 * BLOCK])
def test_a_prepared_block_answers_as_one_by_one(block: int) -> None:
    forwards = random_forwards(3 * BLOCK)
    assert predictions(forwards, block) == predictions(forwards, 0)


@pytest.mark.parametrize("block", [5, 50])
@pytest.mark.parametrize("rows", [(3, 1, 1, 1, 1), (1, 1, 1, 1, 4), (2,), (1, 2)])
def test_blocks_next_to_forwards_of_several_tokens_answer_as_one_by_one(block: int, rows: tuple[int, ...]) -> None:
    forwards = random_forwards(2 * BLOCK + 20, rows)
    assert predictions(forwards, block) == predictions(forwards, 0)


def test_a_block_after_a_forward_of_several_tokens_answers_as_one_by_one() -> None:
    several, single = random_forwards(1, (4,)), random_forwards(100)[1:]
    forwards = several + single
    whole = TransitionPredictor()
    whole.start(World(**SIZE).view, None)
    whole.begin_forward(forwards[0])
    whole.end_forward(forwards[0])
    whole.announced().prepare(forwards[1:])
    answers = []
    for forward in forwards[1:]:
        whole.begin_forward(forward)
        answers += [whole.predict(forward, layer, distance) for layer in range(3) for distance in (1, 2)]
        whole.end_forward(forward)
    alone = [answer for answer in predictions(forwards, 0, max_distance=2) if answer is not None]
    assert [(list(keys), list(scores)) for keys, scores, _ in cast(list[Prediction], answers)] == alone[6:]


def test_a_forward_with_a_padded_row_is_answered_without_its_block() -> None:
    forwards = random_forwards(20)
    forwards[3].demands[1] = forwards[3].demands[1][:1]
    assert predictions(forwards, 5) == predictions(forwards, 0)


def test_distances_beyond_the_fitted_ones_have_no_answer() -> None:
    answers = predictions(random_forwards(1), 0, max_distance=1)
    assert [answer is None for answer in answers] == [False, True, True] * 3


def test_predictions_name_distinct_keys_of_the_target_layer_best_first() -> None:
    for place, answer in enumerate(predictions(random_forwards(BLOCK + 5), 0)):
        layer, distance = place % 9 // 3, place % 3 + 1
        if distance == 3:
            assert answer is None
            continue
        keys, scores = answer
        assert {key // 6 for key in keys} == {(layer + distance) % 3}
        assert len(set(keys)) == len(keys) == 6
        assert scores == sorted(scores, reverse=True)
        assert 0 <= scores[-1] <= scores[0] <= SCORE_ONE


def test_a_routing_that_repeats_is_learned() -> None:
    forwards = [forward_of(i, [[[0, 1], [2, 3], [4, 5]]], 6) for i in range(BLOCK + 1)]
    last = predictions(forwards, 0)[-9:]
    assert [set(answer[0][:2]) for answer in (last[0], last[3], last[6])] == [{8, 9}, {16, 17}, {0, 1}]


def transition_start() -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Fitted counts of the size under test, all zero."""
    return {
        "frequency": np.zeros((3, 6)),
        "cross": np.zeros((2, 3, 6, 6)),
        "persistence": np.zeros((3, 6, 6)),
        "num_forwards": np.zeros(1),
    }


@pytest.mark.parametrize("name", ["frequency", "cross", "persistence", "num_forwards"])
def test_a_warm_start_of_another_shape_is_refused(name: str) -> None:
    for wrong in (transition_start(), transition_start()):
        wrong[name] = np.zeros((2, 2))
        with pytest.raises(ValueError, match=name):
            predictions(random_forwards(1), 0, fitted_start=wrong)
    missing = transition_start()
    del missing[name]
    with pytest.raises(ValueError, match=name):
        predictions(random_forwards(1), 0, fitted_start=missing)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_warm_start_that_holds_no_counts_is_refused(value: float) -> None:
    wrong = transition_start()
    wrong["frequency"][1, 2] = value
    with pytest.raises(ValueError, match="frequency holds values that are no counts"):
        predictions(random_forwards(1), 0, fitted_start=wrong)


def test_an_empty_warm_start_is_no_start() -> None:
    forwards = random_forwards(10)
    assert predictions(forwards, 0, fitted_start=transition_start()) == predictions(forwards, 0)


def test_a_warm_start_knows_before_the_first_forward() -> None:
    teacher = TransitionCounts(3, 6, 2)
    active = np.zeros((3, 6))
    active[0, :2] = active[1, 2:4] = active[2, 4:] = 1
    teacher.learn([(active, 1)] * 50)
    warm = {
        "frequency": teacher.frequency,
        "cross": teacher.cross,
        "persistence": teacher.persistence,
        "num_forwards": np.array([teacher.num_forwards]),
    }
    first = predictions([forward_of(0, [[[0, 1], [2, 3], [4, 5]]], 6)], 0, fitted_start=warm)[0]
    assert set(first[0][:2]) == {8, 9}


@pytest.mark.parametrize("settings", [{"max_distance": 0}, {"smoothing": 0}])
def test_transition_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"TransitionPredictor {next(iter(settings))}="):
        TransitionPredictor(**settings)


def test_no_predictor_asks_for_no_decision() -> None:
    policy = compose()
    assert isinstance(policy.predictor, NoPredictor)
    assert policy.prefetches is False
