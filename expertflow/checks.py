"""What the parts of a policy answer, checked where it enters: a class for each kind of part, with the hooks' own names.

Only around classes that are not of this package (`expertflow.boundary`). What such a part is given it cannot change:
sequences are tuples, arrays are copies; and what it answers is copied, so that what it does to it later is its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import countOf
from typing import TYPE_CHECKING

import numpy as np

from expertflow.boundary import INTERRUPTIONS, Guard, as_python
from expertflow.forward import KnownForward
from expertflow.parts import (
    DEMAND,
    Eviction,
    Horizon,
    Order,
    Place,
    Placing,
    Prediction,
    Predictor,
    Selection,
)
from expertflow.units import SCORE_ONE
from expertflow.view import LOADING, RESIDENT, View

if TYPE_CHECKING:
    from expertflow.parts import Ints

NOTHING: tuple[int, ...] = ()
_INT64 = np.dtype(np.int64)
_NEW, _BUFFER = tuple.__new__, np.frombuffer
"""Bound once: these are called for every layer that is predicted."""
_FEW = 128
"""Up to how many numbers Python's integers compare faster than numpy's calls."""


def frozen(prediction: Prediction) -> Prediction:
    """The same prediction, with nothing in it that can be changed, or that leads to what was predicted elsewhere."""
    keys, scores, chances = prediction
    if chances is not None:
        # Over bytes nobody can make an array writable. Each hearer has one of its own, whose shape it may set.
        base: object = chances.base
        held = base if isinstance(base, bytes) and len(base) == chances.nbytes else chances.tobytes()
        chances = _BUFFER(held, _INT64)
    elif type(keys) is tuple and type(scores) is tuple:
        return prediction
    return _NEW(Prediction, (tuple(keys), tuple(scores), chances))


class _Odds:
    """Chances [length] in 2^-16 that a part answers."""

    def __init__(self, guard: Guard, hook: str, what: str, length: int) -> None:
        self._guard, self._hook, self._what, self._shape = guard, hook, what, (length,)
        ones = int.from_bytes((1).to_bytes(8, sys.byteorder) * length, sys.byteorder) if length <= _FEW else 0
        self._up_to, self._outside = ones * (2 * SCORE_ONE - 1 - SCORE_ONE), ones * (2**64 - 2 * SCORE_ONE)

    def _are_sound(self, held: bytes) -> bool:
        """Whether these are numbers in 0 … 2^16, each of eight bytes.

        Of a few all at once, as one long integer: none may have a bit from 2^17 on, and nor may it with 2^16 - 1 added,
        which then carries into no other.
        """
        if len(held) > 8 * _FEW:
            return int(np.frombuffer(held, np.uint64).max()) <= SCORE_ONE
        together = int.from_bytes(held, sys.byteorder)
        return not (together | together + self._up_to) & self._outside

    def read(self, value: object) -> Ints:
        """`value`, whole numbers of any width, as an array of int64 that nobody can change."""
        if type(value) is np.ndarray and value.dtype is _INT64 and value.shape == self._shape:
            held = value.tobytes()
        else:
            held = self._converted(value).tobytes()
        if not self._are_sound(held):
            found = np.frombuffer(held, _INT64)
            rule = f"answered {self._what} from {found.min()} to {found.max()}"
            raise self._guard.refused(self._hook, rule, f"chances are in 0 … {SCORE_ONE} (2^-16)")
        return _BUFFER(held, _INT64)

    def _converted(self, value: object) -> Ints:
        # An array of a class of its own may say of itself what it likes; what it holds is read.
        array = np.asarray(value) if isinstance(value, np.ndarray) else None
        if array is None or array.shape != self._shape or array.dtype.kind not in "iu":
            have = as_python(value) if array is None else f"{array.dtype} {list(array.shape)}"
            remedy = f"give an array of int64 [{self._shape[0]}]"
            raise self._guard.refused(self._hook, f"answered {have} for {self._what}", remedy)
        found: Ints = array.astype(np.int64, copy=False)
        return found


def _listed(keys: Sequence[int]) -> str:
    """The first of them, for a message."""
    return ", ".join([*map(as_python, keys[:6]), *(("…",) if len(keys) > 6 else ())])


class CheckedPredictor:
    """Around a predictor."""

    def __init__(self, part: Predictor, guard: Guard, view: View) -> None:
        self._guard, self._num_layers, self._num_experts = guard, view.num_layers, view.num_experts
        first = range(0, view.num_layers * view.num_experts, view.num_experts)
        self._keys_of = [frozenset(range(key, key + view.num_experts)) for key in first]
        self._predict = guard.bind("predict")
        self._forecast = guard.asked("forecast")
        self._chances = _Odds(guard, "predict", "chances", view.num_experts)
        self._forecasts = _Odds(guard, "forecast", "chances", view.num_layers * view.num_experts)

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        guard = self._guard
        try:
            found = self._predict(forward, layer, distance)
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            raise guard.raised("predict", error) from error
        if found is None:
            return None
        if type(found) is not Prediction and not (isinstance(found, tuple | list) and 2 <= len(found) <= 3):
            raise guard.refused("predict", f"answered {as_python(found)}", "give Prediction(keys, scores) or None")
        target = (layer + distance) % self._num_layers
        keys, scores = found[0], found[1]
        kind = type(keys)
        if kind is type(scores) and (kind is list or kind is tuple):
            keys, scores = tuple(keys), tuple(scores)
            # Whether all rules hold is found out at once, and only if not, which one does not.
            both, num = keys + scores, len(keys)
            if (
                countOf(map(type, both), int) != len(both)
                or len(scores) != num
                # As many as are left of the layer's: each is one of these, and once.
                or len(self._keys_of[target].intersection(keys)) != num
                or sorted(scores, reverse=True) != [*scores]
                or (num and not 0 <= scores[-1] <= scores[0] <= SCORE_ONE)
            ):
                keys, scores = self._each_checked(keys, scores, target)
        else:
            keys, scores = self._each_checked(keys, scores, target)
        chances = found[2] if len(found) == 3 else None
        return _NEW(Prediction, (keys, scores, None if chances is None else self._chances.read(chances)))

    def _each_checked(self, keys: object, scores: object, target: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Keys and scores of a layer, whole numbers of any type, as Python's."""
        guard, most = self._guard, self._num_experts
        keys_found = guard.keys("predict", "keys", keys, most)
        scores_found = guard.keys("predict", "scores", scores, most)
        self._check_keys(keys_found, target)
        if len(scores_found) != len(keys_found):
            raise guard.refused(
                "predict",
                f"answered {len(scores_found)} scores for {len(keys_found)} keys",
                "give a score for each key",
            )
        if scores_found:
            self._check_scores(scores_found)
        return keys_found, scores_found

    def _check_keys(self, keys: tuple[int, ...], target: int) -> None:
        allowed = self._keys_of[target]
        if len(set(keys)) != len(keys):
            double = next(key for place, key in enumerate(keys) if key in keys[:place])
            raise self._guard.refused("predict", f"scored key {double} twice", "score each key once")
        if not allowed.issuperset(keys):
            other = next(key for key in keys if key not in allowed)
            raise self._guard.refused(
                "predict",
                f"was asked for layer {target} and scored key {as_python(other)}, which is of another",
                "keys are layer * num_experts + expert",
            )

    def _check_scores(self, scores: tuple[int, ...]) -> None:
        if not 0 <= scores[-1] <= scores[0] <= SCORE_ONE or sorted(scores, reverse=True) != list(scores):
            wrong = next((one for one in scores if not 0 <= one <= SCORE_ONE), None)
            rule = (
                f"answered score {as_python(wrong)}" if wrong is not None else "answered scores that are not best first"
            )
            raise self._guard.refused("predict", rule, f"scores fall from at most {SCORE_ONE} (2^-16) to at least 0")

    def forecast(self) -> Ints | None:
        found = self._forecast()
        if found is None:
            return None
        return self._forecasts.read(found)


