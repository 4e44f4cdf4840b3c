"""The hybrid predictor: the same integers in a block and one by one, restarts, several tokens, the pre-gate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from expertflow.network import CHANCES, CODES, UNIT, HistoryNetwork, chances_of_codes
from expertflow.units import SCORE_ONE
from tests.policy.hybrid.support import PROMPTS, STARTS, D, E, H, L, answers, arrays, forwards, plain, started


def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "expertflow.compiled", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)


@pytest.mark.mostly_slow(keep=10)
@pytest.mark.parametrize("pregate", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("prompts", [(0, 0, 0, 0), PROMPTS])
@pytest.mark.parametrize("keep", [0, 4])
def test_compiled_and_in_numpy_the_integers_are_the_same(
    prompts: tuple[int, ...], seed: int, pregate: bool, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = forwards(prompts=prompts, pregate=pregate, seed=seed)
    told: list[list[Any]] = []
    for compiled in (True, False):
        if not compiled:
            without_numba(monkeypatch)
        predictor = started(arrays(seed, pregate=pregate), keep=keep)
        assert (predictor.compiled is not None) is compiled
        told.append(list(answers(predictor, some)))
    assert told[0] == told[1]
    assert any(told[0])


def test_the_order_in_which_distances_are_asked_does_not_matter() -> None:
    """Looking ahead in pieces, and once for all, gives the same."""
    forward, far_first, near_first = forwards(prompts=(0, 0, 0, 0))[0], started(arrays()), started(arrays())
    for predictor in (far_first, near_first):
        predictor.begin_forward(forward)
    for layer in range(L):
        distances = list(range(1, D + 2))
        said = {distance: plain(near_first.predict(forward, layer, distance)) for distance in distances}
        assert said == {distance: plain(far_first.predict(forward, layer, distance)) for distance in distances[::-1]}


@pytest.mark.parametrize("keep", [0, 4])
def test_chances_are_those_of_the_scores_and_of_the_rest(keep: int) -> None:
    predictor = started(arrays(), keep=keep)
    for forward in forwards():
        predictor.begin_forward(forward)
        for layer in range(L):
            for distance in range(1, D + 1):
                found = predictor.predict(forward, layer, distance)
                if found is not None:
                    assert found.chances is not None
                    assert list(found.scores) == [found.chances[key % E] for key in found.keys]
        predictor.end_forward(forward)


@pytest.mark.parametrize("prompts", [(0, 0, 0, 0), PROMPTS])
@pytest.mark.parametrize("block", [1, 3, 12, 64])
@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize(("compiled", "pregate"), [(True, False), (False, False), (True, True)])
def test_a_block_gives_the_integers_of_one_forward_after_another(
    compiled: bool,
    pregate: bool,
    keep: int,
    block: int,
    prompts: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt among them is taken alone, and those behind it together again."""
    fitted, some = arrays(pregate=pregate), forwards(prompts=prompts, pregate=pregate)
    assert any(forward.counts is not None for forward in some) is any(prompts)
    alone = list(answers(started(fitted, keep=keep), some))
    if not compiled:
        without_numba(monkeypatch)
    predictor = started(fitted, keep=keep)
    assert (predictor.compiled is not None) is compiled
    assert list(answers(predictor, some, block)) == alone
    assert predictor.block.num_taken == sum(forward.counts is None for forward in some)


def test_several_tokens_are_not_taken_in_blocks() -> None:
    predictor, some = started(arrays()), forwards(2)
    told = list(answers(predictor, some, 4))
    assert predictor.block.num_taken < len(some)
    assert told == list(answers(started(arrays()), some))


def test_a_pregate_is_taken_in_blocks_by_what_is_compiled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    some = forwards(pregate=True)
    without_numba(monkeypatch)
    predictor = started(arrays(pregate=True))
    told = list(answers(predictor, some, 4))
    assert predictor.block.num_taken == 0
    assert told == list(answers(started(arrays(pregate=True)), some))


