"""Announced forwards scored together by the transition predictor, to the integers of one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from expertflow.forward import Forward
from expertflow.parts import Kept, Prediction
from expertflow.predictors.ranking import rank_scores
from expertflow.predictors.transition_odds import Activations, Floats, Ints, TransitionOdds

PART = 32
"""Forwards scored together: more would be wasted when the horizon moves."""

Rows = tuple[list[list[list[int]]], list[list[list[int]]]]
"""Keys and scores [F][L][kept]."""


class AnnouncedBlock:
    """The forwards announced last, if all of them are of one token and of top_k experts a layer.

    last: activations of the forward that ran last, kept up to date by the predictor. runs: whether the forward that
    runs is one of the block.
    """

    code: tuple[str, ...] = ()

    def __init__(self, odds: TransitionOdds, num_kept: int) -> None:
        self.odds = odds
        self.num_kept = num_kept
        self.L, self.E = odds.L, odds.E
        self.last: Activations = (np.zeros((self.L, self.E)), 1)
        self.runs = False
        self._row = 0
        self._first = self._stop = 0
        self._block: Floats = np.zeros((0, self.L, self.E))
        self._before = self.last
        self._ready: dict[tuple[int, int], Rows] = {}
        self._rows: dict[int, tuple[list[list[int]], list[list[int]]]] = {}
        """What is ready for the current forward, by distance: keys and scores [L][kept]."""

    def prepare(self, forwards: Sequence[Forward]) -> None:
        """As `expertflow.parts.Announced`."""
        self._first = self._stop = 0
        self.forget()
        self._before = self.last
        top_k = self.odds.top_k
        plain = all(forward.counts is None for forward in forwards)
        if not plain or any(len(keys) != top_k for forward in forwards for keys in forward.demands):
            return
        flat = chain.from_iterable(keys for forward in forwards for keys in forward.demands)
        keys = np.fromiter(flat, np.int64, len(forwards) * self.L * top_k).reshape(len(forwards), -1)
        block = np.zeros((len(forwards), self.L * self.E))
        np.put_along_axis(block, keys, 1.0, axis=1)
        self._block = block.reshape(len(forwards), self.L, self.E)
        self._first, self._stop = forwards[0].index, forwards[-1].index + 1

    def prepare_all(self, forwards: Iterable[Forward], num_forwards: int, kept: Kept, name: str) -> bool:
        """As `expertflow.parts.Announced`: nothing is kept, since the tables change with every forward."""
        return False

    def forget(self) -> None:
        """The tables have changed: what is ready is out of date."""
        self._ready = {}

    def begin_forward(self, index: int) -> Floats | None:
        """Activations [L, E] of forward `index`, if it is one of the block."""
        self.runs = self._first <= index < self._stop
        self._rows = {}
        self._row = index - self._first
        return self._block[self._row] if self.runs else None

    def predict(self, layer: int, distance: int) -> Prediction:
        """Of the forward that runs."""
        rows = self._rows.get(distance)
        if rows is None:
            part, row = divmod(self._row, PART)
            ready = self._ready.get((part, distance))
            if ready is None:
                ready = self._ready[part, distance] = self._predict_part(part, distance)
            rows = self._rows[distance] = ready[0][row], ready[1][row]
        return Prediction(rows[0][layer], rows[1][layer])

    def _predict_part(self, part: int, distance: int) -> Rows:
        """For PART forwards of the block at once."""
        first = part * PART
        block = self._block[first : first + PART].transpose(1, 0, 2)
        before, num_before = (self._block[first - 1], 1) if first else self._before
        inside = self.L - distance
        earlier = np.empty_like(block)
        earlier[:inside, 1:] = block[distance:, :-1]
        # The forward before the block may have held several tokens: its row is scored apart, below.
        earlier[:inside, 0] = before[distance:] if num_before == 1 else 0.0
        earlier[inside:] = block[:distance]
        keys, scores = self._score(block, earlier, slice(0, self.L), distance, 1)
        if num_before > 1:
            keys[:inside, :1], scores[:inside, :1] = self._score(
                block[:inside, :1], before[distance:, None], slice(0, inside), distance, num_before
            )
        return keys.swapaxes(0, 1).tolist(), scores.swapaxes(0, 1).tolist()

    def _score(self, now: Floats, before: Floats, layers: slice, distance: int, num_before: int) -> tuple[Ints, Ints]:
        """Keys and scores [l, F, kept], best first; arguments as of `TransitionOdds.chances`."""
        targets = np.arange(layers.start + distance, layers.stop + distance) % self.L
        chances = self.odds.chances(now, before, layers, distance, num_before)
        return rank_scores(chances, (targets * self.E)[:, None, None], self.num_kept)
