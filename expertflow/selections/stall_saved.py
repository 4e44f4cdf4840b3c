"""Wanted is what is expected to save more stall than it costs: probability, time left, and how full the link is."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.pace import Pace
from expertflow.parts import Prediction, Selection
from expertflow.units import SCORE_ONE
from expertflow.view import View


class StallSaved(Selection):
    """Experts with a chance p for which p · saved > (1 - p) · cost, that is p above cost / (saved + cost).

    saved: what of a copy the time left would hide, which is that of as many layers, stall excluded, as the prediction
    looks ahead; at most a whole copy. cost: the time of a copy, times the chance that it holds others up, times
    `copy_weight`. That chance is u^`queue`, u the share of the time in which the link works: in a queue with random
    arrivals and durations (M/M/1) the chance that so many are waiting or served. A needless copy costs next to nothing
    on a link that idles, and its whole time on one that is always busy. All are observed, running means (`memory` of
    the old kept). `least`, `most`: bounds of the threshold. Where the link is full and copies cannot be hidden the
    threshold tends to 1: prefetch that would hurt switches itself off.
    """

    at_once: ClassVar[bool] = True

    def __init__(
        self, copy_weight: float = 1.0, queue: int = 4, least: float = 0.01, most: float = 1.0, memory: float = 0.9
    ) -> None:
        if copy_weight < 0:
            raise ValueError(f"StallSaved copy_weight={copy_weight} must be at least 0")
        if not isinstance(queue, int) or not 0 <= queue <= 64:
            raise ValueError(f"StallSaved queue={queue} must be a whole number of 0 (a copy always holds up) to 64")
        if not 0 < least <= most <= 1:
            raise ValueError(f"StallSaved least={least}, most={most} must be in 0 < least <= most <= 1")
        if not 0 <= memory < 1:
            raise ValueError(f"StallSaved memory={memory} must be in [0, 1)")
        self.copy_weight, self.queue, self.least, self.most, self.memory = copy_weight, queue, least, most, memory

    def start(self, view: View, future: Future | None) -> None:
        self.view = view
        self.pace = Pace(view, self.memory)
        self.limits = [int(self.most * SCORE_ONE)] * (view.num_layers + 1)
        """Threshold by distance."""
        self.least_scores: npt.NDArray[np.int64] = np.array(self.limits, np.int64)
        """The same, for those who decide at once."""

    def end_forward(self, forward: KnownForward) -> None:
        pace = self.pace
        pace.look()
        # Products, not a power: these are the same on every machine.
        cost = self.copy_weight * prod([pace.busy] * self.queue) * pace.copy_ns
        self.limits = limits = [self._limit(cost, 0)]
        num_limits = len(self.least_scores)
        while len(limits) < num_limits:
            distance = len(limits)
            limits.append(self._limit(cost, distance))
            if pace.layer_ns * distance >= pace.copy_ns:
                # A whole copy is saved from here on.
                limits += limits[-1:] * (num_limits - len(limits))
        self.least_scores[:] = limits

    def thresholds(self) -> npt.NDArray[np.int64]:
        return self.least_scores

    def _limit(self, cost: float, distance: int) -> int:
        saved = min(self.pace.layer_ns * distance, self.pace.copy_ns)
        limit = cost / (saved + cost) if saved + cost > 0 else self.most
        return int(min(max(limit, self.least), self.most) * SCORE_ONE)

    def select(self, prediction: Prediction, forward: KnownForward) -> Sequence[int]:
        keys = prediction.keys
        if not keys:
            return keys
        view = self.view
        # From the last layer the next forward's first is one ahead.
        limit = self.limits[(keys[0] // view.num_experts - view.layer) % view.num_layers]
        count = 0
        for value in prediction.scores:
            if value < limit:
                break
            count += 1
        return keys[:count]
