"""Where the answers of a policy's parts come in: each question is asked through `Answers`, and through nothing else.

What a class of this package answers is taken as it is: its own bound method, at no cost. Around the answer of any other
class stands a check. A check on one more question is one more method in `expertflow.checks` (docs/contract.md lists who
asks what, and the rules). A decision at once is of this package's classes alone and is asked by the policy itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from expertflow.boundary import Guard
from expertflow.checks import (
    CheckedEviction,
    CheckedHorizon,
    CheckedOrder,
    CheckedPlace,
    CheckedPredictor,
    CheckedSelection,
)
from expertflow.parts import Eviction, Horizon, Order, Place, Predictor, Selection
from expertflow.view import View


class Parts(NamedTuple):
    """The six parts of a policy."""

    predictor: Predictor
    horizon: Horizon
    selection: Selection
    eviction: Eviction
    order: Order
    place: Place


class Guards(NamedTuple):
    """What stands around each of them; None: nothing, it is taken as it is."""

    predictor: Guard | None
    horizon: Guard | None
    selection: Guard | None
    eviction: Guard | None
    order: Guard | None
    place: Guard | None


class Answers:
    """The questions of one policy, bound to its parts when these have started.

    Attributes are called like the hooks of `expertflow.parts` that they are named after. What they answer has been
    checked; `PartError` names the class, the rule it has broken, forward and layer.
    view: what is true of the run. by_layer: the eviction's scope is `layer`.
    """

    def __init__(self, parts: Parts, guards: Guards, view: View, by_layer: bool) -> None:
        self._horizon = parts.horizon
        self._bind_prediction(parts, guards, view)
        self._bind_eviction(parts.eviction, guards.eviction, view, by_layer)
        order = parts.order if guards.order is None else CheckedOrder(parts.order, guards.order)
        self.arrange = order.arrange
        place = parts.place if guards.place is None else CheckedPlace(parts.place, guards.place, view)
        self.on_host, self.for_later, self.stays_on_host = place.on_host, place.for_later, place.stays_on_host

    def _bind_prediction(self, parts: Parts, guards: Guards, view: View) -> None:
        predictor: Predictor | CheckedPredictor = parts.predictor
        if guards.predictor is not None:
            predictor = CheckedPredictor(parts.predictor, guards.predictor, view)
        self.predict, self.forecast = predictor.predict, predictor.forecast
        horizon: Horizon | CheckedHorizon = parts.horizon
        self._expects: Callable[[float], None] | None = None
        if guards.horizon is not None:
            checked = CheckedHorizon(parts.horizon, guards.horizon, view)
            horizon, self._expects = checked, checked.expect
        self.distances, self.overfetched = horizon.distances, horizon.overfetched
        selection: Selection | CheckedSelection = parts.selection
        if guards.selection is not None:
            selection = CheckedSelection(parts.selection, guards.selection)
        self.select = selection.select

    def _bind_eviction(self, part: Eviction, guard: Guard | None, view: View, by_layer: bool) -> None:
        eviction = part if guard is None else CheckedEviction(part, guard, view, by_layer)
        self.touched, self.admitted, self.victim = eviction.touched, eviction.admitted, eviction.victim
        self.release, self.predicted, self.foreseen = eviction.release, eviction.predicted, eviction.foreseen

    def expect(self, num_expected: float) -> None:
        """Tell the horizon N_e."""
        if self._expects is None:
            self._horizon.num_expected = num_expected
        else:
            self._expects(num_expected)