@pytest.mark.parametrize("block", [1, 5, 12])
@pytest.mark.parametrize("ahead", [0, 1, D, D + 2])
@pytest.mark.parametrize("gap", [False, True])
def test_a_pregate_in_a_block_ends_where_it_ends_for_one_forward(block: int, ahead: int, gap: bool) -> None:
    """It may look less far than the network does, or farther; it may lack a distance, or one expert's number."""
    fitted, some = arrays(pregate=True), forwards(pregate=True)
    scores = np.random.default_rng(1).random((STARTS[-1], L, ahead, E)).astype(np.float32)
    if gap and ahead:
        scores[3:9, 1, ahead // 2, 2] = np.nan
        scores[::4, 0, 0] = np.nan
    for forward in some:
        forward.recorded = recorded = Gates(scores)
    told = list(answers(started(fitted), some))
    for forward in some[7:]:
        # A block is of one recording.
        forward.recorded = Gates(scores)
    some[6].recorded = recorded
    predictor = started(fitted)
    assert list(answers(predictor, some, block)) == told
    assert predictor.block.num_taken == sum(forward.counts is None for forward in some)


class Gates:
    """A recorded pre-gate [rows, L, any, E], as it is."""

    def __init__(self, chances: Any) -> None:
        self.chances = chances

    def lookahead(self, rows: Sequence[int], layer: int) -> Any:
        return self.chances[list(rows), layer]

    def embedding(self, rows: Sequence[int]) -> None:
        return None

    def token_ids(self, rows: Sequence[int]) -> None:
        return None


def test_scores_are_ranked_chances_of_the_target_layer() -> None:
    predictor = started(arrays())
    for forward in forwards():
        predictor.begin_forward(forward)
        for layer in range(L):
            for distance in range(1, D + 1):
                found = predictor.predict(forward, layer, distance)
                if found is None:
                    assert layer + distance >= L
                    assert layer < L - 1
                    continue
                keys, scores, _ = found
                assert {key // E for key in keys} == {(layer + distance) % L}
                assert sorted(keys) == list(range(min(keys), min(keys) + E))
                assert list(scores) == sorted(scores, reverse=True)
                assert all(0 <= score <= SCORE_ONE for score in scores)
        predictor.end_forward(forward)


def test_beyond_the_fitted_distances_there_is_no_idea() -> None:
    predictor, forward = started(arrays()), forwards()[0]
    predictor.begin_forward(forward)
    assert predictor.predict(forward, 0, D) is not None
    assert predictor.predict(forward, 0, D + 1) is None


def test_a_new_request_begins_as_the_first_did() -> None:
    some = forwards()
    predictor = started(arrays())
    first: dict[int, Any] = {}
    for forward in some:
        predictor.begin_forward(forward)
        if forward.requests_started:
            first[forward.requests[0]] = predictor.history.base.tolist()
        else:
            assert predictor.history.base.tolist() != first[forward.requests[0]]
        for layer in range(L):
            predictor.predict(forward, layer, 1)
        predictor.end_forward(forward)
    assert len(first) == len(PROMPTS)
    assert len({str(base) for base in first.values()}) == 1


def test_what_was_routed_changes_what_is_predicted() -> None:
    """The negative control of all that compares equal."""
    one, other = (list(answers(started(arrays()), forwards(seed=seed))) for seed in (3, 4))
    assert sum(a != b for a, b in zip(one, other, strict=True)) > len(one) / 2


@pytest.mark.parametrize("batch_size", [2, 4])
def test_with_several_tokens_the_chance_that_any_picks_it_is_larger(batch_size: int) -> None:
    fitted = arrays()
    some = forwards(batch_size)
    several = next(forward for forward in some if forward.num_tokens > 1 and forward.phase == "decode")
    predictor = started(fitted)
    for forward in some[: several.index]:
        predictor.begin_forward(forward)
        predictor.end_forward(forward)
    predictor.begin_forward(several)
    union = predictor.predict(several, 0, 1)
    predictor.history.num_tokens = 1
    predictor.window.clear()
    single = predictor.predict(several, 0, 1)
    assert union is not None
    assert single is not None
    chance = dict(zip(*single[:2], strict=True))
    for key, score in zip(*union[:2], strict=True):
        told = UNIT * (1 - (1 - chance[key] / UNIT) ** several.num_tokens)
        assert abs(score - told) <= 1


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_each_token_has_its_own_pregate(phase: str) -> None:
    """Of the mean pre-gate little would be left: what one token is sure of is as good as none among many."""
    weights = np.zeros((D, L, 2), np.int32)
    weights[..., 0] = 4000
    some = forwards(3, pregate=True)
    several = next(forward for forward in some if forward.num_tokens > 1 and forward.phase == phase)
    history, both = started(arrays()), started({**arrays(), "pregate": weights})
    for predictor in (history, both):
        for forward in some[: several.index]:
            predictor.begin_forward(forward)
            predictor.end_forward(forward)
        predictor.begin_forward(several)
    # What the history says of one token, as log-odds.
    history.predict(several, 0, 1)
    history.history.num_tokens = 1
    history.window.clear()
    alone = history.predict(several, 0, 1)
    found = both.predict(several, 0, 1)
    assert alone is not None
    assert found is not None
    assert several.recorded is not None
    recorded = several.recorded.lookahead(several.rows, 0)
    assert recorded is not None
    assert len(recorded) == several.num_tokens
    # Chances are in 2^-16: of those near 0 or 1 the odds are not known well enough.
    said = {key: chance for key, chance in zip(*alone[:2], strict=True) if 1000 < chance < UNIT - 1000}
    assert len(said) > 3
    for key, score in zip(*found[:2], strict=True):
        if key not in said:
            continue
        odds = np.log(said[key] / (UNIT - said[key]))
        steps = np.clip(np.floor(recorded[:, 0, key - E].astype(float) * 1024), 0, 1024)
        each = 1 / (1 + np.exp(-(odds + 4000 / 1024 * np.log((steps + 4) / (1024 - steps + 4)))))
        assert score / UNIT == pytest.approx(1 - np.prod(1 - each), abs=0.01)


def test_the_pregate_moves_scores_towards_what_it_names() -> None:
    weights = np.zeros((D, L, 2), np.int32)
    weights[..., 0] = 4000
    forward = forwards(pregate=True)[0]
    with_pregate = started({**arrays(), "pregate": weights})
    with_pregate.begin_forward(forward)
    assert forward.recorded is not None
    for layer in range(L - 1):
        chances = forward.recorded.lookahead(forward.rows, layer)
        assert chances is not None
        found = with_pregate.predict(forward, layer, 1)
        assert found is not None
        best = int(chances[0, 0].argmax()) + (layer + 1) * E
        assert best in list(found[0])[:2]


def test_without_a_recorded_pregate_a_network_that_needs_one_has_no_idea() -> None:
    predictor, forward = started(arrays(pregate=True)), forwards()[0]
    predictor.begin_forward(forward)
    assert predictor.predict(forward, 0, 1) is None
    assert predictor.predict(forward, L - 1, 1) is not None


def test_nothing_fitted_is_said_in_one_line() -> None:
    from expertflow.predictors.hybrid import HybridPredictor

    with pytest.raises(ValueError, match="fit-predictor"):
        HybridPredictor(None)


def _without(name: str) -> dict[str, Any]:
    made = arrays()
    del made[name]
    return made


@pytest.mark.parametrize(
    ("fitted", "complaint"),
    [
        (_without("mix"), "mix is missing"),
        (arrays(tables=np.zeros((L * E + 1, 6 * H), np.int16)), "tables has shape"),
        (arrays(tables=np.zeros((L * E, 6 * H + 6), np.int16)), "tables has shape"),
        (arrays(bias=np.zeros((D, L, E + 1), np.int32)), "bias has shape"),
        (arrays(bias=np.full((D, L, E), 1 << 25, np.int32)), "at most"),
        (arrays(own=np.zeros((D, 4, L, E), np.float32)), "whole numbers"),
        (arrays(out=np.full((L, 10, E), -128, np.int16)), "at most"),
        (arrays(frequency=np.zeros((L,), np.int32)), "frequency has shape"),
        (arrays(mix=np.zeros((L, 2000, 10), np.int8), tables=np.zeros((L * E, 12000), np.int16)), "too large"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(fitted: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        HistoryNetwork(fitted, L, E)


def test_chances_rise_from_nothing_to_one() -> None:
    assert (np.diff(CHANCES) >= 0).all()
    assert CHANCES[0] == 0
    assert CHANCES[-1] == UNIT
    assert CHANCES[len(CHANCES) // 2] == UNIT // 2


def test_sums_stay_exact_in_single_precision() -> None:
    """The largest activations and weights there may be, against whole numbers."""
    fitted = arrays(out=np.full((L, 10, E), 127, np.int8), mix=np.full((L, H, 10), 127, np.int8))
    net = HistoryNetwork(fitted, L, E)
    hidden = np.full(H, 127, np.float32)
    mixed = 127 * 127 * H + fitted["mix_bias"][0, 2].astype(int)
    active = np.clip(mixed * fitted["mix_scale"][2].astype(int) // UNIT, 0, 127)
    told = (active.sum() * 127) * fitted["out_scale"][2].astype(int) // UNIT + fitted["bias"][0, 2]
    assert net.odds(hidden, 2, 1).tolist() == told.tolist()


def test_there_is_a_forecast_from_the_start() -> None:
    assert started(arrays()).forecast().tolist() == arrays()["frequency"].reshape(-1).tolist()


def test_products_in_parts_are_whole_products(monkeypatch: pytest.MonkeyPatch) -> None:
    net, draw = HistoryNetwork(arrays(), L, E), np.random.default_rng(0)
    hidden = draw.integers(0, 128, (23, H)).astype(np.float32)
    whole = net.odds(hidden, 2, 1)
    assert whole.tolist() == [net.odds(row, 2, 1).tolist() for row in hidden]
    for limit in (1, H * 10, 5 * H * 10, 22 * H * 10):
        monkeypatch.setattr("expertflow.network.SINGLE_THREADED", limit)
        assert net.odds(hidden, 2, 1).tolist() == whole.tolist()


def test_sixteen_bits_hold_every_chance() -> None:
    assert CODES.dtype == np.uint16
    assert chances_of_codes(CODES).tolist() == CHANCES.tolist()
    assert {0, UNIT} <= set(CHANCES.tolist())
