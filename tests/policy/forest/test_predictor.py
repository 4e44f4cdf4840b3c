"""The forest predictor in a run: what it says, what it falls back on, what it keeps, and that it helps where it can."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from expertflow.forward import Forward
from expertflow.parts import Prediction
from expertflow.predictors.forest import ForestPredictor
from expertflow.predictors.lookahead import LookaheadPredictor
from expertflow.predictors.ranking import rank_scores
from sim.job.configure import configure
from tests.policy.forest.support import LENGTH, SMALL, D, E, K, L, knowable, needs_fit, quiet
from tests.support.commands import GPT_OSS, job, routing, small_trace
from tests.support.workloads import forward_rows, view_of
from traces import cli
from traces.batching import BatchConfig, Batches, RecordedRows
from traces.fitting.forest import ForestOptions, fit_forest
from traces.fitting.rows import row_blocks
from traces.reader import Trace

Arrays = dict[str, npt.NDArray[np.generic]]


@pytest.fixture(scope="module")
def fitted() -> Arrays:
    needs_fit()
    return fit_forest(knowable(24, 1), quiet, ForestOptions(max_mb=1, **SMALL))[0]


def started(fitted: Arrays, cache_size: int = 100) -> ForestPredictor:
    predictor = ForestPredictor(fitted, cache_size)
    predictor.start(view_of(L, E, K), None)
    return predictor


def play(
    predictor: ForestPredictor, trace: Trace, config: BatchConfig | None = None
) -> dict[tuple[int, int, int], Prediction | None]:
    """What it says of every (forward, layer, distance)."""
    found = {}
    for forward in Batches(trace, config or BatchConfig(prefill_chunk=1)):
        predictor.begin_forward(forward)
        for layer in range(L):
            for distance in range(1, D + 2):
                said = predictor.predict(forward, layer, distance)
                found[forward.index, layer, distance] = None if said is None else (list(said[0]), list(said[1]))
        predictor.end_forward(forward)
    return found


def recalls(fitted: Arrays, trace: Trace) -> tuple[float, float]:
    """recall@K of the pre-gate and of the forest, over targets that the pre-gate reaches."""
    said = play(started(fitted), trace)
    lookahead = LookaheadPredictor()
    lookahead.start(view_of(L, E, K), None)
    hits, total = np.zeros(2), 0
    for forward in Batches(trace, BatchConfig(prefill_chunk=1)):
        for layer in range(L - 1):
            for distance in range(1, min(D, L - 1 - layer) + 1):
                truth = set(forward.demands[layer + distance])
                total += len(truth)
                for row, scores in enumerate(
                    (lookahead.predict(forward, layer, distance), said[forward.index, layer, distance])
                ):
                    assert scores is not None
                    hits[row] += len(truth & set(scores[0][:K]))
    return float(hits[0] / total), float(hits[1] / total)


@pytest.mark.slow
def test_it_says_what_the_forest_says_of_the_row(fitted: Arrays) -> None:
    trace = knowable(3, 7)
    predictor = started(fitted)
    said = play(predictor, trace)
    block = next(row_blocks(trace, range(3)))
    for layer in range(L):
        for distance in range(1, D + 1):
            target = (layer + distance) % L
            for row, features in enumerate(block.features(layer, distance)):
                assert predictor.forest is not None
                scores = predictor.forest.scores(features, target, distance)
                keys, values = rank_scores(scores[None], target * E, E)
                assert said[row, layer, distance] == (keys[0].tolist(), values[0].tolist())


def test_it_beats_a_pregate_that_is_misled_where_history_knows_better(fitted: Arrays) -> None:
    pregate, forest = recalls(fitted, knowable(8, 99))
    assert 0.55 < pregate < 0.7
    assert forest > 0.93


def test_it_gains_nothing_where_there_is_nothing_to_know() -> None:
    """The negative control: routing that has to do with nothing, in fitting and in use."""
    needs_fit()
    fitted = fit_forest(knowable(24, 1, random=True), quiet, ForestOptions(max_mb=1, **SMALL))[0]
    pregate, forest = recalls(fitted, knowable(8, 99, random=True))
    assert abs(pregate - 0.25) < 0.05
    assert abs(forest - 0.25) < 0.05


def test_past_the_last_layer_this_forwards_choice_says_something_of_the_next(fitted: Arrays) -> None:
    """A topic lasts with a chance of 0.775 (and of four, one is right by chance)."""
    trace = knowable(8, 99)
    said = play(started(fitted), trace)
    forwards = list(Batches(trace, BatchConfig(prefill_chunk=1)))
    hits = total = 0
    for forward, after in pairwise(forwards):
        if after.requests_started:
            continue
        scores = said[forward.index, L - 1, 2]
        assert scores is not None
        hits += len(set(after.demands[1]) & set(scores[0][:K]))
        total += K
    assert 0.7 < hits / total < 0.85


def test_it_does_not_see_what_is_not_known_yet(fitted: Arrays) -> None:
    forward = list(Batches(knowable(1, 5), BatchConfig(prefill_chunk=1)))[3]
    known = forward.demands[:3] + [[layer * E + 7, layer * E + 6] for layer in range(3, L)]
    other = Forward(
        forward.index,
        forward.phase,
        forward.rows,
        forward.requests,
        forward.kv_lens,
        known,
        known,
        forward.counts,
        recorded=forward.recorded,
    )
    other.counts = None
    forward.counts = None
    answers = []
    for one in (forward, other):
        predictor = started(fitted)
        predictor.begin_forward(one)
        answers.append([predictor.predict(one, 2, distance) for distance in (1, 2, 3)])
        # What becomes known does count.
        answers.append([predictor.predict(one, L - 1, 1)])
    assert answers[0] == answers[2]
    assert answers[1] != answers[3]


# -- fall-backs ------------------------------------------------------------------------------------------------------


def test_a_distance_or_tokens_it_was_not_fitted_to_get_the_pregate_alone(fitted: Arrays) -> None:
    trace = knowable(1)
    lookahead, recorded = LookaheadPredictor(), RecordedRows(trace)
    lookahead.start(view_of(L, E, K), None)
    near = {key: value[:1] if key == "calibration" else value for key, value in fitted.items()}
    cases = [(near, [5], 2), (near, [5], 3), (fitted, [5, 6, 9], 1), (fitted, [5, 6, 9], 2)]
    for arrays, rows, distance in cases:
        predictor, forward = started(arrays), forward_rows(0, rows, L, recorded)
        predictor.begin_forward(forward)
        assert predictor.predict(forward, 1, distance) == lookahead.predict(forward, 1, distance)
        assert predictor.num_predictions == 0
    forward = forward_rows(0, [5], L, recorded)
    predictor = started(fitted)
    predictor.begin_forward(forward)
    assert predictor.predict(forward, 1, 2) != lookahead.predict(forward, 1, 2)


def test_without_a_forest_the_pregate_is_alone() -> None:
    trace = knowable(1)
    predictor, lookahead = ForestPredictor(None), LookaheadPredictor()
    for one in (predictor, lookahead):
        one.start(view_of(L, E, K), None)
    for forward in Batches(trace, BatchConfig()):
        predictor.begin_forward(forward)
        for layer in range(L):
            for distance in range(1, D + 2):
                assert predictor.predict(forward, layer, distance) == lookahead.predict(forward, layer, distance)
        predictor.end_forward(forward)


def test_without_a_pregate_there_is_no_idea_but_past_the_last_layer(fitted: Arrays) -> None:
    predictor, forward = started(fitted), forward_rows(0, [0], L, None)
    predictor.begin_forward(forward)
    assert predictor.predict(forward, 1, 1) is None
    assert predictor.predict(forward, L - 1, 1) is not None
    # Beyond both the forest and the pre-gate.
    assert predictor.predict(forward, L - 1, D + 1) is None


def test_a_prompt_runs_and_the_first_token_after_it_is_predicted(fitted: Arrays) -> None:
    said = play(started(fitted), knowable(2, prompt=6), BatchConfig())
    assert said[0, 0, 1] is not None
    assert all(said[1, layer, 1] is not None for layer in range(L))


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_what_is_kept_changes_no_answer_and_is_bounded(fitted: Arrays) -> None:
    trace = knowable(2)
    answers = play(started(fitted, 0), trace)
    predictor = started(fitted, 50)
    assert play(predictor, trace) == answers
    assert len(predictor.cache) == 50
    assert predictor.num_predictions == 2 * LENGTH * L * D
    assert started(fitted, 0).cache == {}


def test_equal_features_are_hits(fitted: Arrays) -> None:
    forward = forward_rows(0, [4], L, RecordedRows(knowable(1)))
    predictor = started(fitted)
    predictor.begin_forward(forward)
    first = predictor.predict(forward, 1, 1)
    assert (predictor.num_hits, predictor.predict(forward, 1, 1), predictor.num_hits) == (0, first, 1)
    predictor.predict(forward, 1, 2)
    predictor.predict(forward, 2, 1)
    assert (predictor.num_hits, predictor.num_predictions) == (1, 4)


# -- errors and configuration ----------------------------------------------------------------------------------------


def test_wrong_settings_are_named(fitted: Arrays) -> None:
    with pytest.raises(ValueError, match="cache_size=-1"):
        ForestPredictor(fitted, -1)
    with pytest.raises(ValueError, match="calibration has shape"):
        ForestPredictor(fitted).start(view_of(L + 1, E, K), None)
    with pytest.raises(ValueError, match="leaves has shape"):
        ForestPredictor(fitted).start(view_of(L, E + 1, K), None)


def test_the_configuration_names_its_target_and_keys() -> None:
    found = configure(["+hardware=a100", "+policy=adaptive", "policy/predictor=forest"])["policy"]["predictor"]
    target = f"{ForestPredictor.__module__}.{ForestPredictor.__name__}"
    assert found == {"_target_": target, "fitted": "auto", "cache_size": 4096, "refreshes": False}
    assert ForestPredictor.fitted_kind == "forest"


def test_a_fitted_file_runs_and_runs_the_same_twice(tmp_path: Path) -> None:
    needs_fit()
    scores = np.random.default_rng(0).normal(size=(24, GPT_OSS[0], 1, GPT_OSS[1])).astype(np.float16)
    scores[:, -1] = np.nan
    trace = small_trace(tmp_path / "t.safetensors", 24, 4, experts=routing(GPT_OSS, 24), lookahead=scores)
    fitted = tmp_path / "f.safetensors"
    assert cli.main(["fit-predictor", str(trace), str(fitted), "kind=forest", "rows=40", "trees=2", "max_mb=1"]) == 0
    told = (
        "+hardware=a100",
        "+policy=adaptive",
        "policy/predictor=forest",
        f"trace.path={trace}",
        "compare=none",
        f"policy.predictor.fitted={fitted}",
    )
    first = job(*told)
    assert first == job(*told)
    assert first["prefetch"]["issued"] > 0
