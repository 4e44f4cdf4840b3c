"""The pre-gate, where the trace holds one, corrected by what the routing history says (arXiv 2510.26730).

The correction is a fitted `HistoryNetwork` in place of the paper's forest (`forest.py`). Without a recorded pre-gate
the history alone predicts. At the end of each forward it also says how likely each expert is to be
used in the next ones (`view.outlook`), for evictions that ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from expertflow.forward import PREFILL, Forward
from expertflow.future import Future
from expertflow.network import SHIFTS, UNIT, Floats, HistoryNetwork, Ints, Singles, chance_of
from expertflow.parts import Predictor, Scores
from expertflow.predictors.ranking import rank_scores
from expertflow.view import View


class HybridPredictor(Predictor):
    """Distances 1 … D of the fitted network, up to the last layer; from the last layer, the next forward's first.

    fitted: the arrays of `HistoryNetwork`. keep: how many of the best are returned for a single token (0 = all experts;
    all anyway for several tokens). refreshes: nearer predictions replace farther ones. A forward of several tokens is
    taken as their mean, and an expert's chance that any of them picks it follows from its chance for one.
    """

    fitted_kind: ClassVar[str] = "hybrid"

    def __init__(self, fitted: Mapping[str, npt.NDArray[np.generic]] | None, keep: int = 0,
                 refreshes: bool = True) -> None:  # fmt: skip
        if fitted is None:
            raise ValueError("HybridPredictor needs a fitted network for this model and none is shipped; fit one with "
                             "python -m traces fit-predictor, or choose policy/predictor=transition")  # fmt: skip
        if keep < 0:
            raise ValueError(f"HybridPredictor keep={keep} must be 0 (all experts) or more")
        self.fitted = fitted
        self.keep = keep
        self.refreshes = refreshes

    def start(self, view: View, future: Future | None) -> None:
        self.view = view
        self.L, self.E, self.top_k = view.num_layers, view.num_experts, view.top_k
        self.net = HistoryNetwork(self.fitted, self.L, self.E)
        self.num_kept = min(self.E, self.keep or self.E)
        self.reach = self.asked = 1
        """How far is looked at once, and how far was asked for in this forward."""
        self.block_first = self.block_stop = 0
        self.block_row = -1
        self.block_rows: dict[int, tuple[list[list[list[int]]], list[list[list[int]]]]] = {}
        self.block_outlook: list[Ints] = []
        self.memory = self.net.begin()
        self._begin(1)
        view.outlook = self.net.frequency.reshape(-1).astype(np.int64)

    def _begin(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.num_steps = 1
        self.num_known = 0
        self.closed = False
        self.base = self.net.base(self.memory.states)
        self.sum: Floats = self.base
        self.recent: Floats = np.zeros(self.net.H)
        self.total: Floats = np.zeros(len(SHIFTS) * self.net.H)
        self.now: Floats = np.zeros((self.L, self.E))
        self.own: Floats = np.empty((0, self.L, self.E))
        self.seen_layer, self.seen = -1, list[Scores | None]()
        self.features: Floats = self.net.own_features(self.memory.use, self.memory.shares)

    def begin_forward(self, forward: Forward) -> None:
        self.block_row = forward.index - self.block_first if forward.index < self.block_stop else -1
        if self.block_row >= 0:
            return
        if len(forward.requests_started) == len(forward.requests):
            self.memory = self.net.begin()
        self._begin(forward.num_tokens)
        # Requests of a batch are at unlike places: only the tokens of a prompt follow one another.
        self.num_steps = forward.num_tokens if forward.phase == PREFILL else 1
        self.reach, self.asked = self.asked, 1

    def _know(self, forward: Forward, layer: int) -> None:
        """Take note of the routing up to `layer`, which has become known."""
        net, H = self.net, self.net.H
        while self.num_known <= layer:
            keys = forward.demands[self.num_known]
            counts = None if forward.counts is None else forward.counts[self.num_known]
            made = net.embed(keys, None if counts is None else [counts[key] for key in keys], self.num_tokens)
            self.sum = self.sum + made[:H]
            self.recent = net.forget_recent(self.recent) + made[H : 2 * H]
            self.total = self.total + made[2 * H :]
            row = self.now[self.num_known]
            for key in keys:
                row[key - self.num_known * self.E] = 1.0 if counts is None else counts[key] / self.num_tokens
            self.num_known += 1

    def _close(self) -> None:
        """All layers of the forward are known: what the next one begins with."""
        if self.closed:
            return
        net = self.net
        self.memory = net.after(self.memory, self.total, self.now, self.num_steps)
        self.features = net.own_features(self.memory.use, self.memory.shares)
        self.own = np.empty((0, self.L, self.E))
        self.after: Singles = net.activate(net.base(self.memory.states) + net.place[0])
        self.closed = True

    def predict(self, forward: Forward, layer: int, distance: int) -> Scores | None:
        net = self.net
        if distance > net.D or (layer + distance >= self.L and layer < self.L - 1):
            return None
        if self.block_row >= 0:
            return self._from_block(layer, distance)
        if distance > self.asked:
            self.asked = distance
        if self.seen_layer != layer or distance > len(self.seen):
            self.reach = max(self.reach, distance)
            self.seen = self._look_ahead(forward, layer, min(self.reach, net.D, self.L - (layer + 1) % self.L))
            self.seen_layer = layer
        return self.seen[distance - 1]

    def _look_ahead(self, forward: Forward, layer: int, reach: int) -> list[Scores | None]:
        """What is predicted at distances 1 … reach, at once: on one row numpy costs by the call, not by the size."""
        net, first = self.net, (layer + 1) % self.L
        self._know(forward, layer)
        if first:
            hidden = net.activate(self.sum + self.recent + net.place[layer + 1])
        else:
            self._close()
            hidden = self.after
        if len(self.own) < reach:
            self.own = np.stack([net.own_odds(self.features, distance) for distance in range(1, reach + 1)])
        odds = net.odds_ahead(hidden, first, reach)
        steps = np.arange(reach)
        odds += self.own[steps, first + steps]
        known = reach
        if net.pregate is not None and first:
            pregate = self._pregate(forward, layer, reach)
            known = len(pregate)
            odds = odds[:known]
            odds += net.pregate_odds(pregate, net.pregate_ahead[first][:known].T[..., None])
        chance = chance_of(odds)
        num_kept = self.num_kept
        if self.num_tokens > 1:
            chance = np.rint(UNIT * (1.0 - (1.0 - chance / UNIT) ** self.num_tokens)).astype(np.int64)
            num_kept = self.E
        keys, scores = rank_scores(chance, ((first + steps[:known]) * self.E)[:, None], num_kept)
        found: list[Scores | None] = list(zip(keys.tolist(), scores.tolist(), strict=True))
        return found + [None] * (reach - known)

    def _pregate(self, forward: Forward, layer: int, reach: int) -> Floats:
        """Mean chances [known, E] over the forward's rows, of the pre-gate recorded at `layer`, as far as that goes."""
        recorded = None if forward.recorded is None else forward.recorded.lookahead(forward.rows, layer)
        if recorded is None:
            return np.zeros((0, self.E))
        chance: Floats = recorded[:, :reach].astype(np.float64).mean(axis=0)
        missing = np.isnan(chance).any(axis=1)
        return chance[: int(missing.argmax())] if missing.any() else chance

    def end_forward(self, forward: Forward) -> None:
        if self.block_row >= 0:
            self.view.outlook = self.block_outlook[self.block_row]
            return
        self._know(forward, self.L - 1)
        self._close()
        self.view.outlook = self.net.outlook(self.after, self.features)

    # -- a block of forwards at once ----------------------------------------------------------------------------------

    def prepare(self, forwards: Sequence[Forward]) -> None:
        """Announced forwards of one token each are scored together, to the same integers."""
        self.block_first = self.block_stop = 0
        if self.net.pregate is not None or any(
            f.counts is not None or any(len(keys) != self.top_k for keys in f.demands) for f in forwards
        ):
            return
        if len(self.net.rank_weights) != self.top_k:
            return
        net, num = self.net, len(forwards)
        flat = chain.from_iterable(keys for f in forwards for keys in f.demands)
        keys = np.fromiter(flat, np.int64, num * self.L * self.top_k).reshape(num, self.L, self.top_k)
        starts = np.array([len(f.requests_started) == len(f.requests) for f in forwards])
        self.memory, self.block = net.run_block(self.memory, keys, starts)
        ends = zip(self.block.after, self.block.features_after, strict=True)
        self.block_outlook = [net.outlook(hidden, features) for hidden, features in ends]
        self.block_rows = {}
        self.block_first, self.block_stop = forwards[0].index, forwards[-1].index + 1

    def _from_block(self, layer: int, distance: int) -> Scores:
        if distance not in self.block_rows:
            self.block_rows[distance] = self._score_block(distance)
        keys, scores = self.block_rows[distance]
        source = layer if layer < self.L - 1 else len(keys) - 1
        return keys[source][self.block_row], scores[source][self.block_row]

    def _score_block(self, distance: int) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
        """Keys and scores [source][row][kept]: sources 0 … L - 1 - distance, then the last layer."""
        net, block = self.net, self.block
        before, after = (net.own_odds(some, distance) for some in (block.features, block.features_after))
        keys, scores = [], []
        for source in [*range(self.L - distance), -1]:
            target = source + distance
            hidden = block.after if source < 0 else block.hidden[:, source]
            odds = net.odds(hidden, target, distance) + (after if source < 0 else before)[:, target]
            found = rank_scores(chance_of(odds), target * self.E, self.num_kept)
            keys.append(found[0].tolist())
            scores.append(found[1].tolist())
        return keys, scores
