"""The seam between a policy's parts and the rest: what parts see, what they hand on, where their answers come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from expertflow.boundary import CHECKING, PartError, is_own
from expertflow.evictions.lru import LRU
from expertflow.evictions.outlook import Outlook
from expertflow.forward import Forward, KnownForward, Unveiling
from expertflow.horizons.fixed import FixedHorizon
from expertflow.parts import Eviction, Place, Placing, Prediction, Predictor
from expertflow.places.gpu import Gpu
from expertflow.policy import Policy
from expertflow.predictors.none import NoPredictor
from expertflow.predictors.transition import TransitionPredictor
from expertflow.selections.stall_saved import StallSaved
from expertflow.view import View
from sim.job.configure import configure
from sim.job.setup import make_policy, make_workload
from sim.machine.run import run_policy
from sim.machine.simulated import SimMachine
from tests.support.runs import Host, Scripted, TakeAll, compose, decode, forward_of, run
from tests.support.workloads import progress_of, view_of

# -- what parts see --------------------------------------------------------------------------------------------------


def names_of(view: View) -> list[str]:
    """All that a view shows."""
    return [name for name in dir(view) if not name.startswith("_")]


def test_nothing_of_a_view_can_be_set_or_deleted() -> None:
    view = view_of(2, 4, 1)
    names = names_of(view)
    assert len(names) == 18
    for name in [*names, "_progress", "outlook"]:
        with pytest.raises(AttributeError, match=f"view.{name} cannot be set"):
            setattr(view, name, 1)
        with pytest.raises(AttributeError, match="cannot be deleted"):
            delattr(view, name)
    with pytest.raises(TypeError, match="read-only"):
        view.residency[0] = 2


def test_a_view_shows_what_the_runtime_writes() -> None:
    view = view_of(2, 4, 1)
    progress = progress_of(view)
    names = [name for name in dir(progress) if not name.startswith("_")]
    assert len(names) == 11
    for number, name in enumerate(names):
        setattr(progress, name, number)
        assert getattr(view, name) == number


class Recording:
    """What a trace holds: the layer, the first row's embedding, its id."""

    def lookahead(self, rows: Sequence[int], layer: int) -> npt.NDArray[np.float32] | None:
        return np.full((len(rows), 1, 4), layer, np.float32)

    def embedding(self, rows: Sequence[int]) -> npt.NDArray[np.float32] | None:
        return np.array([[row] for row in rows], np.float32)

    def token_ids(self, rows: Sequence[int]) -> npt.NDArray[Any] | None:
        return np.array(rows)


def several() -> Forward:
    """Two tokens, two layers of four experts, with token counts and an order of issue of its own."""
    forward = forward_of(3, [[[0, 1], [2, 3]], [[1, 2], [3, 0]]], 4)
    forward.issue_order[1] = forward.demands[1][::-1]
    forward.recorded = Recording()
    return forward


def test_a_forward_shows_what_is_routed_and_no_more() -> None:
    forward = several()
    unveiling = Unveiling(forward)
    known = unveiling.known
    told = (known.index, known.num_tokens, known.phase, list(known.rows), known.requests, known.kv_lens)
    assert told == (3, 2, "decode", [0, 1], (0, 1), (1, 1))
    for layer in range(2):
        assert (len(known.demands), len(known.issue_order), len(known.counts or ())) == (layer,) * 3
        with pytest.raises(IndexError):
            known.demands[layer]
        unveiling.reveal(layer)
        assert known.counts is not None
        assert forward.counts is not None
        assert list(known.demands[layer]) == forward.demands[layer]
        assert list(known.issue_order[layer]) == forward.issue_order[layer]
        assert dict(known.counts[layer]) == forward.counts[layer]


@pytest.mark.parametrize("name", ["index", "rows", "demands", "counts", "recorded", "new"])
def test_a_forward_cannot_be_changed(name: str) -> None:
    known: Any = Unveiling(several()).known
    with pytest.raises(AttributeError, match=f"forward.{name} cannot be set"):
        setattr(known, name, 1)


def test_what_is_shown_of_a_layer_cannot_be_changed() -> None:
    forward = several()
    unveiling = Unveiling(forward)
    unveiling.reveal(0)
    known: Any = unveiling.known
    for change in (
        lambda: known.demands[0].append(1),
        lambda: known.issue_order[0].clear(),
        lambda: known.counts[0].update({1: 2}),
    ):
        with pytest.raises(AttributeError):
            change()
    with pytest.raises(TypeError):
        known.counts[0][1] = 7


