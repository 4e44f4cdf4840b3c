"""Blocks of forwards of one token each whose scores stand in one array, computed here or kept from another run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np

from expertflow.forward import Forward
from expertflow.network import NUM_OWN, Flags, HistoryNetwork, Ints, Memory, chances_of_codes
from expertflow.parts import KeptRows
from expertflow.predictors.hybrid_compiled import NOTHING, Codes, CompiledNetwork, Pregate

ROWS = 64
"""Forwards that are taken from a whole run at a time."""
GROUP = 8
"""Forwards that are scored together."""


def is_plain(forward: Forward, net: HistoryNetwork) -> bool:
    """Whether it is of one token, with as many experts a layer as the network was fitted to."""
    top_k = len(net.rank_weights)
    return forward.counts is None and all(len(keys) == top_k for keys in forward.demands)


def routing(forwards: Sequence[Forward], net: HistoryNetwork) -> tuple[Ints, Flags]:
    """keys [n, L, K], best first, and whether a request begins [n]."""
    num, top_k = len(forwards), len(net.rank_weights)
    flat = chain.from_iterable(keys for forward in forwards for keys in forward.demands)
    keys = np.fromiter(flat, np.int64, num * net.L * top_k).reshape(num, net.L, top_k)
    return keys, np.array([len(forward.requests_started) == len(forward.requests) for forward in forwards])


def pregates(forwards: Sequence[Forward], net: HistoryNetwork) -> Pregate | None:
    """Chances [n, L, any, E] of the pre-gate recorded for these forwards, which are of one recording; None where the
    network takes none."""
    if net.pregate is None:
        return None
    recorded, rows = forwards[0].recorded, [row for forward in forwards for row in forward.rows]
    found = [None if recorded is None else recorded.lookahead(rows, layer) for layer in range(net.L)]
    none: Pregate = np.zeros((len(rows), 0, net.E), np.float32)
    return np.stack([none if one is None else one for one in found], axis=1)


class ScoredBlock:
    """scores [n, L, D + 1, E] (`compiled.Block`), and how many distances are known [n, L]; there is room for num."""

    def __init__(self, network: CompiledNetwork, num: int) -> None:
        self.network = network
        self.net = net = network.net
        self.scores: Codes = np.zeros((num, net.L, net.D + 1, net.E), np.uint16)
        self.known: Ints = np.full((num, net.L), net.D)
        self._choice = NOTHING

    def forecast(self, row: int) -> Ints:
        """Chances [N] of use in the next forwards, after forward `row`."""
        return chances_of_codes(self.scores[row, :, -1].reshape(-1))

    def chances(self, distance: int, start: int, stop: int) -> Ints:
        """Chances [stop - start, L, E] of forwards start … stop - 1, `distance` layers ahead."""
        for row in range(start - start % GROUP, stop, GROUP):
            self.score(distance, row)
        return chances_of_codes(self.scores[start:stop, :, distance - 1])

    def score(self, reach: int, row: int) -> Ints:
        """Make sure that the scores of forward `row` stand there up to `reach`; what then decides by them."""
        if not len(self._choice) and self.network.decided_by:
            self._choice = self.network.choice_of(self.scores, self.known)
        return self._choice


class KeptBlock(ScoredBlock):
    """Forwards of a whole run, `ROWS` at a time, kept from another."""

    def __init__(self, network: CompiledNetwork, kept: KeptRows) -> None:
        super().__init__(network, ROWS)
        self._kept = kept

    def take(self, first: int) -> int:
        """Take in forwards of the run from `first` on; how many."""
        return self._kept.read(first, self.scores)


class CompiledBlock(ScoredBlock):
    """Forwards that are taken in; a distance is scored for `GROUP` of them when it is first asked for: enough to read a
    layer's weights once for many, and few enough that little is scored which nobody asks for.
    """

    def __init__(self, network: CompiledNetwork, num: int, num_ahead: int = 0) -> None:
        """num_ahead: for how many distances there is a pre-gate."""
        super().__init__(network, num)
        net, functions = self.net, network.functions
        width = functions.padded(net.H, functions.QUAD)
        hidden = np.zeros((num, net.L + 1, width), np.uint8)
        before, after = (np.zeros((num, NUM_OWN, net.L * net.E), np.int16) for _ in range(2))
        self.pregate: Pregate = np.zeros((num, net.L, num_ahead, net.E), np.float32)
        self.block = functions.Block(hidden, before, after, self.pregate, self.known, self.scores)
        self.packed: Ints = functions.packed(num, num_ahead, *self.block)
        self.num = num
        self.reach: list[int] = []
        """Distances 1 … reach are scored, by group."""

    def take(self, keys: Ints, starts: Flags, pregate: Pregate | None, memory: Memory) -> None:
        """Take in forwards: keys [n, L, K], best first; starts [n]: a request begins; pregate [n, L, num_ahead, E].
        memory is brought up to date in place. There must be room."""
        network, num = self.network, len(keys)
        self.reach = [0] * -(-num // GROUP)
        if pregate is not None:
            self.pregate[:num] = pregate
            there = ~np.isnan(pregate).any(axis=3)
            # As far as it goes without a gap; of the next forward's layers there is none, and none is wanted.
            known = np.logical_and.accumulate(there, axis=2).sum(axis=2)
            self.known[:num, :-1] = np.minimum(known, self.net.D)[:, :-1]
        states, use, shares = memory.states, memory.use.reshape(NUM_OWN - 1, -1), memory.shares.reshape(-1)
        network.functions.learn_block(network.packed, self.packed, keys, starts, states, use, shares)
        network.functions.forecast_block(network.packed, self.packed, num)
        self.num = num

    def score(self, reach: int, row: int) -> Ints:
        network, group = self.network, row // GROUP
        start, stop = group * GROUP, min((group + 1) * GROUP, self.num)
        for ahead in range(self.reach[group], reach):
            network.functions.score_block(network.packed, self.packed, ahead, start, stop)
        self.reach[group] = max(reach, self.reach[group])
        return super().score(reach, row)


def all_scores(network: CompiledNetwork, forwards: Iterable[Forward]) -> Iterator[Codes]:
    """Scores [n, L, D + 1, E] of the forwards, in blocks, each overwritten by the next. Ends with the first forward
    that is not plain."""
    net, block, memory = network.net, CompiledBlock(network, ROWS), network.net.begin()
    waiting, num_seen = iter(forwards), 0
    while some := list(islice(waiting, ROWS)):
        if not all(is_plain(forward, net) and forward.index == num_seen + row for row, forward in enumerate(some)):
            return
        num_seen += len(some)
        block.take(*routing(some, net), None, memory)
        for row in range(0, len(some), GROUP):
            block.score(net.D, row)
        yield block.scores[: len(some)]
