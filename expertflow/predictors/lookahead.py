"""The pre-gate recorded in the trace: a later layer's own router applied to the current layer's hidden state."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np

from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import Prediction, Predictor
from expertflow.predictors.ranking import rank_scores
from expertflow.units import SCORE_ONE
from expertflow.view import View


class LookaheadPredictor(Predictor):
    """An expert's chance that any token of the forward picks it, from the recorded chance per token.

    A recording reaches D layers ahead and ends at the last layer: beyond, there is no prediction. `refreshes`:
    nearer recordings replace farther ones.
    """

    needs_pregate: ClassVar[bool] = True

    def __init__(
        self, refreshes: Annotated[bool, Rule(about="nearer predictions replace farther ones")] = True
    ) -> None:
        self.refreshes = refreshes

    def start(self, view: View, future: Future | None) -> None:
        self.num_layers, self.num_experts = view.num_layers, view.num_experts

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        if layer + distance >= self.num_layers or forward.recorded is None:
            return None
        recorded = forward.recorded.lookahead(forward.rows, layer)
        if recorded is None or distance > recorded.shape[1]:
            return None
        chance = recorded[:, distance - 1].astype(np.float64)
        if np.isnan(chance).any():
            return None
        union = 1.0 - np.prod(1.0 - chance, axis=0)
        scores = np.rint(union * SCORE_ONE).astype(np.int64)[None]
        keys, values = rank_scores(scores, (layer + distance) * self.num_experts, self.num_experts)
        return Prediction(keys[0].tolist(), values[0].tolist())
