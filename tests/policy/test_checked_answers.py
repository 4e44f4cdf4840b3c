"""What comes in as it is where all is sound, and what is found by the quick look that the checks begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow.boundary import Guard, PartError
from expertflow.checks import CheckedPredictor, frozen
from expertflow.forward import KnownForward
from expertflow.parts import Prediction, Predictor
from expertflow.units import SCORE_ONE
from expertflow.view import Progress, View

NUM_LAYERS = 3


class Says(Predictor):
    """Answers what it is told."""

    answer: Any = None
    odds: Any = None

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        found: Prediction | None = self.answer
        return found

    def forecast(self) -> Any:
        return self.odds


def checked(num_experts: int, answer: object = None, odds: object = None) -> CheckedPredictor:
    part = Says()
    part.answer, part.odds = answer, odds
    residency = memoryview(bytearray(NUM_LAYERS * num_experts))
    view = View(
        Progress(),
        residency,
        num_layers=NUM_LAYERS,
        num_experts=num_experts,
        top_k=1,
        expert_bytes=1,
        num_slots=1,
    )
    return CheckedPredictor(part, Guard(part, view), view)


def of_layer_1(checks: CheckedPredictor) -> Prediction | None:
    return checks.predict(None, 0, 1)  # type: ignore[arg-type]


EDGES = (0, 1, SCORE_ONE - 1, SCORE_ONE, SCORE_ONE + 1, 2 * SCORE_ONE - 1, 2 * SCORE_ONE, 2**32, 2**63 - 1)
NUMBERS = st.one_of(
    st.sampled_from([*EDGES, *(-edge for edge in EDGES), -(2**63)]), st.integers(0, SCORE_ONE), st.integers(-3, 3)
)


@given(st.one_of(st.lists(NUMBERS, min_size=1, max_size=6), st.lists(NUMBERS, min_size=129, max_size=140)))
def test_chances_are_sound_exactly_if_each_is(values: list[int]) -> None:
    # Few are looked at as one long integer, many by numpy: a number must neither hide another nor spoil it.
    checks = checked(len(values), Prediction([], [], np.array(values, np.int64)))
    if all(0 <= value <= SCORE_ONE for value in values):
        told = of_layer_1(checks)
        assert told is not None
        assert told.chances is not None
        assert told.chances.tolist() == values
    else:
        with pytest.raises(PartError, match="chances are in 0") as found:
            of_layer_1(checks)
        assert f"from {min(values)} to {max(values)}" in str(found.value)


@pytest.mark.parametrize("kind", ["int8", "uint16", "int32", ">i8", "uint64"])
def test_whole_numbers_of_any_width_are_taken_by_value(kind: str) -> None:
    values = [0, 100, 7, 1]
    told = of_layer_1(checked(4, Prediction([], [], np.array(values, kind))))
    assert told is not None
    assert told.chances is not None
    assert (told.chances.tolist(), told.chances.dtype) == (values, np.int64)
    # Every second of a longer array: not what lies behind the first one.
    wide = np.array([0, 9, 100, 9, 7, 9, 1, 9], kind)[::2]
    told = of_layer_1(checked(4, Prediction([], [], wide)))
    assert told is not None
    assert told.chances is not None
    assert told.chances.tolist() == values


def test_a_number_above_what_64_bits_hold_with_a_sign_is_refused() -> None:
    with pytest.raises(PartError, match="chances are in 0"):
        of_layer_1(checked(2, Prediction([], [], np.array([0, 2**64 - 1], np.uint64))))


class Liar(np.ndarray):
    """Says of itself that it is sound."""

    shape = (2,)  # type: ignore[assignment]

    def tobytes(self, order: Any = None) -> bytes:
        return bytes(16)

    def tolist(self) -> list[int]:
        return [0, 0]

    def astype(self, *_: Any, **__: Any) -> Any:
        return np.zeros(2, np.int64)


def test_an_array_of_a_class_of_its_own_is_read_for_what_it_holds() -> None:
    for held in (np.array([0, -1]), np.array([0, 1, 2])):
        with pytest.raises(PartError, match=r"chances are in 0|give an array"):
            of_layer_1(checked(2, Prediction([], [], held.view(Liar))))


def test_a_forecast_is_held_to_the_same() -> None:
    sound = np.arange(NUM_LAYERS * 2)
    told = checked(2, odds=sound).forecast()
    assert told is not None
    assert told.tolist() == sound.tolist()
    sound[0] = 5
    assert told[0] == 0  # it is a copy
    for wrong in (sound - 1 - sound.max(), sound * SCORE_ONE, sound[1:], sound / 2, sound.reshape(2, -1), "abc"):
        with pytest.raises(PartError, match=r"Says\.forecast answered"):
            checked(2, odds=wrong).forecast()


def test_what_a_hearer_is_given_can_never_be_written_to() -> None:
    told = of_layer_1(checked(3, Prediction([3, 4], [9, 8], np.array([9, 8, 7]))))
    ours = Prediction([3, 4], [9, 8], np.array([9, 8, 7]))
    for source in (told, ours):
        assert source is not None
        given_first, given_then = frozen(source), frozen(source)
        first, then = given_first.chances, given_then.chances
        assert first is not None
        assert then is not None
        assert (given_first.keys, given_first.scores, first.tolist()) == ((3, 4), (9, 8), [9, 8, 7])
        with pytest.raises(ValueError, match="WRITEABLE"):
            first.setflags(write=True)
        # The shape of an array may always be set: another hearer has an array of its own.
        first.shape = (3, 1)
        assert then.shape == (3,)
        assert first.base is not source.chances


@pytest.mark.parametrize("sequence", [list, tuple])
@pytest.mark.parametrize(
    ("keys", "scores", "told"),
    [
        ([3, 3], [2, 1], "scored key 3 twice"),
        ([3, 6], [2, 1], "scored key 6, which is of another"),
        ([3, 2], [2, 1], "scored key 2, which is of another"),
        ([3, 4], [1, 2], "not best first"),
        ([3, 4], [SCORE_ONE + 1, 2], f"answered score {SCORE_ONE + 1}"),
        ([3, 4], [2, -1], "answered score -1"),
        ([3, 4], [2], "1 scores for 2 keys"),
        ([3], [2, 1], "2 scores for 1 keys"),
        ([3, 4], [], "0 scores for 2 keys"),
        ([3, 4, 5, 3], [4, 3, 2, 1], "4 keys, 3 at most"),
        ([3, True], [2, 1], "which is no whole number"),
        ([3, 4], [2, True], "which is no whole number"),
        ([3, 4.0], [2, 1], "which is no whole number"),
        ([3, 4], [2, 1.0], "which is no whole number"),
        ([3, "4"], [2, 1], "which is no whole number"),
        ([3, 4], [2, None], "which is no whole number"),
    ],
)
def test_keys_and_scores_that_break_a_rule_are_named(
    sequence: Callable[[list[Any]], Any], keys: list[Any], scores: list[Any], told: str
) -> None:
    with pytest.raises(PartError) as found:
        of_layer_1(checked(3, Prediction(sequence(keys), sequence(scores))))
    assert told in str(found.value)


def test_what_is_sound_comes_in_as_pythons_own() -> None:
    for keys, scores in (
        ([4, 3], [7, 7]),
        ((4, 3), (7, 7)),
        ([4, 3], (7, 7)),
        (np.array([4, 3]), [np.int64(7), 7]),
        ([np.uint8(4), 3], np.array([7, 7], np.uint16)),
    ):
        found = of_layer_1(checked(3, (keys, scores)))
        assert found == Prediction((4, 3), (7, 7))
        assert {type(one) for one in (*found.keys, *found.scores)} == {int}
    assert of_layer_1(checked(3, ((), ()))) == Prediction((), ())
