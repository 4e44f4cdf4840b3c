"""Experts of a later layer from the routing history alone: naive Bayes over transition counts, learned online.

Log-odds of expert b at layer l+d add up from three sources, each damped because they overlap:
popularity of b at l+d, the experts now chosen at layer l (cross-layer), and those that layer l+d chose in the
forward before (persistence). All arithmetic between two layers is on integers, so that a block of forwards,
one forward, and another machine give the same scores to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
import numpy.typing as npt

from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import Announced, Prediction, Predictor
from expertflow.predictors.ranking import RowRanking
from expertflow.predictors.transition_block import AnnouncedBlock
from expertflow.predictors.transition_odds import Activations, TransitionOdds
from expertflow.transitions import TransitionCounts
from expertflow.units import SCORE_ONE
from expertflow.view import View

BLOCK = 64
"""Forwards that are learned from together. The tables follow after 1, 2, 4 … 32 blocks, then every 32."""


class TransitionPredictor(Predictor):
    """`cross`, `persistence` and `popularity` are the damping exponents of the three sources.

    Defaults: least calibration error on a training split (see results/LOG.md). `smoothing` is the weight of the
    independent guess in counts. `keep`: how many of the best are returned for a single token (0 = all experts; all
    anyway for several tokens). `fitted_start` holds fitted counts: frequency [L, E], cross [D, L, E, E],
    persistence [L, E, E] and num_forwards [1]; it is a start, the predictor goes on learning.
    """

    def __init__(
        self,
        max_distance: Annotated[int, Rule(1, 64, unit="layers", about="ahead, at most")] = 8,
        cross: Annotated[float, Rule(0, 100, about="damping exponent of the layers before")] = 0.525,
        persistence: Annotated[float, Rule(0, 100, about="damping exponent of the forward before")] = 0.375,
        popularity: Annotated[float, Rule(0, 100, about="damping exponent of an expert's share")] = 0.75,
        smoothing: Annotated[float, Rule(1e-6, 1e6, unit="counts", about="of the independent guess")] = 8.0,
        keep: Annotated[
            int, Rule(0, 65_535, unit="experts", about="the best are returned for a single token, 0 = all")
        ] = 0,
        fitted_start: Annotated[
            Mapping[str, npt.NDArray[np.generic]] | None,
            Rule(
                extra="auto or a file of python -m traces fit-predictor",
                about="auto: what is shipped",
            ),
        ] = None,
    ) -> None:
        if max_distance < 1:
            raise ValueError(f"TransitionPredictor max_distance={max_distance} must be at least 1")
        if keep < 0:
            raise ValueError(f"TransitionPredictor keep={keep} must be 0 (all experts) or more")
        if smoothing <= 0:
            raise ValueError(f"TransitionPredictor smoothing={smoothing} must be above 0")
        self.max_distance = max_distance
        self.damping = cross, persistence, popularity
        self.smoothing = smoothing
        self.keep = keep
        self.fitted_start = fitted_start

    def start(self, view: View, future: Future | None) -> None:
        self.L, self.E = view.num_layers, view.num_experts
        self.D = min(self.max_distance, self.L - 1) if self.L > 1 else 0
        self.num_kept = min(self.E, self.keep or self.E)
        self.counts = TransitionCounts(self.L, self.E, self.D)
        if self.fitted_start is not None:
            self.counts.load(self.fitted_start)
        self.odds = TransitionOdds(self.counts, view.top_k, self.damping, self.smoothing)
        self.block = AnnouncedBlock(self.odds, self.num_kept)
        self.recent: list[Activations] = []
        """The forwards to learn from; the first is context only."""
        self.num_done = 0
        self.current: Activations = self.block.last
        self.num_known = 0
        self.reach = 0
        """Farthest distance asked for: what lies beyond is not learned, since nobody looks."""
        self.ranking = RowRanking(self.E)

    def announced(self) -> Announced:
        return self.block

    def begin_forward(self, forward: KnownForward) -> None:
        activations = self.block.begin_forward(forward.index)
        if activations is not None:
            self.current = (activations, 1)
        else:
            self.current = (np.zeros((self.L, self.E)), forward.num_tokens)
            self.num_known = 0

    def _know(self, forward: KnownForward, layer: int) -> None:
        """Take note of the routing up to `layer`, which has become known."""
        activations = self.current[0].reshape(-1)
        while self.num_known <= layer:
            counts = None if forward.counts is None else forward.counts[self.num_known]
            for key in forward.demands[self.num_known]:
                activations[key] = 1 if counts is None else counts[key]
            self.num_known += 1

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        if distance > self.reach:
            if distance > self.D:
                return None
            self.reach = distance
            self._update()
        if self.block.runs:
            return self.block.predict(layer, distance)
        self._know(forward, layer)
        tables = self.odds
        activations, num_now = self.current
        before, num_before = self.current if layer + distance >= self.L else self.block.last
        target = (layer + distance) % self.L
        odds = activations[layer] @ tables.cross[distance - 1, layer]
        persistence = before[target] @ tables.persistence[target]
        # On one row numpy's cost is the number of its calls, so `TransitionOdds.chances` is written out in fewer: the
        # same integers.
        if num_now > 1:
            np.floor(odds / num_now, out=odds)
        if num_before > 1:
            np.floor(persistence / num_before, out=persistence)
        odds += persistence
        odds += tables.popularity[target]
        np.subtract(np.maximum.reduce(odds), odds, out=odds)
        np.minimum(odds, len(tables.exp) - 1, out=odds)
        share = tables.exp[odds.astype(np.intp)]
        total = np.add.reduce(share)
        share *= tables.top_k * SCORE_ONE
        share /= total
        np.minimum(share, SCORE_ONE, out=share)
        if num_now == 1:
            return self.ranking.rank(share.astype(np.int64), target * self.E, self.num_kept)
        # The chance that any of the tokens picks it.
        share = np.rint(SCORE_ONE * (1.0 - (1.0 - share / SCORE_ONE) ** num_now))
        return self.ranking.rank(share.astype(np.int64), target * self.E, self.E)

    def _update(self) -> None:
        self.odds.update(self.reach)
        self.block.forget()

    def end_forward(self, forward: KnownForward) -> None:
        if not self.block.runs:
            self._know(forward, self.L - 1)
        if not self.recent:
            self.recent.append(self.block.last)
        self.block.last = self.current
        self.recent.append(self.current)
        self.num_done += 1
        if self.num_done % BLOCK == 0:
            self.counts.learn(self.recent, self.reach)
            self.recent = []
            blocks = self.num_done // BLOCK
            if blocks & (blocks - 1) == 0 or blocks % 32 == 0:
                self._update()
