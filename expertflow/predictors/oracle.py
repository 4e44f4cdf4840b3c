"""Perfect prediction: the trace's own future. A reference for what better prediction could bring."""

from __future__ import annotations

import numpy as np

from expertflow.forward import Forward
from expertflow.future import Future
from expertflow.parts import SCORE_ONE, Predictor, Scores
from expertflow.view import View


class OraclePredictor(Predictor):
    """Every expert that will be demanded, with certainty, and no other.

    outlook: also say, after each forward, when each expert is used next (`view.outlook`: 2^-16 times the inverse of the
    forwards until then), for evictions that ask.
    """

    uses_future = True

    def __init__(self, outlook: bool = True) -> None:
        self.outlook = outlook

    def start(self, view: View, future: Future | None) -> None:
        assert future is not None
        self.future = future
        self.view = view
        self.num_layers = view.num_layers
        self.next_use = np.array(future.first_uses(), np.float64)

    def predict(self, forward: Forward, layer: int, distance: int) -> Scores | None:
        keys = self.future.demand(forward.index * self.num_layers + layer + distance)
        return (keys, [SCORE_ONE] * len(keys)) if keys else None

    def end_forward(self, forward: Forward) -> None:
        if not self.outlook:
            return
        first = forward.index * self.num_layers
        for event in range(first, first + self.num_layers):
            self.next_use[self.future.demand(event)] = self.future.next_uses(event)
        ahead = (self.next_use - (first + self.num_layers)) / self.num_layers
        self.view.outlook = np.rint(SCORE_ONE / (1.0 + ahead)).astype(np.int64)