def test_recorded_values_are_of_own_rows_and_known_layers() -> None:
    unveiling = Unveiling(several())
    recorded = unveiling.known.recorded
    assert recorded is not None
    with pytest.raises(ValueError, match="forward 3 was asked for the pre-gate recorded at layer 0"):
        recorded.lookahead(unveiling.known.rows, 0)
    unveiling.reveal(0)
    found = recorded.lookahead([1], 0)
    assert found is not None
    assert found.shape == (1, 1, 4)
    for ask in (lambda rows: recorded.lookahead(rows, 0), recorded.embedding, recorded.token_ids):
        assert ask([0]) is not None
        with pytest.raises(ValueError, match=r"rows \[1, 2\], which are not all its own"):
            ask([1, 2])
    with pytest.raises(ValueError, match="layer -1"):
        recorded.lookahead([0], -1)


class Peeks(Predictor):
    """Reads the routing of the layer that it is asked about."""

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        keys = forward.demands[layer + distance]
        return Prediction(keys, [1] * len(keys))


def test_a_part_that_reads_ahead_finds_nothing() -> None:
    policy = compose(predictor=Peeks(), horizon=FixedHorizon(depth=1))
    with pytest.raises(PartError, match=r"^Peeks.predict raised IndexError: .+ \(forward 0, layer 0\)"):
        run(decode([[[0], [1], [2]]], 4), num_experts=4, num_slots=6, policy=policy)


def test_a_policy_whose_parts_look_at_no_forward_is_shown_none() -> None:
    policy = compose()
    policy.start(view_of(2, 4, 1))
    assert policy.follows is False
    assert compose(predictor=Scripted({})).prefetches is True


# -- what is handed on ----------------------------------------------------------------------------------------------


class Foretells(Scripted):
    """Forecasts the number of the forward, for every expert; nothing before the first has ended."""

    def __init__(self) -> None:
        super().__init__({})
        self.index = -1

    def end_forward(self, forward: KnownForward) -> None:
        self.index = forward.index

    def forecast(self) -> npt.NDArray[np.int64] | None:
        return None if self.index < 0 else np.full(12, self.index, np.int64)


class Hears(LRU):
    """Notes forecasts, and when they come."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def end_forward(self, forward: KnownForward) -> None:
        self.heard.append("end")

    def foreseen(self, forecast: npt.NDArray[np.int64]) -> None:
        self.heard.append(int(forecast[0]))


def test_a_forecast_is_handed_on_when_all_parts_have_heard_of_the_end() -> None:
    eviction = Hears()
    policy = compose(predictor=Foretells(), eviction=eviction)
    run(decode([[[0], [1], [2]]] * 3, 4), num_experts=4, num_slots=6, policy=policy)
    assert eviction.heard == ["end", 0, "end", 1, "end", 2]


class Usual(Foretells):
    """Has a forecast from the start."""

    def start(self, view: View, future: Any) -> None:
        self.index = 7


def test_a_forecast_that_is_there_from_the_start_comes_before_anything_is_admitted() -> None:
    eviction = Hears()
    policy = compose(predictor=Usual(), eviction=eviction)
    policy.start(view_of(3, 4, 1))
    assert eviction.heard == [7]


def test_it_does_not_matter_which_part_starts_first() -> None:
    """Each part started alone, on a view of its own, in any order."""
    for order in ([0, 1, 2], [2, 1, 0]):
        parts = [TransitionPredictor(), StallSaved(), Outlook()]
        for place in order:
            parts[place].start(view_of(3, 4, 1), None)


def test_at_once_is_declared_by_the_very_class() -> None:
    class Derived(StallSaved):
        """Says nothing of its own."""

    class Declared(StallSaved):
        """Says it again."""

        at_once = True

    assert (StallSaved.at_once, Derived.at_once, Declared.at_once) == (True, False, True)


# -- the place ------------------------------------------------------------------------------------------------------


class AllOnHost(Place):
    """Nothing is copied."""

    def on_host(self, placing: Placing, forward: KnownForward) -> Sequence[int]:
        return placing.missing


class Asking(Place):
    """Everything on the GPU, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[tuple[int, ...], ...], int]] = []

    def on_host(self, placing: Placing, forward: KnownForward) -> Sequence[int]:
        kinds = tuple(tuple(keys) for keys in placing[1:4])
        self.asked.append((placing.layer, kinds, len(forward.demands)))
        return ()


ROUTING = decode([[[0, 1], [2, 3]], [[1, 0], [3, 1]]], 4)


def test_a_place_is_asked_once_a_layer_after_it_was_classified() -> None:
    place = Asking()
    job = run(ROUTING, num_experts=4, num_slots=8, policy=compose(place=place), initial=(1,), host=Host())
    assert place.asked == [
        (0, ((1,), (), (0,)), 1),
        (1, ((), (), (6, 7)), 2),
        (0, ((1, 0), (), ()), 1),
        (1, ((7,), (), (5,)), 2),
    ]
    assert job.counters.num_misses == 4