class CheckedHorizon:
    """Around a horizon."""

    def __init__(self, part: Horizon, guard: Guard, view: View) -> None:
        self._part, self._guard, self._limit = part, guard, view.num_layers - 1
        self._distances, self.overfetched = guard.asked("distances"), guard.told("overfetched")
        self._last: tuple[int, ...] = ()
        """Distances that were sound."""

    def distances(self) -> Sequence[int]:
        guard, limit = self._guard, self._limit
        answer: object = self._distances()
        if answer is self._last:  # a tuple of whole numbers, which is what it was
            return self._last
        found = guard.keys("distances", "distances", answer, max(limit, 0))
        if found == self._last:
            return found
        before = 0
        for distance in found:
            if not before < distance <= limit:
                rule = f"answered {as_python(found)}"
                raise guard.refused("distances", rule, f"distances are whole numbers that rise, each in 1 … {limit}")
            before = distance
        self._last = found
        return found

    def expect(self, num_expected: float) -> None:
        """Set its `num_expected`."""
        try:
            self._part.num_expected = num_expected
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            raise self._guard.raised("num_expected", error) from error


class CheckedSelection:
    """Around a selection."""

    def __init__(self, part: Selection, guard: Guard) -> None:
        self._guard, self._select = guard, guard.bind("select")

    def select(self, prediction: Prediction, forward: KnownForward) -> Sequence[int]:
        guard = self._guard
        known = frozen(prediction)
        try:
            found = self._select(known, forward)
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            raise guard.raised("select", error) from error
        keys = guard.keys("select", "keys", found, 2 * len(known.keys) + 8)
        if keys == known.keys[: len(keys)]:
            return keys
        left = set(known.keys)
        for key in keys:
            if key not in left:
                how = "twice" if key in known.keys else "which was not predicted"
                rule = f"selected key {as_python(key)}{' ' if how == 'twice' else ', '}{how}"
                raise guard.refused("select", rule, "select a subset of the predicted keys, each once")
            left.remove(key)
        return keys


