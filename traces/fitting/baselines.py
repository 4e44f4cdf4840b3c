"""Predictors compared on equal terms: each is fitted to a trace and gives chances [n, E] for rows, layer and distance.

Popularity and transition counts need routing alone; the others correct a recorded pre-gate. Those that see one expert
at a time stand in `traces.fitting.pointwise`. Shape letters: n rows, L layers, E experts, D distances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from expertflow.features import CHANCE_ONE
from expertflow.forest import KNOTS, Forest, calibration_tables
from expertflow.network import LOG_UNIT, Block, HistoryNetwork, chance_of
from expertflow.units import SCORE_ONE
from traces.container import TraceError
from traces.fitting.forest import ForestOptions, fit_forest, knot_counts, rising_shares
from traces.fitting.rows import RowBlock, num_distances, row_blocks
from traces.limits import check_pairs
from traces.reader import Trace
from traces.reading import read_arrays

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
SMOOTHING = 8.0
CROSS, PERSISTENCE, POPULARITY = 0.525, 0.375, 0.75
"""Damping of the three sources of log-odds, as in conf/policy/predictor/transition.yaml."""


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
        """Indices of all requests of the trace."""
        return range(self.trace.num_requests)

    @cached_property
    def transitions(self) -> Transition:
        """Counted once for all who use them."""
        return Transition(self)

    @cached_property
    def calibrated(self) -> Calibrated:
        """Calibrated once for all who use it."""
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
        check_pairs(trace.paths[0], L, E, 2 * D + 2)
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
    """The chance [n, E] that the trace's pre-gate gave."""
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
    """The pre-gate with each chance replaced by how often it came true, for each target layer and distance.

    The ranking of the experts stays as it is.
    """

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
            arrays = read_arrays(training.files["forest"])[0]
        else:
            options = ForestOptions(distances=training.distances, seed=training.seed)
            arrays = fit_forest(trace, training.report, options)[0]
        self.forest = Forest(arrays, trace.num_layers, trace.num_experts)
        if training.distances > self.forest.D:
            raise TraceError(
                f"{training.files['forest']}: is fitted to {self.forest.D} distances, "
                f"{training.distances} are compared; fit it anew"
            )
        self.num_bytes = sum(array.nbytes for array in arrays.values())

    def scores(self, block: RowBlock, layer: int, distance: int) -> Floats:
        rows = block.features(layer, distance)
        return np.stack([self.forest.scores(row, layer + distance, distance) for row in rows]) / SCORE_ONE


class NetworkBaseline:
    """The history network as it runs: from a file, or fitted with its defaults; on a pre-gate if fitted to one."""

    def __init__(self, training: Training) -> None:
        self.trace = training.trace
        if "hybrid" in training.files:
            arrays = read_arrays(training.files["hybrid"])[0]
        else:
            from traces.fitting.network import fit_hybrid
            from traces.fitting.training import HybridOptions

            options = HybridOptions(distances=training.distances, seed=training.seed)
            arrays = fit_hybrid(self.trace, training.report, options)[0]
        self.net = HistoryNetwork(arrays, self.trace.num_layers, self.trace.num_experts)
        if training.distances > self.net.D:
            raise TraceError(
                f"{training.files['hybrid']}: is fitted to {self.net.D} distances, "
                f"{training.distances} are compared; fit it anew"
            )
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


def has_pregate(*traces: Trace) -> bool:
    """Whether every one of the traces holds a pre-gate."""
    return all(num_distances(trace) > 0 for trace in traces)
