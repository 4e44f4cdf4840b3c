"""Predictors with a known answer: oracles of stated accuracy, and what a trace has recorded."""

from math import exp, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from expertflow.diversity import embedding_distance
from expertflow.future import Future
from expertflow.parts import Predictor
from expertflow.predictors.lookahead import LookaheadPredictor
from expertflow.predictors.noisy_oracle import NoisyOraclePredictor
from expertflow.predictors.oracle import OraclePredictor
from expertflow.units import SCORE_ONE
from tests.support.commands import job, routing, small_trace
from tests.support.runs import decode
from tests.support.workloads import forward_rows, memory_trace, view_of
from traces.batching import RecordedRows

L, E, K = 6, 16, 3
NUM_FORWARDS = 400


@pytest.fixture(scope="module")
def future() -> Future:
    """Routing in which an expert repeats often, by (forward, layer)."""
    return Future(decode(routing((L, E, K), NUM_FORWARDS).tolist(), E), L * E)


def noisy(future: Future, **settings_: object) -> NoisyOraclePredictor:
    predictor = NoisyOraclePredictor(**settings_)  # type: ignore[arg-type]
    predictor.start(view_of(L, E, K), future)
    return predictor


def guesses(predictor: Predictor, future: Future, distance: int) -> list[tuple[list[int], list[int]]]:
    """(truth, guess) of every event that lies `distance` ahead of another."""
    pairs = []
    for forward in range(NUM_FORWARDS - 1):
        for layer in range(L):
            scores = predictor.predict(forward_rows(forward, [forward], L), layer, distance)
            assert scores is not None
            pairs.append((list(future.demand(forward * L + layer + distance)), list(scores[0])))
    return pairs


# -- oracles -------------------------------------------------------------------------------------------------


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("distance", [1, 2, 5])
def test_the_oracle_says_what_comes_past_the_last_layer_too(distance: int, future: Future) -> None:
    oracle = OraclePredictor()
    oracle.start(view_of(L, E, K), future)
    assert all(truth == guess for truth, guess in guesses(oracle, future, distance))
    assert oracle.predict(forward_rows(NUM_FORWARDS - 1, [0], L), L - 1, 1) is None


