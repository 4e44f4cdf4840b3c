"""How good chances are: recall, precision, calibration, log loss, summed over blocks; how recall falls with distance.

Knows neither traces nor predictors. Shape letters: n rows, E experts, k top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NUM_BINS = 10
THRESHOLD = 0.5
_LEAST = 1e-4
"""Chances in the log loss are held at this and at one minus this."""


@dataclass
class Accuracy:
    """Sums over decisions; a decision is the chances of one row's experts of one target layer."""

    top_k: int
    num_decisions: int = 0
    num_points: int = 0
    chosen: float = 0.0
    found: Floats = field(default_factory=lambda: np.zeros(3))
    named: float = 0.0
    named_right: float = 0.0
    bins: Floats = field(default_factory=lambda: np.zeros((3, NUM_BINS)))
    loss: float = 0.0

    def add(self, chances: npt.NDArray[Any], truth: npt.NDArray[Any]) -> None:
        """Chances [n, E] and what was chosen [n, E], 0 or 1. Of equal chances the lower expert comes first."""
        chances = np.asarray(chances, np.float64)
        truth = np.asarray(truth, np.float64)
        self.num_decisions += len(chances)
        self.num_points += chances.size
        self.chosen += truth.sum()
        order = np.argsort(-chances, axis=1, kind="stable")[:, : 2 * self.top_k]
        ranked = np.take_along_axis(truth, order, axis=1).sum(axis=0).cumsum()
        self.found += [ranked[min(size, len(ranked)) - 1] for size in self.sizes()]
        named = chances >= THRESHOLD
        self.named += named.sum()
        self.named_right += truth[named].sum()
        at = np.minimum((chances * NUM_BINS).astype(np.int64), NUM_BINS - 1).ravel()
        for row, weights in enumerate((None, chances.ravel(), truth.ravel())):
            self.bins[row] += np.bincount(at, weights, NUM_BINS)
        held = np.clip(chances, _LEAST, 1 - _LEAST)
        self.loss -= float((truth * np.log(held) + (1 - truth) * np.log(1 - held)).sum())

    def sizes(self) -> tuple[int, int, int]:
        """How many experts each recall names: k, k + 2, 2·k (where k is 1, k + 2 is held at 2·k)."""
        return self.top_k, min(self.top_k + 2, 2 * self.top_k), 2 * self.top_k

    def row(self) -> dict[str, float]:
        """The figures. precision_50 is NaN where no chance reaches 0.5. ece: expected calibration error, 10 bins."""
        recall = self.found / max(self.chosen, 1.0)
        count, chance, hits = self.bins
        gap = np.abs(chance - hits).sum() / max(count.sum(), 1.0)
        return {
            "recall_k": recall[0],
            "recall_k2": recall[1],
            "recall_2k": recall[2],
            "precision_50": self.named_right / self.named if self.named else float("nan"),
            "named_50": self.named / max(self.num_decisions, 1),
            "ece": float(gap),
            "log_loss": self.loss / max(self.num_points, 1),
            "num_decisions": float(self.num_decisions),
        }


def fit_decay(recalls: Sequence[float]) -> dict[str, float]:
    """a, b, c and rmse of `a·e^(−b·d) + c` at d = 1, 2 …; NaN with fewer than four distances.

    a and c in 0 … 1, b in 0 … 10. Where recall falls in a line, b is near 0 and c says nothing.
    """
    if len(recalls) < 4:
        return dict.fromkeys(("a", "b", "c", "rmse"), float("nan"))
    from scipy.optimize import curve_fit  # type: ignore[import-untyped, import-not-found, unused-ignore]

    values = np.asarray(recalls, np.float64)
    distance = np.arange(1.0, len(values) + 1)

    def decay(d: Floats, a: float, b: float, c: float) -> Floats:
        return a * np.exp(-b * d) + c

    start = (float(np.clip(values[0] - values[-1], 0.01, 0.99)), 0.5, float(np.clip(values[-1], 0.01, 0.99)))
    found, _ = curve_fit(decay, distance, values, start, bounds=([0.0, 0.0, 0.0], [1.0, 10.0, 1.0]), max_nfev=20_000)
    rmse = float(np.sqrt(np.mean((decay(distance, *found) - values) ** 2)))
    return {"a": float(found[0]), "b": float(found[1]), "c": float(found[2]), "rmse": rmse}