class CheckedEviction:
    """Around an eviction."""

    def __init__(self, part: Eviction, guard: Guard, view: View, by_layer: bool) -> None:
        self._guard, self._view, self._residency, self._by_layer = guard, view, view.residency, by_layer
        self._num_experts, self._num_keys = view.num_experts, len(view.residency)
        self._victim, self.admitted = guard.bind("victim"), guard.told("admitted")
        self._touched, self._foreseen, self._predicted = map(guard.told, ("touched", "foreseen", "predicted"))
        self._release = guard.asked("release")

    def touched(self, keys: Sequence[int]) -> None:
        self._touched(tuple(keys))

    def predicted(self, keys: Sequence[int], layer: int, prediction: Prediction) -> None:
        self._predicted(tuple(keys), layer, frozen(prediction))

    def foreseen(self, forecast: Ints) -> None:
        # A copy leads to no other array: the predictor may have looked ahead of what is known.
        copied = forecast.copy()
        copied.setflags(write=False)
        self._foreseen(copied)

    def victim(self, key: int, cause: int) -> int | None:
        guard = self._guard
        try:
            found = self._victim(key, cause)
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            raise guard.raised("victim", error) from error
        if found is None:
            if cause == DEMAND:
                self._check_none(key)
            return None
        victim: int = found if type(found) is int else guard.whole("victim", found)
        self._check("victim", victim)
        if victim in self._view.pinned:
            rule = f"answered key {victim}, which is pinned: the current layer demands it"
            raise guard.refused("victim", rule, "answer none of view.pinned")
        if self._by_layer and victim // self._num_experts != key // self._num_experts:
            rule = f"answered key {victim} for key {key}, which is of another layer, under scope=layer"
            raise guard.refused("victim", rule, "answer a key of the same layer")
        return victim

    def _check(self, hook: str, key: int) -> None:
        """`key` must be resident."""
        if not 0 <= key < self._num_keys:
            raise self._guard.refused(hook, f"answered {as_python(key)}, which is no key", "answer a resident key")
        state = self._residency[key]
        if state != RESIDENT:
            how = "is still being copied" if state == LOADING else "is not resident"
            raise self._guard.refused(hook, f"answered key {key}, which {how}", "answer a resident key")

    def _check_none(self, key: int) -> None:
        """None for the demand of `key` says that nothing can give way."""
        first, stop = 0, self._num_keys
        if self._by_layer:
            first = key // self._num_experts * self._num_experts
            stop = first + self._num_experts
        residency, pinned = self._residency, self._view.pinned
        num_resident = bytes(residency[first:stop]).count(RESIDENT)
        if num_resident > sum(1 for one in pinned if first <= one < stop and residency[one] == RESIDENT):
            free = next(one for one in range(first, stop) if residency[one] == RESIDENT and one not in pinned)
            rule = f"answered None to the demand of key {key}, though key {free} can give way"
            raise self._guard.refused("victim", rule, "refuse prefetches only")

    def release(self, layer: int, keys: Sequence[int]) -> Sequence[int]:
        guard = self._guard
        found = guard.drawn("release", "keys", self._release(layer, tuple(keys)), self._num_keys)
        if not found:
            return NOTHING
        pinned = self._view.pinned
        seen: set[int] = set()
        for key in found:
            self._check("release", key)
            if key in pinned:
                raise guard.refused("release", f"answered key {key}, which is pinned", "give up none of view.pinned")
            if key in seen:
                raise guard.refused("release", f"answered key {key} twice", "give up each key once")
            seen.add(key)
        return found


