"""Parts that break the rules of `expertflow.parts` (and two that keep them), named by `_target_` as a user would."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np

from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.parts import Horizon, Prediction, Predictor
from expertflow.view import View

_runs = 0


class _OneDistance(Horizon):
    def __init__(self, depth: int) -> None:
        self.depth = depth


class WallClockHorizon(_OneDistance):
    """Bad: looks one to four layers ahead as the host's clock has it."""

    def distances(self) -> Sequence[int]:
        return (self.depth + time.monotonic_ns() // 100 % 4,)


class ModuleStateHorizon(_OneDistance):
    """Bad: every other run of the process looks farther."""

    def start(self, view: View, future: Future | None) -> None:
        global _runs
        _runs += 1
        self.distance = self.depth + _runs % 2

    def distances(self) -> Sequence[int]:
        return (self.distance,)


class ViewClockHorizon(_OneDistance):
    """Good: time as the records tell it."""

    def start(self, view: View, future: Future | None) -> None:
        self.view = view

    def distances(self) -> Sequence[int]:
        return (self.depth + self.view.now_ns % 2,)


class RaisingHorizon(_OneDistance):
    """Bad: breaks off in the run that is started second."""

    def start(self, view: View, future: Future | None) -> None:
        global _runs
        _runs += 1
        self.num_asked = 0

    def distances(self) -> Sequence[int]:
        self.num_asked += 1
        if _runs % 2 == 0 and self.num_asked == 30:
            raise KeyError("no such layer")
        return (self.depth,)


class _Sampled(Predictor):
    def start(self, view: View, future: Future | None) -> None:
        self.view = view

    def _sample(self, population: range) -> list[int]:
        raise NotImplementedError

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        first = (layer + distance) % self.view.num_layers * self.view.num_experts
        return Prediction(self._sample(range(first, first + self.view.num_experts)), [4, 3, 2, 1])


class UnseededPredictor(_Sampled):
    """Bad: the process's own generator."""

    def _sample(self, population: range) -> list[int]:
        return random.sample(population, 4)


class UnseededArrayPredictor(_Sampled):
    """Bad: a generator seeded by the system."""

    def _sample(self, population: range) -> list[int]:
        chosen = np.random.default_rng().choice(np.array(population), 4, replace=False)
        return [int(key) for key in chosen]


class SeededPredictor(_Sampled):
    """Good: a generator of its own, seeded."""

    def start(self, view: View, future: Future | None) -> None:
        super().start(view, future)
        self.random = random.Random(1)

    def _sample(self, population: range) -> list[int]:
        return self.random.sample(population, 4)
