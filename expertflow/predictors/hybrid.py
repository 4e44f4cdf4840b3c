"""The pre-gate, where the trace holds one, corrected by what the routing history says (arXiv 2510.26730).

The correction is a fitted `HistoryNetwork` in place of the paper's forest (`forest.py`). Without a recorded pre-gate
the history alone predicts. At the end of each forward it also says how likely each expert is to be
used in the next ones (`view.outlook`), for evictions that ask. Where numba is installed a decision runs compiled
(`compiled.py`), to the same integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from expertflow.forward import PREFILL, Forward
from expertflow.future import Future
from expertflow.network import (
    SHIFTS,
    UNIT,
    Floats,
    HistoryNetwork,
    Ints,
    Singles,
    chance_of,
    compiled_functions,
)  # fmt: skip
from expertflow.parts import Effort, Predictor, Scores, Step, Worths
from expertflow.predictors.hybrid_compiled import CompiledNetwork
from expertflow.predictors.ranking import rank_scores
from expertflow.view import View


def any_of(chances: Ints, times: int = 1) -> Ints:
    """Chances [...] in 2^-16 that any of the rows [rows, ...] comes true, each `times` times over."""
    never: Floats = (1.0 - chances / UNIT).prod(axis=0) ** times
    found: Ints = np.rint(UNIT * (1.0 - never)).astype(np.int64)
    return found


class HybridPredictor(Predictor):
    """Distances 1 … D of the fitted network, up to the last layer; from the last layer, the next forward's first.

    fitted: the arrays of `HistoryNetwork`. keep: how many of the best are returned for a single token (0 = all experts;
    all anyway for several tokens). refreshes: nearer predictions replace farther ones. Of several tokens the history is
    taken as their mean and the pre-gate as each one's; predicted is the chance that any of them picks an expert.
    """

    fitted_kind: ClassVar[str] = "hybrid"
    # Measured, in units of the 20 us that the shipped profiles assume (results/LOG.md, 2026-11-27).
    effort: Effort = Effort(0.5, 0.25)
    effort_at_once: Effort | None = Effort(0.4, 0.08)

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
        self.expected = self.asked = 1
        """How far was asked for at the layer before, and at this one."""
        self.seen_layer, self.seen = -1, list[Scores | None]()
        self.chance: Ints = np.zeros((self.net.D, self.E), np.int64)
        """What was found for distances 1, 2, … at `seen_layer`."""
        self.block_first = self.block_stop = 0
        self.block_row = -1
        self.block_rows: dict[int, tuple[list[list[list[int]]], list[list[list[int]]], list[Ints]]] = {}
        self.block_outlook: list[Ints] = []
        functions = compiled_functions() if len(self.net.rank_weights) == self.top_k else None
        self.compiled = None if functions is None else CompiledNetwork(self.net, functions)
        """What runs compiled, for one token; None: numpy does it all."""
        self._forget()
        self._begin(1)
        view.outlook = self.net.frequency.reshape(-1).astype(np.int64)
        view.chances = np.zeros(self.L * self.E, np.int64)

    def _forget(self) -> None:
        """A request begins."""
        self.memory = self.net.begin()
        self.features: Floats | None = None

    def _begin(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.num_steps = 1
        self.quick = self.compiled if num_tokens == 1 else None
        self.num_known = 0
        self.closed = False
        self.base = self.net.base(self.memory.states)
        self.sums: Ints = np.zeros((2 + len(SHIFTS)) * self.net.H, np.int64)
        """Over all layers (and the forwards before), over recent layers, one per rate."""
        self.sums[: self.net.H] = self.base
        self.used: Floats = np.zeros(self.L * self.E)
        self.own: Floats = np.empty((0, self.L, self.E))
        self.seen_layer = -1
        if self.features is None:
            self.features = self.net.own_features(self.memory.use, self.memory.shares)

    def begin_forward(self, forward: Forward) -> None:
        self.block_row = forward.index - self.block_first if forward.index < self.block_stop else -1
        if self.block_row >= 0:
            return
        if len(forward.requests_started) == len(forward.requests):
            self._forget()
        self._begin(forward.num_tokens)
        # Requests of a batch are at unlike places: only the tokens of a prompt follow one another.
        self.num_steps = forward.num_tokens if forward.phase == PREFILL else 1

    def _know(self, forward: Forward, layer: int) -> None:
        """Take note of the routing up to `layer`, which has become known."""
        net, H, counts = self.net, self.net.H, forward.counts
        while self.num_known <= layer:
            known = self.num_known
            keys = forward.demands[known]
            self.num_known += 1
            if self.quick is not None and len(keys) == self.top_k:
                self.quick.learn(keys, known, self.sums, self.used)
                continue
            made = net.embed(keys, None if counts is None else [counts[known][key] for key in keys], self.num_tokens)
            self.sums[H : 2 * H] = net.forget_recent(self.sums[H : 2 * H].astype(np.float64))
            self.sums += made.astype(np.int64)
            for key in keys:
                self.used[key] = 1.0 if counts is None else counts[known][key] / self.num_tokens
            if self.quick is not None:
                self.quick.hidden[:] = self._activate(known)

    def _activate(self, layer: int) -> Singles:
        H = self.net.H
        return self.net.activate(self.sums[:H] + self.sums[H : 2 * H] + self.net.place[layer + 1])

    def _close(self) -> None:
        """All layers of the forward are known: what the next one begins with."""
        if self.closed:
            return
        self.closed = True
        net, memory = self.net, self.memory
        assert self.features is not None
        if self.quick is not None:
            self.quick.close(memory, self.used, self.sums, self.features)
            return
        total = self.sums[2 * net.H :].astype(np.float64)
        self.memory = net.after(memory, total, self.used.reshape(self.L, self.E), self.num_steps)
        self.features = net.own_features(self.memory.use, self.memory.shares)
        self.own = np.empty((0, self.L, self.E))
        self.after: Singles = net.activate(net.base(self.memory.states) + net.place[0])

    def predict(self, forward: Forward, layer: int, distance: int) -> Scores | None:
        net = self.net
        if distance > net.D or (layer + distance >= self.L and layer < self.L - 1):
            return None
        if self.block_row >= 0:
            return self._from_block(layer, distance)
        if self.seen_layer != layer:
            # A horizon changes little from layer to layer: as far as was asked there is looked at once.
            self.expected, self.asked = self.asked, 1
            self.seen_layer, self.seen = layer, []
            self._know(forward, layer)
            if layer == self.L - 1:
                self._close()
        if distance > self.asked:
            self.asked = distance
        if distance > len(self.seen):
            reach = min(max(self.expected, distance), net.D, self.L - (layer + 1) % self.L)
            if self.quick is not None:
                self._look(self.quick, forward, layer, reach)
            else:
                self._look_ahead(forward, layer, reach)
        scores = self.seen[distance - 1]
        if scores is not None:
            first = (layer + distance) % self.L * self.E
            assert self.view.chances is not None
            self.view.chances[first : first + self.E] = self.chance[distance - 1]
        return scores

    def _look(self, quick: CompiledNetwork, forward: Forward, layer: int, reach: int) -> None:
        """`_look_ahead` of one token, compiled: what was not seen before."""
        assert self.features is not None
        seen = len(self.seen)
        self.seen += quick.look(self.features, self._pregate_of_one(quick, forward, layer), (layer + 1) % self.L, seen,
                                self.chance[seen:reach], self.num_kept)  # fmt: skip

    def _pregate_of_one(
        self, quick: CompiledNetwork, forward: Forward, layer: int
    ) -> npt.NDArray[np.float32] | None:
        """Chances [any, E] by distance that are to be added, empty where none are recorded; None: none are added."""
        if self.net.pregate is None or layer == self.L - 1:
            return None
        recorded = None if forward.recorded is None else forward.recorded.lookahead(forward.rows, layer)
        return quick.no_pregate if recorded is None else recorded[0]

    # -- a whole decision at once ------------------------------------------------------------------------------------

    def fuse(self, thresholds: Ints, worths: Worths) -> bool:
        if self.compiled is None or worths.chance is not self.view.chances:
            return False
        self.compiled.decide_by(thresholds, self.view.residency, worths)
        return True

    def step(self, forward: Forward, layer: int, reach: int) -> Step | None:
        quick, net, last = self.quick, self.net, self.L - 1
        if quick is None or self.block_row >= 0:
            return None
        routed = forward.demands[layer]
        keys: list[int] | None = routed
        if layer == last or self.num_known != layer or len(routed) != self.top_k:
            self._know(forward, layer)
            keys = None
            if layer == last:
                self._close()
        else:
            self.num_known += 1
        # What `predict` has looked at is not kept up.
        self.seen_layer = -1
        if layer < last and reach > last - layer:
            reach = last - layer
        pregate = None if net.pregate is None else self._pregate_of_one(quick, forward, layer)
        assert self.features is not None
        return quick.decide(keys, layer, self.sums, self.used, self.features, pregate, min(reach, net.D),
                            self.num_kept)  # fmt: skip

    def _look_ahead(self, forward: Forward, layer: int, reach: int) -> None:
        """What is predicted at distances 1 … reach, at once: on one row numpy costs by the call, not by the size."""
        net, first = self.net, (layer + 1) % self.L
        hidden = self._activate(layer) if first else self.after
        assert self.features is not None
        if len(self.own) < reach:
            self.own = np.stack([net.own_odds(self.features, distance) for distance in range(1, reach + 1)])
        odds = net.odds_ahead(hidden, first, reach)
        steps = np.arange(reach)
        odds += self.own[steps, first + steps]
        known = reach
        if net.pregate is not None and first:
            pregate = self._pregate(forward, layer, reach)
            known = pregate.shape[1]
            # [rows, known, E]: the history of the mean token, the pre-gate of each.
            odds = odds[:known] + net.pregate_odds(pregate, net.pregate_ahead[first][:known].T[..., None])
            each, times = chance_of(odds), 1
        else:
            each, times = chance_of(odds)[None], self.num_tokens
        single = self.num_tokens == 1
        chance, num_kept = (each[0], self.num_kept) if single else (any_of(each, times), self.E)
        keys, scores = rank_scores(chance, ((first + steps[:known]) * self.E)[:, None], num_kept)
        self.chance[:known] = chance
        self.seen = [*zip(keys.tolist(), scores.tolist(), strict=True), *[None] * (reach - known)]

    def _pregate(self, forward: Forward, layer: int, reach: int) -> Floats:
        """Chances [rows, known, E] of the pre-gate recorded at `layer` for the forward's rows, as far as that goes."""
        recorded = None if forward.recorded is None else forward.recorded.lookahead(forward.rows, layer)
        if recorded is None:
            return np.zeros((1, 0, self.E))
        chance: Floats = recorded[:, :reach].astype(np.float64)
        missing = np.isnan(chance).any(axis=(0, 2))
        return chance[:, : int(missing.argmax())] if missing.any() else chance

    def end_forward(self, forward: Forward) -> None:
        if self.block_row >= 0:
            self.view.outlook = self.block_outlook[self.block_row]
            return
        self._know(forward, self.L - 1)
        self._close()
        assert self.features is not None
        if self.quick is not None:
            self.view.outlook = self.quick.outlook(self.features)
        else:
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
        self.features = None
        self.memory, self.block = net.run_block(self.memory, keys, starts)
        ends = zip(self.block.after, self.block.features_after, strict=True)
        self.block_outlook = [net.outlook(hidden, features) for hidden, features in ends]
        self.block_rows = {}
        self.block_first, self.block_stop = forwards[0].index, forwards[-1].index + 1

    def _from_block(self, layer: int, distance: int) -> Scores:
        if distance not in self.block_rows:
            self.block_rows[distance] = self._score_block(distance)
        keys, scores, chances = self.block_rows[distance]
        source = layer if layer < self.L - 1 else len(keys) - 1
        row, first = self.block_row, (layer + distance) % self.L * self.E
        assert self.view.chances is not None
        self.view.chances[first : first + self.E] = chances[source][row]
        return keys[source][row], scores[source][row]

    def _score_block(self, distance: int) -> tuple[list[list[list[int]]], list[list[list[int]]], list[Ints]]:
        """Keys, scores [source][row][kept] and chances [source][row, E]: sources 0 … L - 1 - distance, then the last
        layer."""
        net, block = self.net, self.block
        before, after = (net.own_odds(some, distance) for some in (block.features, block.features_after))
        keys, scores, chances = [], [], []
        for source in [*range(self.L - distance), -1]:
            target = source + distance
            hidden = block.after if source < 0 else block.hidden[:, source]
            odds = net.odds(hidden, target, distance) + (after if source < 0 else before)[:, target]
            chance = chance_of(odds)
            found = rank_scores(chance, target * self.E, self.num_kept)
            keys.append(found[0].tolist())
            scores.append(found[1].tolist())
            chances.append(chance)
        return keys, scores, chances
