"""A decision at once makes the same integers as asking the three parts, and is taken for those three classes alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from expertflow.evictions.outlook import Outlook
from expertflow.forward import Forward, KnownForward
from expertflow.horizons.fixed import FixedHorizon
from expertflow.orders.resident_first import ResidentFirst
from expertflow.parts import Eviction, Horizon, Prediction, Selection, Step
from expertflow.policy import Policy
from expertflow.predictors.hybrid import HybridPredictor
from expertflow.selections.stall_saved import StallSaved
from expertflow.units import SCORE_ONE
from expertflow.view import ABSENT, LOADING, RESIDENT, View
from tests.policy.hybrid.support import PROMPTS, E, K, L, arrays, forwards
from tests.policy.hybrid.test_predictor import without_numba
from tests.support.workloads import progress_of, view_of

pytest.importorskip("numba")


class InheritedSelection(StallSaved):
    """The same, asked in the ordinary way: it does not say itself that it only compares."""


class InheritedEviction(Outlook):
    """The same."""


class InheritedPredictor(HybridPredictor):
    """The same."""


class Spread(Horizon):
    """Looks as far as it is told, and counts what was fetched too early."""

    def start(self, view: View, future: Any) -> None:
        self.reach: Sequence[int] = (1,)
        self.num_early = 0

    def distances(self) -> Sequence[int]:
        return self.reach

    def overfetched(self) -> None:
        self.num_early += 1


class World:
    """One policy, on a view that the test moves."""

    def __init__(
        self,
        fitted: dict[str, Any],
        selection: Selection | None = None,
        eviction: Eviction | None = None,
        predictor: type[HybridPredictor] = HybridPredictor,
        **settings: Any,
    ) -> None:
        self.state = bytearray(L * E)
        self.view = view_of(L, E, K, state=self.state)
        self.policy = Policy(
            predictor(fitted, **settings), Spread(), selection or StallSaved(), eviction or Outlook(), ResidentFirst()
        )
        self.policy.start(self.view)
        self.num_steps = 0
        step = self.policy._step

        def counted(forward: KnownForward, layer: int, reach: int) -> Step | None:
            assert step is not None
            told = step(forward, layer, reach)
            self.num_steps += told is not None
            return told

        if step is not None:
            self.policy._step = counted

    def reveal(self, num_layers: int) -> None:
        """The routing of the first layers is read."""
        for layer in range(num_layers):
            self.policy.routed(layer)

    def told(self) -> list[Any]:
        """All that a decision leaves behind."""
        policy, eviction = self.policy, self.policy.eviction
        assert isinstance(eviction, Outlook)
        assert isinstance(policy.horizon, Spread)
        arrays = (eviction.chance, eviction.worth, eviction.held, eviction.bar, eviction.soon)
        counts = [policy.num_predicted, policy.total_predicted, policy._num_selected, policy._num_layers_selected]
        return [*counts, policy.horizon.num_early, *(array.tolist() for array in arrays)]


def run(worlds: Sequence[World], some: Sequence[Forward], seed: int, reaches: Sequence[Sequence[int]]) -> list[Any]:
    """Move all worlds alike, comparing all that they say; what the first one wanted."""
    wanted = []
    draw = random.Random(seed)
    for forward in some:
        for world in worlds:
            progress_of(world.view).forward = forward.index
            world.policy.begin_forward(forward)
        for layer in range(L):
            states = bytes(draw.choices([ABSENT, LOADING, RESIDENT], [3, 1, 3], k=L * E))
            limits = [draw.choice([0, 1, 300, 20_000, SCORE_ONE // 2, SCORE_ONE]) for _ in range(L + 1)]
            reach = draw.choice(reaches)
            found = []
            for world in worlds:
                world.state[:] = states
                view, policy, selection = world.view, world.policy, world.policy.selection
                assert isinstance(selection, StallSaved)
                assert isinstance(policy.horizon, Spread)
                progress_of(view).layer = layer
                progress_of(view).event += 1
                selection.limits, selection.least_scores[:] = limits, limits
                policy.horizon.reach = reach
                progress_of(view).pinned = forward.demands[layer]
                world.policy.routed(layer)
                policy.eviction.touched(forward.demands[layer])
                found.append([policy.decide(layer), world.told()])
                progress_of(view).pinned = ()
                policy.eviction.layer_end(layer, forward.demands[layer])
                found[-1].append(world.told())
            assert all(other == found[0] for other in found[1:]), (forward.index, layer)
            wanted.append(found[0][0])
        for world in worlds:
            world.policy.end_forward()
    return wanted


WINDOWS = [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]


@pytest.mark.parametrize("pregate", [False, True])
@pytest.mark.parametrize("keep", [0, 3])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_what_asking_the_parts_gives(seed: int, keep: int, pregate: bool) -> None:
    fitted = arrays(seed, pregate=pregate)
    fused, asked = World(fitted, keep=keep), World(fitted, InheritedSelection(), keep=keep)
    some = forwards(pregate=pregate, seed=seed, prompts=PROMPTS if seed % 2 else (0, 0, 0, 0))
    wanted = run([fused, asked], some, seed, WINDOWS)
    single = sum(forward.num_tokens == 1 for forward in some)
    assert (fused.num_steps, asked.num_steps) == (single * L, 0)
    assert sum(map(bool, wanted)) > len(wanted) / 4


@pytest.mark.parametrize("batch_size", [2, 4])
def test_several_tokens_are_decided_by_asking_and_the_next_single_one_at_once(batch_size: int) -> None:
    fitted = arrays(1)
    fused, asked = World(fitted), World(fitted, InheritedSelection())
    some = forwards(batch_size)
    kinds = {forward.num_tokens > 1 for forward in some}
    run([fused, asked], some, 5, WINDOWS)
    assert kinds == {True, False}
    assert fused.num_steps == sum(forward.num_tokens == 1 for forward in some) * L


@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("prompts", [PROMPTS, (0, 0, 0, 0)])
@pytest.mark.parametrize("pregate", [False, True])
def test_announced_forwards_are_decided_as_one_after_the_other(
    pregate: bool, prompts: tuple[int, ...], block: int
) -> None:
    """The replay, which knows no forward before it runs, decides as the simulator does."""
    fitted, some = arrays(5, pregate=pregate), forwards(seed=2, prompts=prompts, pregate=pregate)
    alone, announced, asked = World(fitted), World(fitted), World(fitted, InheritedSelection())
    worlds = [alone, announced, asked]
    takes = [world.policy.announced() for world in worlds[1:]]
    for first in range(0, len(some), block):
        for one in takes:
            assert one is not None
            one.prepare(some[first : first + block])
        run(worlds, some[first : first + block], first, WINDOWS)
    assert alone.num_steps == announced.num_steps > 0
    predictor = announced.policy.predictor
    assert isinstance(predictor, HybridPredictor)
    assert predictor.block.num_taken == sum(forward.num_tokens == 1 for forward in some)


def test_ties_and_the_edge_of_a_threshold() -> None:
    """Networks whose every expert has one of a few chances, and thresholds that are these chances."""
    for seed in range(4):
        fitted = arrays(seed, out_scale=np.zeros((L, E), np.int32), own=np.zeros((4, 4, L, E), np.int32))
        fitted["bias"] = fitted["bias"] // 1000 * 1000
        fused, asked = World(fitted), World(fitted, InheritedSelection())
        some = forwards(prompts=(0, 0, 0, 0))
        fused.policy.begin_forward(some[0])
        scores = fused.policy.predictor.predict(some[0], 0, 1)
        assert scores is not None
        assert len(set(scores[1])) < E
        for world in (fused, asked):
            selection = world.policy.selection
            assert isinstance(selection, StallSaved)
            selection.limits = [scores[1][E // 2]] * (L + 1)
            selection.least_scores[:] = selection.limits
            world.policy.begin_forward(some[0])
            world.policy.routed(0)
            progress_of(world.view).event = 0
        assert fused.policy.decide(0) == asked.policy.decide(0)
        assert fused.told() == asked.told()
        assert fused.num_steps == 1
        run([World(fitted), World(fitted, InheritedSelection())], some, seed, WINDOWS)


def test_windows_with_gaps_are_decided_by_asking() -> None:
    fitted = arrays(2)
    fused, asked = World(fitted), World(fitted, InheritedSelection())
    run([fused, asked], forwards(prompts=(0, 0, 0, 0)), 7, [(2,), (1, 3), (2, 3)])
    assert fused.num_steps == 0


def test_decisions_that_are_left_out_change_nothing_for_those_that_follow() -> None:
    """Layers that nobody asks about are learned when one is decided; a decision at once may follow one by asking."""
    fitted = arrays(3)
    fused, asked = World(fitted), World(fitted, InheritedSelection())
    some = forwards(prompts=(0, 0, 0, 0))
    for world in (fused, asked):
        for forward in some[:3]:
            world.policy.begin_forward(forward)
            world.reveal(L)
            world.policy.end_forward()
        world.policy.begin_forward(some[3])
        world.reveal(3)
        progress_of(world.view).event = 2
        selection = world.policy.selection
        assert isinstance(selection, StallSaved)
        selection.limits, selection.least_scores[:] = [300] * (L + 1), 300
        world.policy.horizon.reach = (1, 2)  # type: ignore[attr-defined]
    assert fused.policy.decide(2) == asked.policy.decide(2)
    for world in (fused, asked):
        world.policy.routed(3)
    wanted = asked.policy.decide(3)
    assert wanted is not None
    assert fused.policy._ask(3, (1,)) == wanted[:E]
    for world in (fused, asked):
        world.policy.routed(4)
        world.policy.horizon.reach = (1, 2, 3)  # type: ignore[attr-defined]
    assert fused.policy.decide(4) == asked.policy.decide(4)
    assert fused.told()[5:] == asked.told()[5:]


def test_without_numba_the_wants_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, some = arrays(4), forwards(seed=9)
    compiled = World(fitted)
    without_numba(monkeypatch)
    plain = World(fitted)
    assert plain.policy._step is None
    run([compiled, plain], some, 11, WINDOWS)
    assert compiled.num_steps > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": InheritedSelection()},
        {"eviction": InheritedEviction()},
        {"predictor": InheritedPredictor},
        {"refreshes": False},
    ],
)
def test_a_class_that_inherits_is_asked(changes: dict[str, Any]) -> None:
    assert World(arrays()).policy._step is not None
    assert World(arrays(), **changes).policy._step is None


class Best(Selection):
    """A user's own: the best one."""

    def select(self, prediction: Prediction, forward: KnownForward) -> Sequence[int]:
        return prediction.keys[:1]


class Noting(Eviction):
    """A user's own: notes what it hears."""

    def start(self, view: View, future: Any) -> None:
        self.heard: list[tuple[list[int], int]] = []

    def touched(self, keys: Sequence[int]) -> None: ...

    def admitted(self, key: int, cause: int) -> None: ...

    def victim(self, key: int, cause: int) -> int | None:
        return None

    def predicted(self, keys: Sequence[int], layer: int, prediction: Prediction) -> None:
        self.heard.append((list(keys), layer))


def test_a_users_own_selection_and_eviction_are_asked() -> None:
    predictor, eviction = HybridPredictor(arrays()), Noting()
    policy = Policy(predictor, FixedHorizon(2), Best(), eviction, ResidentFirst())
    policy.start(view_of(L, E, K))
    forward = forwards()[0]
    policy.begin_forward(forward)
    progress_of(policy.view).event = 0
    policy.routed(0)
    wants = policy.decide(0)
    assert wants is not None
    scores = [predictor.predict(forward, 0, distance) for distance in (1, 2)]
    assert wants == [found[0][0] for found in scores if found is not None]
    assert eviction.heard == [(wants[:1], 1), (wants[1:], 2)]
