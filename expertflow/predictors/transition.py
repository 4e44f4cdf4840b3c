"""Experts of a later layer from the routing history alone: naive Bayes over transition counts, learned online.

Log-odds of expert b at layer l+d add up from three sources, each damped because they overlap:
popularity of b at l+d, the experts now chosen at layer l (cross-layer), and those that layer l+d chose in the
forward before (persistence). All arithmetic between two layers is on integers, so that a block of forwards,
one forward, and another machine give the same scores to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from expertflow.forward import Forward
from expertflow.future import Future
from expertflow.parts import SCORE_ONE, Predictor, Scores
from expertflow.predictors.ranking import RowRanking, rank_scores
from expertflow.transitions import TransitionCounts
from expertflow.view import View

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NAT = 1024
"""Log-odds are integers in units of 1/1024 nat."""

BLOCK = 64
"""Forwards that are learned from together. The tables follow after 1, 2, 4 … 32 blocks, then every 32."""

PART = 32
"""Forwards scored together when they were announced: more would be wasted when the horizon moves."""


class TransitionPredictor(Predictor):
    """`cross`, `persistence` and `popularity` are the damping exponents of the three sources.

    Defaults: least calibration error on a training split (see results/LOG.md). `smoothing` is the weight of the
    independent guess in counts. `keep`: how many of the best are returned for a single token (0 = all experts; all
    anyway for several tokens). `warm` holds fitted counts: frequency [L, E], cross [D, L, E, E],
    persistence [L, E, E] and num_forwards [1]; it is a start, the predictor goes on learning.
    """

    def __init__(self, max_distance: int = 8, cross: float = 0.525, persistence: float = 0.375,
                 popularity: float = 0.75, smoothing: float = 8.0, keep: int = 0,
                 warm: Mapping[str, npt.NDArray[np.generic]] | None = None) -> None:  # fmt: skip
        if max_distance < 1:
            raise ValueError(f"TransitionPredictor max_distance={max_distance} must be at least 1")
        if keep < 0:
            raise ValueError(f"TransitionPredictor keep={keep} must be 0 (all experts) or more")
        if smoothing <= 0:
            raise ValueError(f"TransitionPredictor smoothing={smoothing} must be above 0")
        self.max_distance = max_distance
        self.cross, self.persistence, self.popularity = cross, persistence, popularity
        self.smoothing = smoothing
        self.keep = keep
        self.warm = warm

    def start(self, view: View, future: Future | None) -> None:
        self.L, self.E, self.top_k = view.num_layers, view.num_experts, view.top_k
        self.D = min(self.max_distance, self.L - 1) if self.L > 1 else 0
        self.num_kept = min(self.E, self.keep or self.E)
        self.counts = TransitionCounts(self.L, self.E, self.D)
        if self.warm is not None:
            self.counts.load(self.warm)
        self.recent: list[tuple[Floats, int]] = []
        """(activation counts [L, E], tokens) of the forwards to learn from; the first is context only."""
        self.num_done = 0
        self.previous: tuple[Floats, int] = (np.zeros((self.L, self.E)), 1)
        self.current: tuple[Floats, int] = self.previous
        self.num_known = 0
        self.in_block = False
        self.block_first = self.block_stop = 0
        self.block: Floats = np.zeros((0, self.L, self.E))
        self.before_block = self.previous
        self.ready: dict[tuple[int, int], tuple[list[list[list[int]]], list[list[list[int]]]]] = {}
        self.rows: dict[int, tuple[list[list[int]], list[list[int]]]] = {}
        """What is ready for the current forward, by distance."""
        self.reach = 0
        """Farthest distance asked for: what lies beyond is not learned, since nobody looks."""
        self._update_weights()
        # exp(-x / NAT) in units of 2^-20; what lies more than 14 nats below the best counts as nothing.
        self.exp = np.rint(np.exp(-np.arange(14 * NAT) / NAT) * (1 << 20))
        self.exp[-1] = 0
        self.ranking = RowRanking(self.E)

    def _update_weights(self) -> None:
        cross, persistence, popularity = self.counts.log_odds(self.smoothing, self.reach)
        self.cross_weights = np.rint(NAT * self.cross * cross)
        self.persistence_weights = np.rint(NAT * self.persistence * persistence)
        self.popularity_weights = np.rint(NAT * self.popularity * popularity)
        self.ready = {}

    def prepare(self, forwards: Sequence[Forward]) -> None:
        self.block_first = self.block_stop = 0
        self.ready = {}
        self.before_block = self.previous
        plain = all(f.counts is None for f in forwards)
        if not plain or any(len(keys) != self.top_k for f in forwards for keys in f.demands):
            return
        flat = chain.from_iterable(keys for f in forwards for keys in f.demands)
        keys = np.fromiter(flat, np.int64, len(forwards) * self.L * self.top_k).reshape(len(forwards), -1)
        block = np.zeros((len(forwards), self.L * self.E))
        np.put_along_axis(block, keys, 1.0, axis=1)
        self.block = block.reshape(len(forwards), self.L, self.E)
        self.block_first, self.block_stop = forwards[0].index, forwards[-1].index + 1

    def begin_forward(self, forward: Forward) -> None:
        self.in_block = self.block_first <= forward.index < self.block_stop
        self.rows = {}
        if self.in_block:
            self.current = (self.block[forward.index - self.block_first], 1)
        else:
            self.current = (np.zeros((self.L, self.E)), forward.num_tokens)
            self.num_known = 0

    def _know(self, forward: Forward, layer: int) -> None:
        """Take note of the routing up to `layer`, which has become known."""
        activations = self.current[0].reshape(-1)
        while self.num_known <= layer:
            counts = None if forward.counts is None else forward.counts[self.num_known]
            for key in forward.demands[self.num_known]:
                activations[key] = 1 if counts is None else counts[key]
            self.num_known += 1

    def predict(self, forward: Forward, layer: int, distance: int) -> Scores | None:
        if distance > self.reach:
            if distance > self.D:
                return None
            self.reach = distance
            self._update_weights()
        if self.in_block:
            rows = self.rows.get(distance)
            if rows is None:
                rows = self.rows[distance] = self._ready_rows(forward.index - self.block_first, distance)
            return rows[0][layer], rows[1][layer]
        self._know(forward, layer)
        activations, num_now = self.current
        before, num_before = self.current if layer + distance >= self.L else self.previous
        target = (layer + distance) % self.L
        weights = self.cross_weights[distance - 1, layer], self.persistence_weights[target]
        odds, persistence = activations[layer] @ weights[0], before[target] @ weights[1]
        # On one row numpy's cost is the number of its calls, so `_score` is written out in fewer: the same integers.
        if num_now > 1:
            np.floor(odds / num_now, out=odds)
        if num_before > 1:
            np.floor(persistence / num_before, out=persistence)
        odds += persistence
        odds += self.popularity_weights[target]
        np.subtract(np.maximum.reduce(odds), odds, out=odds)
        np.minimum(odds, len(self.exp) - 1, out=odds)
        share = self.exp[odds.astype(np.intp)]
        total = np.add.reduce(share)
        share *= self.top_k * SCORE_ONE
        share /= total
        np.minimum(share, SCORE_ONE, out=share)
        if num_now == 1:
            return self.ranking.rank(share.astype(np.int64), target * self.E, self.num_kept)
        # The chance that any of the tokens picks it.
        share = np.rint(SCORE_ONE * (1.0 - (1.0 - share / SCORE_ONE) ** num_now))
        return self.ranking.rank(share.astype(np.int64), target * self.E, self.E)

    def _ready_rows(self, index: int, distance: int) -> tuple[list[list[int]], list[list[int]]]:
        """Keys and scores [L][kept] of forward `index` of the block."""
        part, row = divmod(index, PART)
        ready = self.ready.get((part, distance))
        if ready is None:
            ready = self.ready[part, distance] = self._predict_part(part, distance)
        return ready[0][row], ready[1][row]

    def _predict_part(self, part: int, distance: int) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
        """Keys and scores [F][L][kept] for PART forwards of the block at once."""
        first = part * PART
        block = self.block[first : first + PART].transpose(1, 0, 2)
        before, num_before = (self.block[first - 1], 1) if first else self.before_block
        inside = self.L - distance
        earlier = np.empty_like(block)
        earlier[:inside, 1:] = block[distance:, :-1]
        # The forward before the block may have held several tokens: its row is scored apart, below.
        earlier[:inside, 0] = before[distance:] if num_before == 1 else 0.0
        earlier[inside:] = block[:distance]
        keys, scores = self._score(block, earlier, slice(0, self.L), distance, 1)
        if num_before > 1:
            keys[:inside, :1], scores[:inside, :1] = self._score(
                block[:inside, :1], before[distance:, None], slice(0, inside), distance, num_before)  # fmt: skip
        return keys.swapaxes(0, 1).tolist(), scores.swapaxes(0, 1).tolist()

    def _score(self, now: Floats, before: Floats, layers: slice, distance: int,
               num_before: int) -> tuple[Ints, Ints]:  # fmt: skip
        """Keys and scores [l, F, kept], best first, for the source layers `layers` in forwards of one token.

        now [l, F, E]: activation counts at the source layers; before [l, F, E]: of the target layers, one
        forward of num_before tokens earlier. Integers in float64: exact in any order of summation, and BLAS does
        the work.
        """
        targets = np.arange(layers.start + distance, layers.stop + distance) % self.L
        odds = now @ self.cross_weights[distance - 1, layers]
        persistence = before @ self.persistence_weights[targets]
        if num_before > 1:
            persistence = np.floor(persistence / num_before)
        odds += persistence
        odds += self.popularity_weights[targets][:, None]
        below = np.minimum(odds.max(axis=2, keepdims=True) - odds, len(self.exp) - 1).astype(np.int32)
        mass = self.exp[below]
        # One correctly rounded division of exact integers: the same on every machine.
        share = np.minimum(mass * (self.top_k * SCORE_ONE) / mass.sum(axis=2, keepdims=True), SCORE_ONE)
        return rank_scores(share.astype(np.int64), (targets * self.E)[:, None, None], self.num_kept)

    def end_forward(self, forward: Forward) -> None:
        if not self.in_block:
            self._know(forward, self.L - 1)
        if not self.recent:
            self.recent.append(self.previous)
        self.previous = self.current
        self.recent.append(self.current)
        self.num_done += 1
        if self.num_done % BLOCK == 0:
            self.counts.learn(self.recent, self.reach)
            self.recent = []
            blocks = self.num_done // BLOCK
            if blocks & (blocks - 1) == 0 or blocks % 32 == 0:
                self._update_weights()
