"""What hostile parts are made of: honest parts of a user's own, and hooks that break a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from expertflow.evictions.lru import LRU
from expertflow.future import Future
from expertflow.parts import Horizon, Order, Part, Prediction, Predictor, Selection, Worths
from expertflow.units import SCORE_ONE
from expertflow.view import RESIDENT, View

# -- honest parts, of a user's own -----------------------------------------------------------------------------------


class OwnLRU(LRU):
    """Nothing is wrong with it, but that it is not of the package."""


class OwnOrder(Order):
    """Touch order."""

    def arrange(self, keys: Sequence[int]) -> Sequence[int]:
        return keys


class OwnHorizon(Horizon):
    """One layer ahead; takes what a configuration gives others."""

    def __init__(self, **others: Any) -> None:
        """Whatever is told."""

    def distances(self) -> Sequence[int]:
        return (1,)


class OwnSelection(Selection):
    """All that is predicted."""

    def __init__(self, **others: Any) -> None:
        """Whatever is told."""

    def select(self, prediction: Prediction, forward: Any) -> Sequence[int]:
        return prediction.keys


class OwnPredictor(Predictor):
    """The first three experts of a layer."""

    def __init__(self, **others: Any) -> None:
        """Whatever is told."""

    def start(self, view: View, future: Future | None) -> None:
        self.view, self.future, self.num_asked, self.saw = view, future, 0, 0

    def _first(self, layer: int, distance: int) -> int:
        return (layer + distance) % self.view.num_layers * self.view.num_experts

    def predict(self, forward: Any, layer: int, distance: int) -> Any:
        first = self._first(layer, distance)
        return Prediction([first, first + 1, first + 2], [3000, 2000, 1000])


class Sees(OwnPredictor):
    """Counts what it sees that is not known yet."""


class Chances(OwnPredictor):
    """Says of every expert how likely it is."""

    def predict(self, forward: Any, layer: int, distance: int) -> Any:
        keys, scores, _ = super().predict(forward, layer, distance)
        chances = np.zeros((4, self.view.num_experts), np.int64)
        chances[0, :3] = scores
        return Prediction(keys, scores, chances[0])


class Forecasts(OwnPredictor):
    """Forecasts the same for all."""

    def forecast(self) -> Any:
        return np.full(self.view.num_layers * self.view.num_experts, 7, np.int64)


class AtOnce(OwnPredictor):
    """Decides at once, and wants nothing."""

    at_once = True
    refreshes = True

    def fuse(self, thresholds: Any, worths: Any) -> Any:
        return True

    def step(self, forward: Any, layer: int, reach: int) -> Any:
        return [], 0, 0, False


class Sure(OwnPredictor):
    """Whatever is resident."""

    def predict(self, forward: Any, layer: int, distance: int) -> Any:
        first, there = self._first(layer, distance), self.view.residency
        keys = [key for key in range(first, first + self.view.num_experts) if there[key] == RESIDENT]
        return Prediction(keys, [SCORE_ONE] * len(keys))


class Oracle(OwnPredictor):
    """Reads the future, without a word."""

    def predict(self, forward: Any, layer: int, distance: int) -> Any:
        assert self.future is not None
        keys = self.future.demand(forward.index * self.view.num_layers + layer + distance)
        return (keys, [1] * len(keys)) if keys else None


class Untold(Exception):
    """Whoever asks what it says ends the process."""

    def __str__(self) -> str:
        raise SystemExit(0)


# -- what hooks do ---------------------------------------------------------------------------------------------------


def raises(error: BaseException) -> Callable[..., Any]:
    """A hook that raises."""

    def hook(self: Any, *values: Any) -> Any:
        raise error

    return hook


def answers(value: Any) -> Callable[..., Any]:
    """A hook that answers the same, whatever is asked."""
    return lambda self, *values: value


def state(wanted: int, *, pinned: bool = False) -> Callable[..., Any]:
    """A victim in that state; if there is none, what LRU says."""

    def victim(self: Any, key: int, cause: int) -> Any:
        residency = self.view.residency
        keys = self.view.pinned if pinned else range(len(residency))
        return next((one for one in keys if residency[one] == wanted), LRU.victim(self, key, cause))

    return victim


def of_lru(change: Callable[[int], Any]) -> Callable[..., Any]:
    """LRU's victim, made something else."""

    def victim(self: Any, key: int, cause: int) -> Any:
        found = LRU.victim(self, key, cause)
        return None if found is None else change(found)

    return victim


def other_layer(self: Any, key: int, cause: int) -> Any:
    """A victim of another layer than `key`."""
    view = self.view
    free = (one for one in range(len(view.residency)) if view.residency[one] == 2 and one not in view.pinned)
    return next((one for one in free if one // view.num_experts != key // view.num_experts), None)


def stale(self: Any, key: int, cause: int) -> Any:
    """Every other victim is the one before."""
    last, self.last = getattr(self, "last", None), None
    if last is not None:
        return last
    self.last = LRU.victim(self, key, cause)
    return self.last


def late(hook: str, base: type[Part], attribute: str, value: Any) -> Callable[..., Any]:
    """A hook that also declares something else from now on."""

    def told(self: Any, *values: Any) -> Any:
        setattr(self, attribute, value)
        return getattr(base, hook)(self, *values)

    return told


def predicts(
    keys: Callable[[int], Any] = lambda first: [first], scores: Callable[[int], Any] = lambda first: [1], *more: Any
) -> Callable[..., Any]:
    """A prediction made of the first key of its layer."""

    def predict(self: Any, forward: Any, layer: int, distance: int) -> Any:
        first = self._first(layer, distance)
        return (keys(first), scores(first), *more)

    return predict


def looks(look: Callable[..., Any]) -> Callable[..., Any]:
    """A prediction of what `look` finds in forward, layer and view, keys that it should not know."""

    def predict(self: Any, forward: Any, layer: int, distance: int) -> Any:
        # Within the forward: what another one demands no part can ask for.
        if layer + distance >= self.view.num_layers:
            return None
        found = look(forward, layer + distance, self.view)
        return None if found is None else (list(found), [1] * len(found))

    return predict


def sees(look: Callable[..., int], hook: str = "begin_forward") -> dict[str, Any]:
    """A hook that adds up what `look` finds in what it is given."""

    def told(self: Any, forward: Any, *layer: int) -> None:
        self.saw += look(forward)

    return {hook: told}


def takes_announced(self: Any) -> Any:
    """Wishes to be shown forwards before they run."""
    part = self

    class Taker:
        code = ()

        def prepare(self, forwards: Any) -> None:
            part.saw += len(forwards)

        def prepare_all(self, forwards: Any, num_forwards: int, kept: Any, name: str) -> bool:
            part.saw += num_forwards
            return True

    return Taker()


def recurses(self: Any, *values: Any) -> Any:
    """Never comes back."""
    return recurses(self, *values)


def counts(value: Any) -> Callable[..., Any]:
    """A hook that counts how often it is asked, and answers the same."""

    def hook(self: Any, *values: Any) -> Any:
        self.saw += 1
        return value

    return hook


def takes_worths(self: Any, thresholds: Any, worths: Worths) -> bool:
    """Keeps the arrays of the eviction."""
    self.saw += 1
    self.worths_of_other = worths
    return False


def frees_pinned(self: Any, forward: Any, layer: int) -> None:
    """Makes what the layer demands the next to give way."""
    if self.saw:
        self.worths_of_other.held[list(self.view.pinned)] = -5


def append(keys: Any) -> None:
    """Make a list longer, and nothing of the rest."""
    keys.append(0)
