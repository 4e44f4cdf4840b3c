"""Baselines that see one expert at a time: all layers alike, one model a distance. They correct a recorded pre-gate.

Shape letters: n rows, m points (a row and an expert), E experts.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.fitting.baselines import Floats, Singles, Training, pregate_of
from traces.fitting.rows import RowBlock, row_blocks

POINTS = 200_000
"""Points (row, layer, expert) that a pointwise model of one distance is fitted to."""
BOOSTING = {"max_iter": 60, "max_leaf_nodes": 15, "learning_rate": 0.15, "early_stopping": False}
HIDDEN = 16


class Pointwise:
    """Models that see one expert at a time: what the pre-gate, the counts and the token before say of it."""

    NUM_FEATURES = 8

    def __init__(self, training: Training) -> None:
        self.counts, self.base, self.top_k = training.transitions, training.calibrated, training.trace.top_k
        self.models = [
            self._fit(*self._points(training, distance), training.seed) for distance in range(1, training.distances + 1)
        ]
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
        return np.stack(
            [odds, odds - bar, calibrated, popularity + 2.0, now, before, block.before[:, target], rank],
            axis=2,
            dtype=np.float32,
        )

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
                    found.append(
                        (
                            self.features(some, layer, distance).reshape(-1, self.NUM_FEATURES),
                            some.truth(layer, distance).ravel(),
                            self.base.scores(some, layer, distance).ravel(),
                        )
                    )
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

        network = MLPClassifier(
            (HIDDEN,),
            max_iter=12,
            batch_size=512,
            learning_rate_init=3e-3,
            random_state=seed,
            tol=0.0,
            n_iter_no_change=12,
        )
        with warnings.catch_warnings():
            # The passes are few on purpose.
            warnings.simplefilter("ignore")
            return network.fit(features, chosen)

    def _chance(self, model: Any, features: Singles, base: Floats) -> Floats:
        hidden = np.maximum(features @ model.coefs_[0] + model.intercepts_[0], 0)
        return _sigmoid((hidden @ model.coefs_[1] + model.intercepts_[1])[:, 0])

    def _size(self, model: Any) -> int:
        return 4 * sum(int(array.size) for array in (*model.coefs_, *model.intercepts_))
