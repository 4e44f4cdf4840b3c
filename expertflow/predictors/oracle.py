"""Perfect prediction: the trace's own future. A reference for what better prediction could bring."""

from __future__ import annotations

from expertflow.forward import Forward
from expertflow.future import Future
from expertflow.parts import SCORE_ONE, Predictor, Scores
from expertflow.view import View


class OraclePredictor(Predictor):
    """Every expert that will be demanded, with certainty, and no other."""

    uses_future = True

    def start(self, view: View, future: Future | None) -> None:
        assert future is not None
        self.future = future
        self.num_layers = view.num_layers

    def predict(self, forward: Forward, layer: int, distance: int) -> Scores | None:
        keys = self.future.demand(forward.index * self.num_layers + layer + distance)
        return (keys, [SCORE_ONE] * len(keys)) if keys else None
