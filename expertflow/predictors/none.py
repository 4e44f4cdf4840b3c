"""No prediction: an ordinary policy that prefetches nothing."""

from __future__ import annotations

from typing import ClassVar

from expertflow.forward import KnownForward
from expertflow.parts import Prediction, Predictor


class NoPredictor(Predictor):
    """Predicts nothing; the runtime then never asks for a decision."""

    predicts: ClassVar[bool] = False

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        return None