def test_the_gpu_is_the_default_and_is_not_asked() -> None:
    policy = compose()
    assert (type(policy.place), policy.places, compose(place=Gpu()).places) == (Gpu, False, False)


@pytest.mark.parametrize("words", [[], ["+policy/place=gpu"]])
def test_a_policy_need_not_name_its_place(words: list[str]) -> None:
    cfg = configure(["+hardware=a100", "+policy=lru", "compare=none", "max_tokens=4", *words])
    work = make_workload(cfg)
    policy, transfer = make_policy(cfg["policy"], work, 0)
    assert (type(policy.place), "place" in cfg["policy"]) == (Gpu, bool(words))
    assert run_policy(work, policy, transfer)["num_misses"] > 0


def test_a_place_of_ones_own_is_named_by_its_class() -> None:
    word = f"+policy.place={{_target_: {__name__}.AllOnHost}}"
    cfg = configure(["+hardware=a100", "+host=desktop", "+policy=lru", "compare=none", "max_tokens=4", word])
    work = make_workload(cfg)
    policy, transfer = make_policy(cfg["policy"], work, 0)
    metrics = run_policy(work, policy, transfer)
    assert metrics["num_host"] == metrics["num_accesses"] > 0


def test_a_place_on_the_host_needs_to_know_the_host() -> None:
    cfg = configure(["+hardware=a100", "+policy=lru", "compare=none", "max_tokens=4", "+policy/place=cheaper"])
    work = make_workload(cfg)
    with pytest.raises(ValueError, match=r"hardware=a100 lacks host_memory_gb_per_s, .* \+host=desktop, workstation"):
        run_policy(work, *make_policy(cfg["policy"], work, 0))


# -- answers and machines -------------------------------------------------------------------------------------------


def test_classes_of_this_package_are_asked_without_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHECKING, "own", False)
    own, other = compose(predictor=TransitionPredictor()), compose(predictor=Scripted({}), selection=TakeAll())
    for policy in (own, other):
        policy.start(view_of(3, 4, 1))
    assert own.answers.predict == own.predictor.predict
    assert other.answers.predict != other.predictor.predict
    assert other.answers.select != other.selection.select
    assert (is_own(own.eviction), is_own(other.predictor)) == (True, False)


class Derives(TransitionPredictor):
    """Of a user: would be shown routing that is not known yet."""


def test_forwards_are_announced_to_predictors_of_this_package_alone() -> None:
    for predictor, takes in ((TransitionPredictor(), True), (Derives(), False)):
        policy = compose(predictor=predictor)
        policy.start(view_of(3, 4, 1))
        assert predictor.announced() is not None
        assert (policy.announced() is not None) is takes


class Pairs(Predictor):
    """Answers a plain pair, as a user may."""

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Any:
        return [(layer + distance) % 3 * 4], [5]


class Noted(LRU):
    """Notes predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Prediction] = []

    def predicted(self, keys: Sequence[int], layer: int, prediction: Prediction) -> None:
        self.heard.append(prediction)


def test_a_pair_of_keys_and_scores_is_a_prediction() -> None:
    eviction = Noted()
    policy = compose(predictor=Pairs(), eviction=eviction)
    run(decode([[[0], [1], [2]]], 4), num_experts=4, num_slots=12, policy=policy)
    assert eviction.heard == [Prediction((key,), (5,), None) for key in (4, 8, 0)]


class Efforts(SimMachine):
    """Notes what decisions took."""

    told: list[float]

    def decided(self, wants: Sequence[int], effort: float) -> None:
        super().decided(wants, effort)
        self.__dict__.setdefault("told", []).append(effort)


def test_a_machine_is_told_the_effort_and_has_no_policy() -> None:
    predictor = Scripted({(0, layer, 1): [(layer + 1) % 3 * 4] for layer in range(3)})
    predictor.effort = predictor.effort.__class__(0.5, 0.25)
    policy = compose(predictor=predictor)
    job = run(decode([[[0], [1], [2]]], 4), num_experts=4, num_slots=12, policy=policy, machine_type=Efforts)
    assert isinstance(job.machine, Efforts)
    assert job.machine.told == [0.75] * 3
    assert policy.total_predicted == 3
    held = [value for value in vars(job.machine).values() if isinstance(value, Policy | Eviction | Predictor)]
    assert held == []


def test_without_a_predictor_nothing_is_decided() -> None:
    assert compose(predictor=NoPredictor(), horizon=FixedHorizon(depth=1)).prefetches is False
