"""Announced forwards scored together by the history network, to the integers of one after the other.

A distance is scored for a whole block of forwards when it is first asked for, layer by layer: the weights of a layer
are then read once a block, and a decision only looks up what it needs. By the compiled functions where they are, else
by numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np

from expertflow.forward import Forward
from expertflow.network import Flags, HistoryNetwork, Ints, chance_of
from expertflow.parts import Kept, Prediction, Step
from expertflow.predictors.history import RoutingHistory
from expertflow.predictors.hybrid_compiled import (
    NOTHING,
    CompiledBlock,
    CompiledNetwork,
    Odds,
    ScoredForwards,
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
        self._takes = self.net.pregate is None and len(self.net.rank_weights) == history.top_k
        self._kept: _KeptForwards | None = None
        """All forwards of the run, where they are kept from another."""
        self._network = network = history.compiled
        self._compiled = None if network is None else CompiledBlock(network)
        self.code: tuple[str, ...] = ()
        """Empty where nothing is kept: without compiled functions, and where no block is taken."""
        if network is not None and self._takes:
            self.code = ("expertflow.compiled", "expertflow.network", CompiledBlock.__module__, __name__)
        self._decide: Any = None if network is None else network.functions.decide_scored
        self._packed: Ints = NOTHING
        self._reach = 0
        """How far a decision of the forward that runs has looked."""
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
        name = f"odds {name} {network.hash}"
        shape = (num_forwards, net.L, net.D + 2, net.E)
        odds = kept.find(name, shape, np.int16)
        if odds is None and kept.keep(name, shape, np.int16, _all_odds(network, forwards)):
            odds = kept.find(name, shape, np.int16)
        if odds is None:
            return False
        self._scores = self._kept = _KeptForwards(network, odds)
        self._stop = num_forwards
        return True

    def begin_forward(self, index: int) -> bool:
        """Whether forward `index` is one that is, or can be, taken in with others."""
        if not self._first <= index < self._stop:
            assert self._kept is None
            self._take(index)
        self.runs = self._first <= index < self._stop
        self._row, self._reach = index - self._first, 0
        return self.runs

    def _take(self, index: int) -> None:
        """Take in the forwards that were announced, from `index` to the first that cannot be."""
        self._first = self._stop = index
        net = self.net
        if not self._announced or not self._takes:
            return
        forwards: list[Forward] = []
        for forward in self._announced[max(index - self._announced[0].index, 0) :]:
            if not _is_plain(forward, net) or forward.index != index + len(forwards):
                break
            forwards.append(forward)
        num = len(forwards)
        if not num:
            return
        keys, starts = _routing(forwards, net)
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
        """The decision for distances 1 … reach, none past what is fitted or the last layer, as `Predictor.step`; for
        compiled functions alone."""
        network, row = self._network, self._row
        assert network is not None
        if reach > self._reach:
            scores = self._kept or self._compiled
            assert scores is not None
            self._packed, self._reach = scores.score(reach, row).packed, reach
        num_wants, num_selected, overfetched = self._decide(network.shared, self._packed, row, layer, reach)
        return network.one_want[:num_wants].tolist() if num_wants else [], num_selected, reach, overfetched

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


def _is_plain(forward: Forward, net: HistoryNetwork) -> bool:
    """Whether it is of one token, with as many experts a layer as the network was fitted to."""
    top_k = len(net.rank_weights)
    return forward.counts is None and all(len(keys) == top_k for keys in forward.demands)


def _routing(forwards: Sequence[Forward], net: HistoryNetwork) -> tuple[Ints, Flags]:
    """keys [n, L, K], best first, and whether a request begins [n]."""
    num, top_k = len(forwards), len(net.rank_weights)
    flat = chain.from_iterable(keys for forward in forwards for keys in forward.demands)
    keys = np.fromiter(flat, np.int64, num * net.L * top_k).reshape(num, net.L, top_k)
    return keys, np.array([len(forward.requests_started) == len(forward.requests) for forward in forwards])


def _all_odds(network: CompiledNetwork, forwards: Iterable[Forward]) -> Iterator[Odds]:
    """Log-odds [n, L, D + 2, E] of the forwards, in blocks: by distance, and then, in two places of 16 bits each, the
    chances [n, L · E] that are forecast. Ends with the first forward that is not plain."""
    net, block, memory = network.net, CompiledBlock(network), network.net.begin()
    waiting, num_seen = iter(forwards), 0
    while some := list(islice(waiting, RANKED)):
        if not all(_is_plain(forward, net) and forward.index == num_seen + row for row, forward in enumerate(some)):
            return
        num_seen += len(some)
        block.take(*_routing(some, net), memory)
        made = np.zeros((len(some), net.L, net.D + 2, net.E), np.int16)
        for row in range(len(some)):
            made[row, :, : net.D] = block.score(net.D, row).odds[row]
            chances = block.forecast(row).astype(np.int32)
            made[row, :, net.D :] = chances.view(np.int16).reshape(net.L, 2, net.E)
        yield made


class _KeptForwards:
    """Implements `_Scores` by what `_all_odds` gave."""

    def __init__(self, network: CompiledNetwork, odds: Odds) -> None:
        self.scored = ScoredForwards(network, odds)
        self.chances = self.scored.chances

    def score(self, reach: int, row: int) -> ScoredForwards:
        return self.scored

    def forecast(self, row: int) -> Ints:
        return self.scored.odds[row, :, -2:].reshape(-1).view(np.int32).astype(np.int64)


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