class CheckedOrder:
    """Around an order."""

    def __init__(self, part: Order, guard: Guard) -> None:
        self._guard, self._arrange = guard, guard.asked("arrange")

    def arrange(self, keys: Sequence[int]) -> Sequence[int]:
        given = tuple(keys)
        answer: object = self._arrange(given)
        if answer is given:
            return given
        found = self._guard.keys("arrange", "keys", answer, 2 * len(given) + 8)
        if sorted(found) != sorted(given):
            raise self._guard.refused("arrange", self._how(given, found), "answer exactly the keys given, in any order")
        return found

    def _how(self, given: tuple[int, ...], found: tuple[int, ...]) -> str:
        """How the answer differs from a permutation."""
        missing = [key for key in given if key not in found]
        added = [key for key in found if key not in given]
        double = sorted({key for key in found if found.count(key) > 1})
        told = (("leaves out", missing), ("adds", added), ("doubles", double))
        return " and ".join(
            f"{verb} {'key' if len(keys) == 1 else 'keys'} {_listed(keys)}" for verb, keys in told if keys
        )


class CheckedPlace:
    """Around a place."""

    def __init__(self, part: Place, guard: Guard, view: View) -> None:
        self._guard, self._num_keys = guard, len(view.residency)
        self._on_host, self._for_later, self._stays_on_host = map(
            guard.asked, ("on_host", "for_later", "stays_on_host")
        )
        self._stays: frozenset[int] = frozenset()

    def on_host(self, placing: Placing, forward: KnownForward) -> Sequence[int]:
        costs = placing.costs._replace(gpu_ns=tuple(placing.costs.gpu_ns), host_ns=tuple(placing.costs.host_ns))
        missing, tokens = tuple(placing.missing), tuple(placing.tokens)
        given = Placing(placing.layer, tuple(placing.resident), tuple(placing.in_flight), missing, tokens, costs)
        keys = self._subset("on_host", self._on_host(given, forward), missing, "is not missing")
        if self._stays:
            left_out = next((key for key in missing if key in self._stays and key not in keys), None)
            if left_out is not None:
                rule = f"leaves key {left_out} to the GPU, which stays on the host by stays_on_host"
                raise self._guard.refused("on_host", rule, "place it on the host, or do not let it stay there")
        return keys

    def for_later(self, keys: Sequence[int], queued: Sequence[int]) -> Sequence[int]:
        given = tuple(keys)
        return self._subset("for_later", self._for_later(given, tuple(queued)), given, "was not placed on the host")

    def stays_on_host(self) -> Sequence[int]:
        guard, found = self._guard, self._stays_on_host()
        keys = guard.drawn("stays_on_host", "keys", found, self._num_keys)
        wrong = next((key for key in keys if not 0 <= key < self._num_keys), None)
        if wrong is not None:
            raise guard.refused("stays_on_host", f"answered {as_python(wrong)}, which is no key", "answer keys")
        self._stays = frozenset(keys)
        return keys

    def _subset(self, hook: str, found: object, given: tuple[int, ...], not_there: str) -> tuple[int, ...]:
        """`found`, whose keys must be among `given`, each once."""
        keys = self._guard.keys(hook, "keys", found, 2 * len(given) + 8)
        left = set(given)
        for key in keys:
            if key not in left:
                rule = f"answered key {as_python(key)}{' twice' if key in given else f', which {not_there}'}"
                raise self._guard.refused(hook, rule, "answer a subset of the keys given, each once")
            left.remove(key)
        return keys
