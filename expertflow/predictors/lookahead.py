"""The pre-gate recorded in the trace: a later layer's own router applied to the current layer's hidden state."""

from __future__ import annotations

import numpy as np

from expertflow.forward import Forward
from expertflow.future import Future
from expertflow.parts import SCORE_ONE, Predictor, Scores
from expertflow.predictors.ranking import rank_scores
from expertflow.view import View


class LookaheadPredictor(Predictor):
    """Softmax of the recorded scores per token; an expert's chance that any token of the forward picks it.

    A recording reaches D layers ahead and ends at the last layer: beyond, there is no prediction. `refreshes`:
    nearer recordings replace farther ones.
    """

    def __init__(self, refreshes: bool = True) -> None:
        self.refreshes = refreshes

    def start(self, view: View, future: Future | None) -> None:
        self.num_layers, self.num_experts, self.top_k = view.num_layers, view.num_experts, view.top_k

    def predict(self, forward: Forward, layer: int, distance: int) -> Scores | None:
        if layer + distance >= self.num_layers or forward.recorded is None:
            return None
        recorded = forward.recorded.lookahead(forward.rows, layer)
        if recorded is None or distance > recorded.shape[1]:
            return None
        logits = recorded[:, distance - 1].astype(np.float64)
        if np.isnan(logits).any():
            return None
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        chance = np.minimum(self.top_k * weights / weights.sum(axis=1, keepdims=True), 1.0)
        union = 1.0 - np.prod(1.0 - chance, axis=0)
        scores = np.rint(union * SCORE_ONE).astype(np.int64)[None]
        keys, values = rank_scores(scores, (layer + distance) * self.num_experts, self.num_experts)
        return keys[0].tolist(), values[0].tolist()