@pytest.mark.mostly_slow(keep=5)
@pytest.mark.parametrize("wrong", ["uniform", "popularity"])
@pytest.mark.parametrize("distance", [1, 2, 3, 4])
@pytest.mark.parametrize(("a", "b", "c"), [(0.3, 0.5, 0.6), (0.9, 1.0, 0.05)])
def test_the_noisy_oracle_has_the_recall_it_was_told(
    a: float, b: float, c: float, distance: int, wrong: str, future: Future
) -> None:
    pairs = guesses(noisy(future, a=a, b=b, c=c, wrong=wrong), future, distance)
    num_true = sum(len(truth) for truth, _ in pairs)
    recall = sum(len(set(truth) & set(guess)) for truth, guess in pairs) / num_true
    told = a * exp(-b * distance) + c
    assert abs(recall - told) < 4 * sqrt(told * (1 - told) / num_true)
    assert all(len(guess) == len(set(guess)) == len(truth) for truth, guess in pairs)
    assert all({key // E for key in guess} == {key // E for key in truth} for truth, guess in pairs)


def test_a_recall_that_is_not_the_one_told_is_noticed(future: Future) -> None:
    """The negative control: the sampling error above tells 0.60 from 0.62."""
    pairs = guesses(noisy(future, a=0.0, b=0.0, c=0.62), future, 1)
    num_true = sum(len(truth) for truth, _ in pairs)
    recall = sum(len(set(truth) & set(guess)) for truth, guess in pairs) / num_true
    assert abs(recall - 0.6) > 4 * sqrt(0.6 * 0.4 / num_true) / 2


def test_wrong_guesses_are_spread_evenly_over_the_other_experts(future: Future) -> None:
    guessed = np.zeros(E)
    could = np.zeros(E)
    for truth, guess in guesses(noisy(future, a=0.0, b=0.0, c=0.0), future, 1):
        others = [key % E for key in range(E) if key not in {t % E for t in truth}]
        could[others] += K / len(others)
        guessed[[key % E for key in guess]] += 1
    assert (abs(guessed - could) < 5 * np.sqrt(could)).all()


def test_the_noisy_oracle_depends_on_seed_event_and_distance_alone(future: Future) -> None:
    forward = forward_rows(7, [7], L)
    told = {"c": 0.3, "a": 0.0}
    first, second = noisy(future, seed=1, **told), noisy(future, seed=1, **told)
    for index in (3, 50, 2):
        second.predict(forward_rows(index, [index], L), 1, 1)
    assert first.predict(forward, 2, 1) == second.predict(forward, 2, 1)
    others = [noisy(future, seed=seed, **told).predict(forward, 2, 1) for seed in range(2, 12)]
    assert any(other != first.predict(forward, 2, 1) for other in others)
    # Two looks at one event from different layers err on their own.
    forwards = [forward_rows(index, [index], L) for index in range(20)]
    looks = [(first.predict(one, 2, 1), first.predict(one, 1, 2)) for one in forwards]
    assert any(near is not None and far is not None and near[0] != far[0] for near, far in looks)


# -- recorded lookahead --------------------------------------------------------------------------------------

D = 2
TOKENS = 10


def recorded_choice() -> npt.NDArray[np.int64]:
    """What the recording guesses: experts [T, L, D, K], of layer l + 1 + d."""
    rng = np.random.default_rng(5)
    return np.argsort(rng.random((TOKENS, L, D, E)), axis=-1)[..., :K]


def past_the_last() -> npt.NDArray[np.bool_]:
    """[L, D]: whether the distance leaves the model."""
    return np.array([[layer + 1 + d >= L for d in range(D)] for layer in range(L)])


def dense_lookahead() -> npt.NDArray[np.float16]:
    scores = np.zeros((TOKENS, L, D, E), np.float16)
    np.put_along_axis(scores, recorded_choice(), np.array([9.0, 8.0, 7.0], np.float16), axis=-1)
    scores[:, past_the_last()] = np.nan
    return scores


def listed_lookahead() -> dict[str, npt.NDArray[np.uint8]]:
    ids = recorded_choice().astype(np.uint8)
    scores = np.broadcast_to(np.array([250, 240, 230], np.uint8), ids.shape).copy()
    ids[:, past_the_last()] = 255
    scores[:, past_the_last()] = 0
    return {"lookahead_ids": ids, "lookahead_scores": scores}


FORMS: dict[str, dict[str, Any]] = {"dense": {"lookahead": dense_lookahead()}, "listed": listed_lookahead()}


def lookahead_of(form: str) -> tuple[LookaheadPredictor, RecordedRows]:
    trace = memory_trace(routing((L, E, K), TOKENS), E, [0, TOKENS], [0], **FORMS[form])
    predictor = LookaheadPredictor()
    predictor.start(view_of(L, E, K), None)
    return predictor, RecordedRows(trace)


@pytest.mark.parametrize("form", FORMS)
def test_lookahead_predicts_what_was_recorded_best_first(form: str) -> None:
    predictor, recorded = lookahead_of(form)
    choice = recorded_choice()
    for token in range(TOKENS):
        forward = forward_rows(token, [token], L, recorded)
        for layer in range(L):
            for distance in (1, 2):
                scores = predictor.predict(forward, layer, distance)
                target = layer + distance
                if target >= L:
                    assert scores is None
                    continue
                assert scores is not None
                expected = [target * E + int(expert) for expert in choice[token, layer, distance - 1]]
                assert list(scores[0])[:K] == expected
                assert list(scores[1]) == sorted(scores[1], reverse=True)
                assert 0 <= min(scores[1]) <= max(scores[1]) <= SCORE_ONE


@pytest.mark.parametrize("form", FORMS)
def test_lookahead_reaches_no_farther_than_the_recording(form: str) -> None:
    predictor, recorded = lookahead_of(form)
    assert predictor.predict(forward_rows(0, [0], L, recorded), 0, D + 1) is None
    assert predictor.predict(forward_rows(0, [0], L, None), 0, 1) is None


@pytest.mark.parametrize("form", FORMS)
def test_lookahead_of_a_batch_holds_what_any_of_its_tokens_wants(form: str) -> None:
    predictor, recorded = lookahead_of(form)
    scores = predictor.predict(forward_rows(0, [2, 5, 8], L, recorded), 1, 1)
    assert scores is not None
    wanted = {2 * E + int(expert) for token in (2, 5, 8) for expert in recorded_choice()[token, 1, 0]}
    assert set(scores[0][: len(wanted)]) == wanted


def test_a_dense_recording_gives_the_chance_of_its_softmax() -> None:
    predictor, recorded = lookahead_of("dense")
    scores = predictor.predict(forward_rows(0, [4], L, recorded), 0, 1)
    assert scores is not None
    logits = dense_lookahead()[4, 0, 0].astype(np.float64)
    chance = np.minimum(K * np.exp(logits) / np.exp(logits).sum(), 1.0)
    expected = np.rint(np.sort(chance)[::-1] * SCORE_ONE).astype(int)
    assert list(scores[1]) == expected.tolist()


def test_a_listed_candidate_is_as_likely_as_its_score_says() -> None:
    predictor, recorded = lookahead_of("listed")
    scores = predictor.predict(forward_rows(0, [4], L, recorded), 0, 1)
    assert scores is not None
    assert list(scores[1]) == [round(value / 255 * SCORE_ONE) for value in (250, 240, 230)] + [0] * (E - K)


@pytest.mark.parametrize("form", FORMS)
def test_recorded_chances_are_per_token_in_rows_and_distances(form: str) -> None:
    _, recorded = lookahead_of(form)
    chance = recorded.lookahead([4, 7], 1)
    assert chance is not None
    assert (chance.shape, chance.dtype) == ((2, D, E), np.float32)
    for row, token in enumerate((4, 7)):
        for d in range(D):
            logits = dense_lookahead()[token, 1, d].astype(np.float64)
            listed = np.zeros(E)
            listed[recorded_choice()[token, 1, d]] = np.array([250, 240, 230]) / 255
            dense = np.minimum(K * np.exp(logits) / np.exp(logits).sum(), 1.0)
            np.testing.assert_allclose(chance[row, d], listed if form == "listed" else dense, rtol=1e-6)


def test_large_logits_do_not_overflow_and_a_sure_expert_is_certain() -> None:
    scores = np.zeros((TOKENS, L, D, E), np.float16)
    scores[..., 3] = 60000.0
    scores[:, past_the_last()] = np.nan
    trace = memory_trace(routing((L, E, K), TOKENS), E, [0, TOKENS], [0], lookahead=scores)
    chance = RecordedRows(trace).lookahead([0], 0)
    assert chance is not None
    assert chance[0, 0].tolist() == [1.0 if expert == 3 else 0.0 for expert in range(E)]


@pytest.mark.parametrize("form", FORMS)
def test_the_chance_of_a_batch_is_that_of_any_of_its_tokens(form: str) -> None:
    predictor, recorded = lookahead_of(form)
    rows = [2, 5, 8]
    for layer, distance in ((0, 1), (1, 2), (3, 1)):
        scores = predictor.predict(forward_rows(0, rows, L, recorded), layer, distance)
        chance = recorded.lookahead(rows, layer)
        assert scores is not None
        assert chance is not None
        none = np.prod(1.0 - chance[:, distance - 1].astype(np.float64), axis=0)
        expected = {(layer + distance) * E + e: round((1.0 - none[e]) * SCORE_ONE) for e in range(E)}
        assert dict(zip(*scores[:2], strict=True)) == expected
        assert list(scores[0]) == sorted(expected, key=lambda key: (-expected[key], key))


def test_a_recording_of_the_truth_gets_all_hits_that_time_allows(tmp_path: Path) -> None:
    """On a link fast enough, a perfect recording leaves only what no recording reaches: the first layer."""
    shape, num_tokens = (24, 32, 4), 30
    experts = routing(shape, num_tokens)
    scores = np.full((num_tokens, 24, 1, 32), -8, np.float16)
    for layer in range(23):
        np.put_along_axis(scores[:, layer, 0], experts[:, layer + 1].astype(np.int64), np.float16(8), axis=-1)
    scores[:, 23] = np.nan
    path = small_trace(tmp_path / "t.safetensors", num_tokens, 1, experts=experts, lookahead=scores)
    told = ("+hardware=gh200", "+policy=fixed_1", f"trace.path={path}", "compare=none", "residency=0.5")
    seen = job(*told, "policy/predictor=lookahead")
    blind = job(*told, "policy/predictor=none")
    assert seen["num_misses"] <= num_tokens * 4 < blind["num_misses"]
    assert seen["prefetch"]["wasted"] == 0


# -- diversity -----------------------------------------------------------------------------------------------

vectors = arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(1, 5)), elements=st.floats(-100, 100, width=32))


@given(embeddings=vectors)
@settings(deadline=None, max_examples=200)
def test_embedding_distance_is_the_double_sum_over_pairs(embeddings: npt.NDArray[np.float64]) -> None:
    pairs = [float(((embeddings[i] - embeddings[j]) ** 2).sum()) for j in range(len(embeddings)) for i in range(j)]
    scale = len(embeddings) * float((embeddings**2).sum())
    assert embedding_distance(embeddings) == pytest.approx(sum(pairs), rel=1e-9, abs=1e-12 * scale + 1e-12)


def test_embedding_distance_of_one_token_or_of_equal_tokens_is_zero() -> None:
    assert embedding_distance(np.full((1, 4), 3.0)) == 0.0
    assert embedding_distance(np.full((5, 4), 3.0, np.float16)) == 0.0


def test_embedding_distance_wants_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"\(3,\)"):
        embedding_distance(np.zeros(3))
