"""Announced forwards scored together by the history network, to the integers of one after the other.

Faster than numpy forward by forward, slower than the compiled functions: it is for where these are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from expertflow.forward import Forward
from expertflow.network import Block, Ints, chance_of
from expertflow.parts import Prediction
from expertflow.predictors.history import RoutingHistory
from expertflow.predictors.ranking import rank_scores


class AnnouncedBlock:
    """The forwards announced last, if all of them are of one token and of top_k experts a layer. A network with a
    pre-gate takes none.

    runs: whether the forward that runs is one of the block.
    """

    def __init__(self, history: RoutingHistory, num_kept: int) -> None:
        self.history = history
        self.net = history.net
        self.num_kept = num_kept
        self.runs = False
        self._row = 0
        self._first = self._stop = 0
        self._block: Block | None = None
        self._forecasts: list[Ints] = []
        self._scored: dict[int, tuple[Ints, Ints, Ints]] = {}
        """By distance: keys and scores [source, row, kept], chances [source, row, E]."""

    def prepare(self, forwards: Sequence[Forward]) -> None:
        """As `expertflow.parts.Announced`."""
        self._first = self._stop = 0
        net, top_k = self.net, self.history.top_k
        if net.pregate is not None or len(net.rank_weights) != top_k:
            return
        if any(f.counts is not None or any(len(keys) != top_k for keys in f.demands) for f in forwards):
            return
        num = len(forwards)
        flat = chain.from_iterable(keys for f in forwards for keys in f.demands)
        keys = np.fromiter(flat, np.int64, num * net.L * top_k).reshape(num, net.L, top_k)
        starts = np.array([len(f.requests_started) == len(f.requests) for f in forwards])
        self._block = block = self.history.run_block(keys, starts)
        ends = zip(block.after, block.features_after, strict=True)
        self._forecasts = [net.outlook(hidden, features) for hidden, features in ends]
        self._scored = {}
        self._first, self._stop = forwards[0].index, forwards[-1].index + 1

    def begin_forward(self, index: int) -> bool:
        """Whether forward `index` is one of the block."""
        self.runs = self._first <= index < self._stop
        self._row = index - self._first
        return self.runs

    def forecast(self) -> Ints:
        """Chances [L * E] of use in the next forwards, after the one that runs."""
        return self._forecasts[self._row]

    def predict(self, layer: int, distance: int) -> Prediction:
        """Of the forward that runs."""
        if distance not in self._scored:
            self._scored[distance] = self._score(distance)
        keys, scores, chances = self._scored[distance]
        source = layer if layer < self.net.L - 1 else len(keys) - 1
        row = self._row
        return Prediction(keys[source, row].tolist(), scores[source, row].tolist(), chances[source, row])

    def _score(self, distance: int) -> tuple[Ints, Ints, Ints]:
        """Sources 0 … L - 1 - distance, then the last layer."""
        net, block = self.net, self._block
        assert block is not None
        before, after = (net.own_odds(some, distance) for some in (block.features, block.features_after))
        keys, scores, chances = [], [], []
        for source in [*range(net.L - distance), -1]:
            target = source + distance
            hidden = block.after if source < 0 else block.hidden[:, source]
            odds = net.odds(hidden, target, distance) + (after if source < 0 else before)[:, target]
            chance = chance_of(odds)
            found = rank_scores(chance, target * net.E, self.num_kept)
            keys.append(found[0])
            scores.append(found[1])
            chances.append(chance)
        return np.stack(keys), np.stack(scores), np.stack(chances)
