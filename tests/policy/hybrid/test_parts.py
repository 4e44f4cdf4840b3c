"""Who leaves by outlook, and what is wanted by the stall it saves: hand-made states with known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from expertflow.evictions.outlook import Outlook
from expertflow.parts import DEMAND, PREFETCH, Prediction
from expertflow.selections.stall_saved import StallSaved
from expertflow.units import SCORE_ONE
from expertflow.view import ABSENT, RESIDENT
from tests.policy.hybrid.support import forwards
from tests.support.workloads import progress_of, view_of

L, E, K = 3, 4, 1
DEEP = 6


class World:
    """A view whose residency may be written, and an eviction that looks at it."""

    def __init__(self, outlook: list[int] | None, **settings: Any) -> None:
        self.state = bytearray(L * E)
        self.view = view_of(L, E, K, state=self.state)
        self.part = Outlook(**settings)
        self.part.start(self.view, None)
        if outlook is not None:
            self.part.foreseen(np.array(outlook, np.int64))

    def hold(self, *keys: int) -> None:
        """Let these have landed."""
        for key in keys:
            self.part.admitted(key, DEMAND)
            self.state[key] = RESIDENT
            self.part.landed(key)

    def run_layer(self, layer: int, keys: list[int]) -> None:
        """A layer demands keys that are there, and ends."""
        progress_of(self.view).pinned = keys
        self.part.touched(keys)
        progress_of(self.view).pinned = ()
        self.part.layer_end(layer, keys)


WORTH = [100, 90, 80, 70, 60, 50, 40, 30, 20, 10, 5, 1]


def test_the_least_likely_resident_leaves() -> None:
    world = World(WORTH)
    world.hold(2, 7, 4)
    assert world.part.victim(0, DEMAND) == 7
    world.part.evicted(7, False)
    world.state[7] = ABSENT
    assert world.part.victim(0, DEMAND) == 4


def test_what_this_layer_demands_stays_and_so_does_what_is_on_its_way() -> None:
    world = World(WORTH)
    world.hold(1, 8, 9)
    world.part.admitted(11, PREFETCH)
    progress_of(world.view).pinned = [9]
    world.part.touched([9])
    assert world.part.victim(0, DEMAND) == 8


def test_a_new_forecast_counts_at_once() -> None:
    world = World(WORTH)
    world.hold(2, 7)
    assert world.part.victim(0, DEMAND) == 7
    world.part.foreseen(np.array(WORTH[::-1], np.int64))
    assert world.part.victim(0, DEMAND) == 2


def test_chances_of_all_experts_count_where_a_prediction_has_them() -> None:
    world = World(WORTH)
    world.hold(8, 9)
    chances = np.array([0, 50, 0, 0])
    world.part.predicted([8], 2, Prediction([8], [0], chances))
    assert world.part.victim(0, DEMAND) == 8
    chances[:] = 0  # the predictor's to overwrite
    assert world.part.victim(0, DEMAND) == 8


def test_the_window_protects_what_is_predicted_until_its_layer_has_run() -> None:
    world = World(WORTH, used=0.0)
    world.hold(1, 8, 9)
    world.part.predicted([9], 2, Prediction([9, 8], [SCORE_ONE, 30]))
    assert world.part.victim(0, DEMAND) == 8
    world.run_layer(2, [8])
    assert world.part.victim(0, DEMAND) == 9


def test_what_was_just_used_is_worth_at_least_so_much() -> None:
    for used, leaves in ((0.0, 9), (85 / SCORE_ONE, 2)):
        world = World(WORTH, used=used)
        world.hold(0, 2, 9)
        world.run_layer(2, [9])
        assert world.part.victim(0, DEMAND) == leaves


@pytest.mark.parametrize(("chance", "victim"), [(40, None), (41, 6)])
def test_a_prefetch_pushes_out_only_what_is_worth_less(chance: int, victim: int | None) -> None:
    world = World(WORTH)
    world.hold(2, 6)
    world.part.predicted([9], 2, Prediction([9], [chance]))
    assert world.part.victim(9, PREFETCH) == victim
    assert world.part.victim(9, DEMAND) == 6


def test_without_an_outlook_the_least_used_leaves() -> None:
    world = World(None, memory=0.5)
    world.hold(0, 1, 2)
    for keys in ([0], [1], [0], [1], [2], [2]):
        world.run_layer(0, keys)
    assert world.part.victim(3, DEMAND) == 0


def test_more_demand_than_slots_takes_what_has_been_launched() -> None:
    world = World(WORTH)
    world.hold(0, 1)
    progress_of(world.view).pinned = [0, 1, 2]
    world.part.touched([0, 1, 2])
    assert world.part.victim(2, DEMAND) is None
    progress_of(world.view).pinned = [2]
    assert world.part.victim(2, DEMAND) == 1


@pytest.mark.parametrize("settings", [{"used": -0.1}, {"used": 2}, {"margin": -1}, {"memory": 1.0}])
def test_values_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Outlook(**settings)


# -- stall saved ------------------------------------------------------------------------------------------------------


def observed(copy_ns: int, layer_ns: int, busy: float, **settings: Any) -> StallSaved:
    """A selection that has seen 400 like forwards."""
    part = StallSaved(least=0.001, **settings)
    view = view_of(DEEP, E, K)
    part.start(view, None)
    elapsed = 1_000_000
    for _ in range(400):
        progress_of(view).now_ns += elapsed
        progress_of(view).link_busy_ns += int(busy * elapsed)
        progress_of(view).link_bytes += int(busy * elapsed / copy_ns * view.expert_bytes)
        progress_of(view).layer_time_ns += layer_ns * 2
        progress_of(view).num_layers_timed += 2
        part.end_forward(forwards()[0])
    return part


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("queue", [0, 1, 3])
@pytest.mark.parametrize("distance", [1, 2, 4])
@pytest.mark.parametrize(
    ("copy_ns", "layer_ns", "busy", "copy_weight"),
    [(1000, 2000, 0.5, 1.0), (1000, 100, 0.9, 1.0), (1000, 500, 0.7, 0.5), (1000, 40, 1.0, 2.0)],
)
def test_the_threshold_is_where_saving_and_cost_are_equal(
    copy_ns: int, layer_ns: int, busy: float, copy_weight: float, distance: int, queue: int
) -> None:
    part = observed(copy_ns, layer_ns, busy, copy_weight=copy_weight, queue=queue)
    saved, cost = min(layer_ns * distance, copy_ns), copy_weight * busy**queue * copy_ns
    limit = part.limits[distance]
    p = limit / SCORE_ONE
    assert p * saved == pytest.approx((1 - p) * cost, rel=0.01)
    progress_of(part.view).layer = 2
    first = (2 + distance) % DEEP * E
    keys = part.select(Prediction([first + 3, first + 2, first + 1], [limit + 1, limit, limit - 1]), forwards()[0])
    assert list(keys) == [first + 3, first + 2]


def test_an_idle_link_takes_what_is_barely_likely_and_a_full_one_with_no_time_next_to_nothing() -> None:
    assert observed(1000, 2000, 0.01, queue=1).limits[1] < 0.02 * SCORE_ONE
    assert observed(1000, 20, 1.0).limits[1] > 0.97 * SCORE_ONE


def test_more_time_left_asks_for_less_certainty() -> None:
    limits = observed(1000, 100, 0.9).limits
    assert limits[1] > limits[2] > limits[4]


def test_before_anything_is_observed_the_bound_holds() -> None:
    part = StallSaved(most=0.5)
    part.start(view_of(L, E, K), None)
    assert list(part.select(Prediction([E + 1, E + 2], [40_000, 30_000]), forwards()[0])) == [E + 1]
    assert list(part.select(Prediction([], []), forwards()[0])) == []


@pytest.mark.parametrize(
    "settings",
    [{"copy_weight": -1}, {"queue": -1}, {"queue": 0.5}, {"least": 0}, {"least": 0.9, "most": 0.5}, {"memory": 1.0}],
)
def test_selection_values_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        StallSaved(**settings)
