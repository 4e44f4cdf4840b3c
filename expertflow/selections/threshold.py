"""Every expert that is likely enough, however many or few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from expertflow.forward import KnownForward
from expertflow.keys import Rule
from expertflow.parts import Prediction, Selection
from expertflow.units import SCORE_ONE


class Threshold(Selection):
    """Experts with a probability of at least `probability`; at most `at_most` (0 = no limit)."""

    def __init__(
        self,
        probability: Annotated[float, Rule(0, 1, above=True, about="from which an expert is prefetched")] = 0.5,
        at_most: Annotated[int, Rule(0, 65_535, unit="experts", about="of a layer, 0 = no limit")] = 0,
    ) -> None:
        if not 0 < probability <= 1:
            raise ValueError(f"Threshold probability={probability} must be in (0, 1]")
        if at_most < 0:
            raise ValueError(f"Threshold at_most={at_most} must be 0 (no limit) or more")
        self.limit = int(probability * SCORE_ONE)
        self.at_most = at_most

    def select(self, prediction: Prediction, forward: KnownForward) -> Sequence[int]:
        count = 0
        for value in prediction.scores:
            if value < self.limit:
                break
            count += 1
        if self.at_most:
            count = min(count, self.at_most)
        return prediction.keys[:count]
