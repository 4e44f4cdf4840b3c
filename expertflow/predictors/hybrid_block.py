"""Announced forwards scored together by the history network, to the integers of one after the other.

A distance is scored for many forwards when it is first asked for, layer by layer: the weights of a layer are then read
once for all of them, and a decision only looks up what it needs. By the compiled functions where they are
(`hybrid_scored.py`), else by numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from expertflow.forward import Forward
from expertflow.network import Flags, Ints, chance_of
from expertflow.parts import Kept, Prediction, Step
from expertflow.predictors.history import RoutingHistory
from expertflow.predictors.hybrid_compiled import NOTHING
from expertflow.predictors.hybrid_scored import (
    CompiledBlock,
    KeptBlock,
    ScoredBlock,
    all_scores,
    is_plain,
    pregates,
    routing,
)
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
    """The forwards announced last, as far as they are of one token and of top_k experts a layer. Without compiled
    functions a network with a pre-gate takes none.

    runs: whether the forward that runs is one of those taken in. num_taken: how many have been, in all.
    """

    def __init__(self, history: RoutingHistory, num_kept: int) -> None:
        self.history = history
        self.net = net = history.net
        self.num_kept = num_kept
        self.runs = False
        self.num_taken = 0
        self._row = 0
        self._first = self._stop = 0
        self._announced: Sequence[Forward] = ()
        self._network = network = history.compiled
        fits = len(net.rank_weights) == history.top_k
        self._takes = fits and (network is not None or net.pregate is None)
        self._num_forwards = 0
        """Of the run, where all are kept from another."""
        self.code: tuple[str, ...] = ()
        """Empty where nothing is kept: without compiled functions, where no block is taken, and with a pre-gate."""
        if network is not None and fits and net.pregate is None:
            own = (__name__, ScoredBlock.__module__, type(network).__module__)
            self.code = (*network.functions.MODULES, "expertflow.network", *own)
        self._decide: Any = None if network is None else network.functions.decide_scored
        self._choice: Ints = NOTHING
        self._reach = 0
        """How far a decision of the forward that runs has looked."""
        self._scored: ScoredBlock | None = None
        """The forwards taken in, where they are scored by compiled functions."""
        self._scores: _Scores
        self._ranked: dict[int, tuple[Ints, Ints, Ints]] = {}
        """By distance: keys and scores [row, source, kept], chances [row, source, E], from the row on that ran when
        anything was asked first, and for as many as `RANKED`."""
        self._first_ranked = 0

    def prepare(self, forwards: Sequence[Forward]) -> None:
        """As `expertflow.parts.Announced`."""
        self._announced = forwards

    def prepare_all(self, forwards: Iterable[Forward], num_forwards: int, kept: Kept, name: str) -> bool:
        """As `expertflow.parts.Announced`: for compiled functions, and where every forward is of one token."""
        network, net = self._network, self.net
        if network is None or not self.code:
            return False
        name = f"scores {name} {network.hash}"
        shape = (num_forwards, net.L, net.D + 1, net.E)
        found = kept.find(name, shape, np.uint16)
        if found is None and kept.keep(name, shape, np.uint16, all_scores(network, forwards)):
            found = kept.find(name, shape, np.uint16)
        if found is None:
            return False
        self._scores = self._scored = KeptBlock(network, found)
        self._num_forwards = num_forwards
        return True

    def begin_forward(self, index: int) -> bool:
        """Whether forward `index` is one that is, or can be, taken in with others."""
        if not self._first <= index < self._stop:
            self._ranked, self._first_ranked = {}, 0
            self._first = index
            self._stop = index + (self._take_kept(index) if self._num_forwards else self._take(index))
        self.runs = self._first <= index < self._stop
        self._row, self._reach = index - self._first, 0
        return self.runs

    def _take_kept(self, index: int) -> int:
        assert isinstance(self._scored, KeptBlock)
        assert index < self._num_forwards
        return self._scored.take(index)

    def _take(self, index: int) -> int:
        """Take in the forwards that were announced, from `index` to the first that cannot be; how many."""
        net, network = self.net, self._network
        if not self._announced or not self._takes:
            return 0
        forwards: list[Forward] = []
        for forward in self._announced[max(index - self._announced[0].index, 0) :]:
            same = not forwards or forward.recorded is forwards[0].recorded
            if not is_plain(forward, net) or not same or forward.index != index + len(forwards):
                break
            forwards.append(forward)
        num = len(forwards)
        if not num:
            return 0
        keys, starts = routing(forwards, net)
        if network is None:
            self._scores = _NumpyBlock(self.history, keys, starts)
        else:
            pregate = pregates(forwards, net)
            num_ahead = 0 if pregate is None else pregate.shape[2]
            block = self._scored
            if not isinstance(block, CompiledBlock) or len(block.scores) < num or block.pregate.shape[2] != num_ahead:
                self._scores = self._scored = block = CompiledBlock(network, num, num_ahead)
            block.take(keys, starts, pregate, self.history.memory)
            self.history.replaced()
        self.num_taken += num
        return num

    def forecast(self) -> Ints:
        """Chances [L * E] of use in the next forwards, after the one that runs."""
        return self._scores.forecast(self._row)

    def step(self, layer: int, reach: int) -> Step:
        """The decision for distances 1 … reach, none past what is fitted or the last layer, as `Predictor.step`; for
        compiled functions alone."""
        network, row = self._network, self._row
        assert network is not None
        if reach > self._reach:
            assert self._scored is not None
            self._choice, self._reach = self._scored.score(reach, row), reach
        num_wants, num_found, num_selected, overfetched = self._decide(self._choice, row, layer, reach)
        return network.one_want[:num_wants].tolist() if num_wants else [], num_selected, num_found, bool(overfetched)

    def predict(self, layer: int, distance: int) -> Prediction | None:
        """Of the forward that runs."""
        if self._scored is not None and distance > self._scored.known[self._row, layer]:
            return None
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
        self._forecasts = [net.forecast(hidden, features) for hidden, features in ends]

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
