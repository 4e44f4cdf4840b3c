"""Predictors compared on equal terms: each is fitted to a trace and gives chances [n, E] for rows, layer and distance.

Popularity and transition counts need routing alone; the others correct a recorded pre-gate. The pointwise ones see one
expert at a time, all layers alike, one model a distance. Shape letters: n rows, L layers, E experts, D distances.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from expertflow.features import CHANCE_ONE
from expertflow.forest import KNOTS, Forest, calibration_tables
from expertflow.network import LOG_UNIT, Block, HistoryNetwork, chance_of
from expertflow.units import SCORE_ONE
from traces.container import TraceError
from traces.fitting.forest import ForestOptions, fit_forest, knot_counts, rising_shares
from traces.fitting.rows import RowBlock, num_distances, row_blocks
from traces.reader import Trace

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
SMOOTHING = 8.0
CROSS, PERSISTENCE, POPULARITY = 0.525, 0.375, 0.75
"""Damping of the three sources of log-odds, as in conf/policy/predictor/transition.yaml."""
POINTS = 200_000
"""Points (row, layer, expert) that a pointwise model of one distance is fitted to."""
BOOSTING = {"max_iter": 60, "max_leaf_nodes": 15, "learning_rate": 0.15, "early_stopping": False}
HIDDEN = 16


class Baseline(Protocol):
    """A fitted predictor. Blocks come in trace order, so it may keep what it has seen from one to the next."""

    num_bytes: int

    def scores(self, block: RowBlock, layer: int, distance: int) -> npt.NDArray[np.floating[Any]]:
        """Chance [n, E] that each row chooses each expert of layer `layer + distance`, which is in the same forward."""


@dataclass
class Training:
    """What baselines are fitted to: a trace, distances 1 … D, a seed, and files of predictors fitted before."""

    trace: Trace
    distances: int
    seed: int = 0
    files: Mapping[str, Path] = field(default_factory=dict)
    report: Callable[[str], None] = print

    @property
    def requests(self) -> range:
        """All of the trace."""
        return range(self.trace.num_requests)

    @cached_property
    def transitions(self) -> Transition:
        """Counted once for all who use them."""
        return Transition(self)

    @cached_property
    def calibrated(self) -> Calibrated:
        """The same."""
        return Calibrated(self)


class Popularity:
    """How often each expert was chosen."""

    def __init__(self, training: Training) -> None:
        total, rows = 0.0, 0
        for block in row_blocks(training.trace, training.requests):
            total, rows = total + block.chosen.sum(axis=0, dtype=np.float64), rows + block.num_rows
        self.frequency: Floats = np.asarray(total) / rows
        self.num_bytes = 2 * self.frequency.size

    def scores(self, block: RowBlock, layer: int, distance: int) -> Floats:
        return np.broadcast_to(self.frequency[layer + distance], (block.num_rows, self.frequency.shape[1]))


class Transition:
    """Naive Bayes: log-odds of popularity, of the experts now chosen, of those that the target layer chose before."""

    def __init__(self, training: Training) -> None:
        trace, D = training.trace, training.distances
        L, E = trace.num_layers, trace.num_experts
        self.top_k = trace.top_k
        cross, used, rows = np.zeros((D, L, E, E)), np.zeros((L, E)), 0
        same, before = np.zeros((L, E, E)), np.zeros((L, E))
        for block in row_blocks(trace, training.requests):
            now = np.ascontiguousarray(block.chosen.transpose(1, 0, 2))
            old = np.ascontiguousarray(block.before.transpose(1, 2, 0))
            turned = np.ascontiguousarray(now.transpose(0, 2, 1))
            used, before, rows = used + now.sum(axis=1), before + old.sum(axis=2), rows + block.num_rows
            same += old @ now
            for distance in range(1, D + 1):
                cross[distance - 1, : L - distance] += turned[: L - distance] @ now[distance:]
        popularity = (used + SMOOTHING / E) / (rows + SMOOTHING)
        self.popularity = np.log(popularity)
        self.same = self._odds(same, before, popularity).astype(np.float32)
        targets = np.stack([np.roll(popularity, -distance, axis=0) for distance in range(1, D + 1)])
        self.cross = self._odds(cross, used, targets).astype(np.float32)
        self.num_bytes = 2 * (self.cross.size + self.same.size + self.popularity.size)

    @staticmethod
    def _odds(counts: Floats, sources: Floats, popularity: Floats) -> Floats:
        target = popularity[..., None, :]
        odds: Floats = np.log((counts + SMOOTHING * target) / (sources[..., None] + SMOOTHING) / target)
        return odds

    def parts(self, block: RowBlock, layer: int, distance: int) -> tuple[Singles, Singles]:
        """Log-odds [n, E] of the experts now chosen, and of those before."""
        target = layer + distance
        return block.chosen[:, layer] @ self.cross[distance - 1, layer], block.before[:, target] @ self.same[target]

    def scores(self, block: RowBlock, layer: int, distance: int) -> Floats:
        now, before = self.parts(block, layer, distance)
        odds = CROSS * now + PERSISTENCE * before + POPULARITY * self.popularity[layer + distance]
        share: Floats = np.exp(odds - odds.max(axis=1, keepdims=True))
        chance: Floats = np.minimum(self.top_k * share / share.sum(axis=1, keepdims=True), 1.0)
        return chance


def pregate_of(block: RowBlock, layer: int, distance: int) -> Singles:
    """The recorded chance [n, E]."""
    found = block.pregate(layer)
    assert found is not None
    return found[:, distance - 1]


class Pregate:
    """The recorded pre-gate as it is."""

    num_bytes = 0

    def __init__(self, training: Training) -> None:
        pass

    def scores(self, block: RowBlock, layer: int, distance: int) -> Singles:
        return pregate_of(block, layer, distance)


class Calibrated:
    """The pre-gate by how often its chance came true, for each target layer and distance: the same ranking."""

    def __init__(self, training: Training) -> None:
        trace, D = training.trace, training.distances
        hits, count = np.zeros((2, D, trace.num_layers, len(KNOTS)))
        for block in row_blocks(trace, training.requests):
            for layer in range(trace.num_layers):
                for distance in range(1, min(D, trace.num_layers - 1 - layer) + 1):
                    chance = np.rint(pregate_of(block, layer, distance) * CHANCE_ONE)
                    found = knot_counts(chance, block.truth(layer, distance))
                    hits[distance - 1, layer + distance] += found[0]
                    count[distance - 1, layer + distance] += found[1]
        flat = zip(hits.reshape(-1, len(KNOTS)), count.reshape(-1, len(KNOTS)), strict=True)
        knots = np.stack([rising_shares(*row) for row in flat]).reshape(hits.shape)
        self.tables = calibration_tables(knots)
        self.num_bytes = knots.nbytes

    def scores(self, block: RowBlock, layer: int, distance: int) -> Floats:
        chance = np.rint(pregate_of(block, layer, distance) * CHANCE_ONE).astype(np.int64)
        calibrated: Floats = np.minimum(self.tables[distance - 1, layer + distance][chance] / SCORE_ONE, 1.0)
        return calibrated


class ForestBaseline:
    """The forest as it runs: from a file, or fitted with its defaults."""

    def __init__(self, training: Training) -> None:
        trace = training.trace
        if "forest" in training.files:
            arrays = dict(load_file(training.files["forest"]))
        else:
            options = ForestOptions(distances=training.distances, seed=training.seed)
            arrays = fit_forest(trace, training.report, options)[0]
        self.forest = Forest(arrays, trace.num_layers, trace.num_experts)
        if training.distances > self.forest.D:
            raise TraceError(f"{training.files['forest']}: is fitted to {self.forest.D} distances, "
                             f"{training.distances} are compared; fit it anew")  # fmt: skip
        self.num_bytes = sum(array.nbytes for array in arrays.values())

    def scores(self, block: RowBlock, layer: int, distance: int) -> Floats:
        rows = block.features(layer, distance)
        return np.stack([self.forest.scores(row, layer + distance, distance) for row in rows]) / SCORE_ONE


class NetworkBaseline:
    """The history network as it runs: from a file, or fitted with its defaults; on a pre-gate if fitted to one."""

    def __init__(self, training: Training) -> None:
        self.trace = training.trace
        if "hybrid" in training.files:
            arrays = dict(load_file(training.files["hybrid"]))
        else:
            from traces.fitting.network import HybridOptions, fit_hybrid

            options = HybridOptions(distances=training.distances, seed=training.seed)
            arrays = fit_hybrid(self.trace, training.report, options)[0]
        self.net = HistoryNetwork(arrays, self.trace.num_layers, self.trace.num_experts)
        if training.distances > self.net.D:
            raise TraceError(f"{training.files['hybrid']}: is fitted to {self.net.D} distances, "
                             f"{training.distances} are compared; fit it anew")  # fmt: skip
        self.num_bytes = sum(array.nbytes for array in arrays.values())
        self.memory, self.seen = self.net.begin(), -1

    def _run(self, block: RowBlock) -> Block:
        """The network over a block, once."""
        if self.seen != block.first or block.num_rows == 1:
            rows = slice(block.first, block.first + block.num_rows)
            offsets = np.arange(self.trace.num_layers)[:, None] * self.trace.num_experts
            keys = np.asarray(block.trace.experts[rows]).astype(np.int64) + offsets
            self.memory, self.block = self.net.run_block(self.memory, keys, block.starts)
            self.seen = block.first
        return self.block

    def scores(self, block: RowBlock, layer: int, distance: int) -> Floats:
        net, ran, target = self.net, self._run(block), layer + distance
        odds = net.odds(ran.hidden[:, layer], target, distance)
        own = (ran.features[:, :, target] * net.own_by_feature[distance - 1][:, target]).sum(axis=1)
        odds += np.floor(own / LOG_UNIT)
        if net.pregate is not None:
            chance = pregate_of(block, layer, distance).astype(np.float64)
            odds += net.pregate_odds(chance, net.pregate[distance - 1, target])
        return chance_of(odds) / SCORE_ONE


class Pointwise:
    """Models that see one expert at a time: what the pre-gate, the counts and the token before say of it."""

    NUM_FEATURES = 8

    def __init__(self, training: Training) -> None:
        self.counts, self.base, self.top_k = training.transitions, training.calibrated, training.trace.top_k
        self.models = [self._fit(*self._points(training, distance), training.seed)
                       for distance in range(1, training.distances + 1)]  # fmt: skip
        # Whatever is shared counts for each.
        self.num_bytes = self.counts.num_bytes + self.base.num_bytes + sum(self._size(model) for model in self.models)

    def features(self, block: RowBlock, layer: int, distance: int) -> Singles:
        """[n, E, 8], of order one."""
        chance = pregate_of(block, layer, distance)
        odds = np.log((chance + 1e-3) / (1 - chance + 1e-3))
        best = np.sort(odds, axis=1)
        bar = best[:, -min(self.top_k + 1, odds.shape[1]), None]
        base = self.base.scores(block, layer, distance)
        calibrated = np.log((base + 1e-3) / (1 - base + 1e-3))
        now, before = self.counts.parts(block, layer, distance)
        target = layer + distance
        popularity = np.broadcast_to(self.counts.popularity[target], odds.shape)
        rank = np.argsort(np.argsort(-odds, axis=1, kind="stable"), axis=1) / odds.shape[1]
        return np.stack([odds, odds - bar, calibrated, popularity + 2.0, now, before, block.before[:, target], rank],
                        axis=2, dtype=np.float32)  # fmt: skip

    def _points(self, training: Training, distance: int) -> tuple[Singles, Singles, Floats]:
        """Features [m, 8], whether chosen [m], and the calibrated pre-gate [m], of rows and layers drawn evenly."""
        trace, draws = training.trace, np.random.default_rng((training.seed, distance))
        sources = trace.num_layers - distance
        share = min(1.0, POINTS / (trace.num_tokens * sources * trace.num_experts))
        found: list[tuple[Singles, Singles, Floats]] = []
        for block in row_blocks(trace, training.requests):
            for layer in range(sources):
                rows = np.flatnonzero(draws.random(block.num_rows) < share)
                if len(rows):
                    some = block.take(rows)
                    found.append((self.features(some, layer, distance).reshape(-1, self.NUM_FEATURES),
                                  some.truth(layer, distance).ravel(),
                                  self.base.scores(some, layer, distance).ravel()))  # fmt: skip
        return tuple(np.concatenate(part) for part in zip(*found, strict=True))  # type: ignore[return-value]

    def scores(self, block: RowBlock, layer: int, distance: int) -> Floats:
        points = self.features(block, layer, distance)
        base = self.base.scores(block, layer, distance)
        flat = self._chance(self.models[distance - 1], points.reshape(-1, self.NUM_FEATURES), base.ravel())
        return flat.reshape(base.shape)

    def _fit(self, features: Singles, chosen: Singles, base: Floats, seed: int) -> Any:
        raise NotImplementedError

    def _chance(self, model: Any, features: Singles, base: Floats) -> Floats:
        raise NotImplementedError

    def _size(self, model: Any) -> int:
        raise NotImplementedError


def _sigmoid(odds: npt.NDArray[Any]) -> Floats:
    chance: Floats = 1.0 / (1.0 + np.exp(-odds.astype(np.float64)))
    return chance


class Ridge(Pointwise):
    """A linear correction of the calibrated pre-gate, least squares with a small penalty."""

    def _fit(self, features: Singles, chosen: Singles, base: Floats, seed: int) -> Floats:
        rows = np.column_stack([features, np.ones(len(features))]).astype(np.float64)
        weights = np.linalg.solve(rows.T @ rows + np.eye(rows.shape[1]), rows.T @ (chosen - base))
        return np.asarray(weights, np.float64)

    def _chance(self, model: Floats, features: Singles, base: Floats) -> Floats:
        chance: Floats = np.clip(base + features @ model[:-1] + model[-1], 0.0, 1.0)
        return chance

    def _size(self, model: Floats) -> int:
        return 4 * len(model)


class Logistic(Pointwise):
    """Logistic regression."""

    def _fit(self, features: Singles, chosen: Singles, base: Floats, seed: int) -> Any:
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped, import-not-found, unused-ignore]

        return LogisticRegression(max_iter=300).fit(features, chosen)

    def _chance(self, model: Any, features: Singles, base: Floats) -> Floats:
        return _sigmoid(features @ model.coef_[0] + model.intercept_[0])

    def _size(self, model: Any) -> int:
        return 4 * (self.NUM_FEATURES + 1)


class Boosting(Pointwise):
    """Gradient-boosted trees."""

    def _fit(self, features: Singles, chosen: Singles, base: Floats, seed: int) -> Any:
        from sklearn.ensemble import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
            HistGradientBoostingClassifier,
        )

        return HistGradientBoostingClassifier(**BOOSTING, random_state=seed).fit(features, chosen)

    def _chance(self, model: Any, features: Singles, base: Floats) -> Floats:
        return np.asarray(model.predict_proba(features)[:, 1], np.float64)

    def _size(self, model: Any) -> int:
        # A node in the form of the forest's: feature, threshold, two children, or a leaf.
        return int(BOOSTING["max_iter"] * (2 * BOOSTING["max_leaf_nodes"] - 1) * 8)


class Perceptron(Pointwise):
    """A network of one hidden layer."""

    def _fit(self, features: Singles, chosen: Singles, base: Floats, seed: int) -> Any:
        from sklearn.neural_network import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
            MLPClassifier,
        )

        network = MLPClassifier((HIDDEN,), max_iter=12, batch_size=512, learning_rate_init=3e-3, random_state=seed,
                                tol=0.0, n_iter_no_change=12)  # fmt: skip
        with warnings.catch_warnings():
            # The passes are few on purpose.
            warnings.simplefilter("ignore")
            return network.fit(features, chosen)

    def _chance(self, model: Any, features: Singles, base: Floats) -> Floats:
        hidden = np.maximum(features @ model.coefs_[0] + model.intercepts_[0], 0)
        return _sigmoid((hidden @ model.coefs_[1] + model.intercepts_[1])[:, 0])

    def _size(self, model: Any) -> int:
        return 4 * sum(int(array.size) for array in (*model.coefs_, *model.intercepts_))


BASELINES: dict[str, Callable[[Training], Baseline]] = {
    "popularity": Popularity,
    "transition": lambda training: training.transitions,
    "pregate": Pregate,
    "calibrated": lambda training: training.calibrated,
    "forest": ForestBaseline,
    "hybrid": NetworkBaseline,
    "ridge": Ridge,
    "logistic": Logistic,
    "boosting": Boosting,
    "perceptron": Perceptron,
}
ROUTING_ALONE = ("popularity", "transition", "hybrid")
"""Those that need no pre-gate."""


def has_pregate(*traces: Trace) -> bool:
    """Whether all of them hold one."""
    return all(num_distances(trace) > 0 for trace in traces)
