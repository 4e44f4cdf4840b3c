"""Experts until a prescribed share of the probability is covered: N_e of arXiv 2510.26730, section on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import Prediction, Selection
from expertflow.view import View


class Mass(Selection):
    """Best first until `mass` of the summed scores; at least top_k, at most `at_most` (0 = all experts)."""

    def __init__(
        self,
        mass: Annotated[float, Rule(0, 1, above=True, about="of the summed chances that is prefetched")] = 0.9,
        at_most: Annotated[int, Rule(0, 65_535, unit="experts", about="of a layer, 0 = no limit")] = 0,
    ) -> None:
        if not 0 < mass <= 1:
            raise ValueError(f"Mass mass={mass} must be in (0, 1]")
        if at_most < 0:
            raise ValueError(f"Mass at_most={at_most} must be 0 (no limit) or more")
        self.mass = mass
        self.at_most = at_most

    def start(self, view: View, future: Future | None) -> None:
        self.top_k = view.top_k

    def select(self, prediction: Prediction, forward: KnownForward) -> Sequence[int]:
        values = prediction.scores
        needed = int(self.mass * sum(values))
        count = covered = 0
        for value in values:
            if covered >= needed:
                break
            covered += value
            count += 1
        count = max(count, self.top_k)
        if self.at_most:
            count = min(count, self.at_most)
        return prediction.keys[:count]
