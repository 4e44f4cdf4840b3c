"""A predictor of stated accuracy: recall p(d) = a·e^(−b·d) + c at distance d, wrong guesses drawn at random.

The form is the one fitted in arXiv 2510.26730 to accuracy against step. Every truly demanded expert is kept
with probability p(d), independently, else replaced by another expert of the layer: uniformly or by the
popularity seen so far. Draws depend on (seed, event, distance) alone, never on timing.
"""

from __future__ import annotations

from math import exp
from typing import Annotated

import numpy as np

from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import Prediction, Predictor
from expertflow.units import SCORE_ONE
from expertflow.view import View


class NoisyOraclePredictor(Predictor):
    """a, b, c: recall against distance. wrong: `uniform` or `popularity`."""

    uses_future = True

    def __init__(
        self,
        a: Annotated[float, Rule(-1e6, 1e6, about="recall at distance d is a exp(-b d) + c, within [0, 1]")] = 0.3,
        b: Annotated[float, Rule(0, 1e6, about="see a")] = 0.5,
        c: Annotated[float, Rule(0, 1, about="see a")] = 0.6,
        wrong: Annotated[str, Rule(choices=("uniform", "popularity"), about="how a wrong expert is drawn")] = "uniform",
        seed: Annotated[int, Rule(0, 2**63 - 1, about="null in a configuration = the run's")] = 0,
    ) -> None:
        if wrong not in ("uniform", "popularity"):
            raise ValueError(f"NoisyOraclePredictor wrong={wrong!r} is unknown; choose uniform or popularity")
        if b < 0 or not 0 <= c <= 1 or not 0 <= a * exp(-b) + c <= 1:
            raise ValueError(f"NoisyOraclePredictor a={a} b={b} c={c}: recall a·e^(−b·d)+c must stay in [0, 1], b ≥ 0")
        if seed < 0:
            raise ValueError(f"NoisyOraclePredictor seed={seed} must be at least 0")
        self.a, self.b, self.c = a, b, c
        self.wrong = wrong
        self.seed = seed

    def start(self, view: View, future: Future | None) -> None:
        assert future is not None
        self.future = future
        self.num_layers, self.num_experts = view.num_layers, view.num_experts
        self.popularity = np.ones((view.num_layers, view.num_experts))

    def _recall(self, distance: int) -> float:
        """p(d) = a·e^(−b·d) + c."""
        return self.a * exp(-self.b * distance) + self.c

    def end_forward(self, forward: KnownForward) -> None:
        if self.wrong == "popularity":
            for layer, keys in enumerate(forward.demands):
                for key in keys:
                    self.popularity[layer, key - layer * self.num_experts] += 1

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        event = forward.index * self.num_layers + layer + distance
        truth = self.future.demand(event)
        if not truth:
            return None
        rng = np.random.Generator(np.random.PCG64([self.seed, event, distance]))
        recall = self._recall(distance)
        kept = rng.random(len(truth)) < recall
        first = (event % self.num_layers) * self.num_experts
        chosen = {key for key, keep in zip(truth, kept, strict=True) if keep}
        others = [key for key in range(first, first + self.num_experts) if key not in truth]
        num_wrong = min(len(truth) - len(chosen), len(others))
        if num_wrong:
            weights = self.popularity[event % self.num_layers][[key - first for key in others]]
            # Largest of log(u)/w first: weighted draws without replacement (Efraimidis and Spirakis 2006).
            draws = np.log(rng.random(len(others))) / (weights if self.wrong == "popularity" else 1.0)
            chosen.update(others[i] for i in np.argsort(-draws, kind="stable")[:num_wrong])
        keys = sorted(chosen)
        return Prediction(keys, [int(recall * SCORE_ONE)] * len(keys))
