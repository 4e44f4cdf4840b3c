"""Perfect prediction: the trace's own future. A reference for what better prediction could bring."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.parts import Prediction, Predictor
from expertflow.units import SCORE_ONE
from expertflow.view import View


class OraclePredictor(Predictor):
    """Every expert that will be demanded, with certainty, and no other.

    forecast: also say, after each forward, when each expert is used next (2^-16 times the inverse of the forwards
    until then), for evictions that ask.
    """

    uses_future = True

    def __init__(self, forecast: bool = True) -> None:
        self.forecasts = forecast

    def start(self, view: View, future: Future | None) -> None:
        assert future is not None
        self.future = future
        self.num_layers = view.num_layers
        self.next_use = np.array(future.first_uses(), np.float64)
        self.num_events = 0
        """How many events are over."""

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        keys = self.future.demand(forward.index * self.num_layers + layer + distance)
        return Prediction(keys, [SCORE_ONE] * len(keys)) if keys else None

    def end_forward(self, forward: KnownForward) -> None:
        if not self.forecasts:
            return
        first = forward.index * self.num_layers
        for event in range(first, first + self.num_layers):
            self.next_use[self.future.demand(event)] = self.future.next_uses(event)
        self.num_events = first + self.num_layers

    def forecast(self) -> npt.NDArray[np.int64] | None:
        if not self.num_events:
            return None
        ahead = (self.next_use - self.num_events) / self.num_layers
        return np.rint(SCORE_ONE / (1.0 + ahead)).astype(np.int64)
