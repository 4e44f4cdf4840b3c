"""The pre-gate plus a forest's correction (arXiv 2510.26730): the hybrid predictor in the form that the paper names.

The forest is fitted beforehand (python -m traces fit-predictor TRACE OUT kind=forest). It corrects the recorded
pre-gate, calibrated. For the next forward's first layers, where no pre-gate reaches, what they chose in this forward
stands in for it. A prediction is a hint: what runs is what the router chooses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt

from expertflow.features import Chances, ForwardFeatures
from expertflow.forest import Forest, compiled
from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import Effort, Prediction, Predictor
from expertflow.predictors.ranking import RowRanking
from expertflow.units import SCORE_ONE
from expertflow.view import View


class ForestPredictor(Predictor):
    """Distances 1 … D of the fitted forest. A distance, or a forward of more tokens, that it was not fitted to gets
    the pre-gate's own scores; None where there is no pre-gate either.

    fitted: the arrays of `Forest`; None, where there is no forest, leaves the pre-gate alone. cache_size: predictions
    kept for features that come again (0 = none); num_hits counts these. refreshes: nearer predictions replace farther
    ones.
    """

    needs_pregate: ClassVar[bool] = True
    fitted_kind: ClassVar[str] = "forest"
    effort: Effort = Effort(1.0, 0.4)

    def __init__(
        self,
        fitted: Annotated[
            Mapping[str, npt.NDArray[np.generic]] | None,
            Rule(
                extra="auto or a file of python -m traces fit-predictor",
                about="auto: what is shipped",
            ),
        ],
        cache_size: Annotated[int, Rule(0, 1_000_000, about="predictions kept, 0 = none")] = 4096,
        refreshes: Annotated[bool, Rule(about="nearer predictions replace farther ones")] = False,
    ) -> None:
        if cache_size < 0:
            raise ValueError(f"ForestPredictor cache_size={cache_size} must be 0 (no cache) or more")
        self.fitted = fitted
        self.cache_size = cache_size
        self.refreshes = refreshes

    def start(self, view: View, future: Future | None) -> None:
        self.L, self.E = view.num_layers, view.num_experts
        self.forest = None if self.fitted is None else Forest(self.fitted, self.L, self.E)
        # Compiled here, not at the first decision.
        self.evaluate = None if self.forest is None else compiled()
        self.features = ForwardFeatures(self.L, self.E)
        self.ranking = RowRanking(self.E)
        self.cache: OrderedDict[bytes, Prediction] = OrderedDict()
        self.num_predictions = self.num_hits = 0
        self.scores = np.empty(self.E, np.int64)

    def begin_forward(self, forward: KnownForward) -> None:
        self.features.begin(forward)

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        forest, features = self.forest, self.features
        target = layer + distance
        inside = target < self.L
        chance = features.pregate(forward, layer, distance) if inside else None
        if inside and chance is None:
            return None
        if forest is None or distance > forest.D or forward.num_tokens > forest.max_tokens:
            return self._pregate_alone(chance, target)
        features.know(forward, layer)
        vector = features.fill(chance, layer, distance)
        self.num_predictions += 1
        if not self.cache_size:
            return self._evaluate(vector, target, distance)
        # Layer and distance are among the features.
        key = vector.tobytes()
        found = self.cache.get(key)
        if found is not None:
            self.num_hits += 1
            self.cache.move_to_end(key)
            return found
        found = self.cache[key] = self._evaluate(vector, target, distance)
        if len(self.cache) > self.cache_size:
            self.cache.popitem(last=False)
        return found

    def _evaluate(self, vector: npt.NDArray[np.int16], target: int, distance: int) -> Prediction:
        forest, evaluate = self.forest, self.evaluate
        assert forest is not None
        assert evaluate is not None
        target %= self.L
        evaluate(
            forest.nodes, forest.roots[target], forest.leaves, forest.tables[distance - 1, target], vector, self.scores
        )
        return self.ranking.rank(self.scores, target * self.E, self.E)

    def _pregate_alone(self, chance: Chances | None, target: int) -> Prediction | None:
        if chance is None:
            return None
        scores = np.rint(chance.astype(np.float64) * SCORE_ONE).astype(np.int64)
        return self.ranking.rank(scores, target * self.E, self.E)

    def end_forward(self, forward: KnownForward) -> None:
        self.features.know(forward, self.L - 1)
