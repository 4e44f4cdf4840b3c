"""No prediction: an ordinary policy that prefetches nothing."""

from __future__ import annotations

from expertflow.forward import Forward
from expertflow.parts import Predictor, Scores


class NoPredictor(Predictor):
    """Predicts nothing; the runtime then never asks for a decision."""

    def predict(self, forward: Forward, layer: int, distance: int) -> Scores | None:
        return None
