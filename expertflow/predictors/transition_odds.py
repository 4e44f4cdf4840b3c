"""Log-odds tables of the transition predictor, and what they make of activations, in integers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expertflow.transitions import TransitionCounts
from expertflow.units import NAT, SCORE_ONE

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Activations = tuple[Floats, int]
"""(activation counts [L, E], tokens) of a forward."""


class TransitionOdds:
    """Damped log-odds made from counts; `update` makes them anew.

    damping: exponents of cross-layer, persistence and popularity. cross [reach, L, E, E], persistence [L, E, E] and
    popularity [L, E] are integers in float64: exact in any order of summation, and BLAS does the work. exp: e^(-x/NAT)
    in units of 2^-20; what lies more than 14 nats below the best counts as nothing.
    """

    def __init__(
        self, counts: TransitionCounts, top_k: int, damping: tuple[float, float, float], smoothing: float
    ) -> None:
        self.counts = counts
        self.L, self.E, self.top_k = counts.L, counts.E, top_k
        self.damping = damping
        self.smoothing = smoothing
        self.exp: Floats = np.rint(np.exp(-np.arange(14 * NAT) / NAT) * (1 << 20))
        self.exp[-1] = 0
        self.cross: Floats = np.empty(0)
        self.update(0)

    def update(self, reach: int) -> None:
        """By the counts as they are now, for distances 1 … reach."""
        # The tables of before are needed no more: hundreds of megabytes, where experts are many.
        self.cross, self.persistence, self.popularity = tables = self.counts.log_odds(self.smoothing, reach, self.cross)
        for share, table in zip(self.damping, tables, strict=True):
            table *= NAT * share
            np.rint(table, out=table)

    def chances(self, now: Floats, before: Floats, layers: slice, distance: int, num_before: int) -> Ints:
        """Chances [l, F, E] in 2^-16, for the source layers `layers` in forwards of one token.

        now [l, F, E]: activation counts at the source layers; before [l, F, E]: of the target layers, one
        forward of num_before tokens earlier.
        """
        targets = np.arange(layers.start + distance, layers.stop + distance) % self.L
        odds = now @ self.cross[distance - 1, layers]
        persistence = before @ self.persistence[targets]
        if num_before > 1:
            persistence = np.floor(persistence / num_before)
        odds += persistence
        odds += self.popularity[targets][:, None]
        below = np.minimum(odds.max(axis=2, keepdims=True) - odds, len(self.exp) - 1).astype(np.int32)
        mass = self.exp[below]
        # One correctly rounded division of exact integers: the same on every machine.
        share = np.minimum(mass * (self.top_k * SCORE_ONE) / mass.sum(axis=2, keepdims=True), SCORE_ONE)
        chances: Ints = share.astype(np.int64)
        return chances
