"""Announced forwards scored together by the history network, to the integers of one after the other.

A distance is scored for a whole block of forwards when it is first asked for, layer by layer: the weights of a layer
are then read once a block, and a decision only looks up what it needs. By the compiled functions where they are, else
by numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import numpy as np

from expertflow.forward import Forward
from expertflow.network import Flags, Ints, chance_of
from expertflow.parts import Prediction, Step
from expertflow.predictors.history import RoutingHistory
from expertflow.predictors.hybrid_compiled import CompiledBlock
from expertflow.predictors.ranking import rank_scores

RANKED = 64
"""Forwards whose scores are ranked together."""


class _Scores(Protocol):
    """A block of forwards that the history has taken in."""

    def forecast(self, row: int) -> Ints:
        """Chances [L * E] of use in the next forwards, after forward `row`."""

    def chances(self, distance: int, start: int, stop: int) -> Ints:
        """Chances [stop - start, L, E] in 2^-16 of the experts `distance` layers ahead, by forward, from `start` on,
        and the layer from which they are seen; told where a forward reaches so far."""


class AnnouncedBlock:
    """The forwards announced last, as far as they are of one token and of top_k experts a layer. A network with a
    pre-gate takes none.

    runs: whether the forward that runs is one of those taken in. num_taken: how many have been, in all.
    """

    def __init__(self, history: RoutingHistory, num_kept: int) -> None:
        self.history = history
        self.net = history.net
        self.num_kept = num_kept
        self.runs = False
        self.num_taken = 0
        self._row = 0
        self._first = self._stop = 0
        self._announced: Sequence[Forward] = ()
        self._compiled = None if history.compiled is None else CompiledBlock(history.compiled)
        self._scores: _Scores
        self._ranked: dict[int, tuple[Ints, Ints, Ints]] = {}
        """By distance: keys and scores [row, source, kept], chances [row, source, E], from the row on that ran when
        anything was asked first, and for as many as `RANKED`."""
        self._first_ranked = 0

    def prepare(self, forwards: Sequence[Forward]) -> None:
        """As `expertflow.parts.Announced`."""
        self._announced = forwards

    def begin_forward(self, index: int) -> bool:
        """Whether forward `index` is one that is, or can be, taken in with others."""
        if not self._first <= index < self._stop:
            self._take(index)
        self.runs = self._first <= index < self._stop
        self._row = index - self._first
        return self.runs

    def _take(self, index: int) -> None:
        """Take in the forwards that were announced, from `index` to the first that cannot be."""
        self._first = self._stop = index
        net, top_k = self.net, self.history.top_k
        if not self._announced or net.pregate is not None or len(net.rank_weights) != top_k:
            return
        forwards: list[Forward] = []
        for forward in self._announced[max(index - self._announced[0].index, 0) :]:
            single = forward.counts is None and all(len(keys) == top_k for keys in forward.demands)
            if not single or forward.index != index + len(forwards):
                break
            forwards.append(forward)
        num = len(forwards)
        if not num:
            return
        flat = chain.from_iterable(keys for f in forwards for keys in f.demands)
        keys = np.fromiter(flat, np.int64, num * net.L * top_k).reshape(num, net.L, top_k)
        starts = np.array([len(f.requests_started) == len(f.requests) for f in forwards])
        if self._compiled is None:
            self._scores = _NumpyBlock(self.history, keys, starts)
        else:
            self._compiled.take(keys, starts, self.history.memory)
            self.history.replaced()
            self._scores = self._compiled
        self._ranked, self._first_ranked = {}, 0
        self._stop = index + num
        self.num_taken += num

    def forecast(self) -> Ints:
        """Chances [L * E] of use in the next forwards, after the one that runs."""
        return self._scores.forecast(self._row)

    def step(self, layer: int, reach: int) -> Step:
        """As `Predictor.step`, of the forward that runs; for compiled functions alone."""
        assert self._compiled is not None
        return self._compiled.decide(self._row, layer, reach)

    def predict(self, layer: int, distance: int) -> Prediction:
        """Of the forward that runs."""
        row = self._row - self._first_ranked
        if row >= RANKED:
            self._ranked, self._first_ranked, row = {}, self._row, 0
        if distance not in self._ranked:
            self._ranked[distance] = self._rank(distance)
        keys, scores, chances = self._ranked[distance]
        return Prediction(keys[row, layer].tolist(), scores[row, layer].tolist(), chances[row, layer])

    def _rank(self, distance: int) -> tuple[Ints, Ints, Ints]:
        net, start = self.net, self._first_ranked
        chances = self._scores.chances(distance, start, min(start + RANKED, self._stop - self._first))
        first_keys = (np.arange(net.L) + distance) % net.L * net.E
        keys, scores = rank_scores(chances, first_keys[:, None], self.num_kept)
        return keys, scores, chances


class _NumpyBlock:
    """Implements `_Scores` by numpy."""

    def __init__(self, history: RoutingHistory, keys: Ints, starts: Flags) -> None:
        self.net = net = history.net
        self._block = block = history.run_block(keys, starts)
        ends = zip(block.after, block.features_after, strict=True)
        self._forecasts = [net.outlook(hidden, features) for hidden, features in ends]

    def forecast(self, row: int) -> Ints:
        return self._forecasts[row]

    def chances(self, distance: int, start: int, stop: int) -> Ints:
        net, block, rows = self.net, self._block, slice(start, stop)
        before, after = (net.own_odds(some[rows], distance) for some in (block.features, block.features_after))
        found = np.zeros((stop - start, net.L, net.E), np.int64)
        for source in [*range(net.L - distance), -1]:
            target = source + distance
            hidden = block.after[rows] if source < 0 else block.hidden[rows, source]
            odds = net.odds(hidden, target, distance) + (after if source < 0 else before)[:, target]
            found[:, source] = chance_of(odds)
        return found
