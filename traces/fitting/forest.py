"""Fitting the forest predictor (`expertflow.forest`): draw rows, calibrate the pre-gate, grow and pack trees.

One forest per target layer, over all distances: of equal size, one over all layers gains a fifth as much. The pre-gate
is calibrated first, by target layer and distance: its chance min(1, K·softmax) is far too low for what is chosen, and a
leaf's mean correction of that puts experts out of order. The best-first trees get as many leaves as the size allows:
at equal size few large trees do a little better than 50 small ones. Letters as in `expertflow.forest`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.features import CHANCE_ONE, Small, num_features
from expertflow.forest import KNOTS, LEAF_ONE, Forest, calibration_tables
from expertflow.units import SCORE_ONE
from traces.container import TraceError
from traces.fitting.rows import num_distances, row_blocks
from traces.reader import Trace

Arrays = dict[str, npt.NDArray[np.generic]]
Report = Callable[[str], None]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Growing:
    """How a forest is grown. rows: at most so many (row, distance) pairs a target layer is fitted on; features: share
    of the features that a split may choose from; mb: 10^6 bytes of all arrays; calibrated: whether the trees correct
    the pre-gate calibrated, or as it is. ValueError on what cannot be."""

    distances: int = 8
    mb: float = 8.0
    seed: int = 0
    rows: int = 24_000
    trees: int = 12
    depth: int = 12
    least: int = 5
    features: float = 0.1
    calibrated: bool = True

    def __post_init__(self) -> None:
        for key, low, high in (
            ("distances", 1, 64),
            ("rows", 1, 1 << 24),
            ("trees", 1, 1024),
            ("depth", 1, 15),
            ("least", 1, 1 << 20),
        ):
            if not low <= getattr(self, key) <= high:
                raise TraceError(f"{key}={getattr(self, key)} must be a whole number in {low} … {high}")

    def leaves_a_tree(self, num_layers: int, num_experts: int) -> int:
        """How many leaves the size leaves to each tree, at most 2^depth; ValueError where it is no tree."""
        fixed = 2 * num_layers * self.distances * len(KNOTS) + 8 * (num_layers * self.trees + 1) + 4096
        # Of each leaf int8 [E], of each inner node (one fewer) four int16.
        most = int((1e6 * self.mb - fixed) // (num_layers * self.trees * (num_experts + 8)))
        if most < 2:
            raise TraceError(
                f"max_mb={self.mb:g} is too little for {num_layers} layers of {self.trees} trees of "
                f"{num_experts} experts; raise it, or lower trees"
            )
        return min(most, 1 << self.depth)


@dataclass
class Sample:
    """Of one target layer: features int16 [n, F], what was chosen [n, E] (0 or 1), distance [n]."""

    target: int
    features: Small
    chosen: npt.NDArray[np.int8]
    distance: npt.NDArray[np.int64]


def draw_samples(trace: Trace, requests: range, distances: int, rows: int, seed: int) -> list[Sample]:
    """At most `rows` pairs (row, distance) of each target layer [L], evenly over rows and distances."""
    L, E = trace.num_layers, trace.num_experts
    first, stop = int(trace.request_start[requests.start]), int(trace.request_start[requests.stop])
    total = (stop - first) * distances
    size = min(rows, total)
    draws = np.random.default_rng(seed)
    wanted = np.stack([np.sort(draws.permutation(total)[:size]) for _ in range(L)])
    made = [
        Sample(
            layer, np.zeros((size, num_features(E)), np.int16), np.zeros((size, E), np.int8), np.zeros(size, np.int64)
        )
        for layer in range(L)
    ]
    filled = [0] * L
    for block in row_blocks(trace, requests):
        low, high = (block.first - first) * distances, (block.first - first + block.num_rows) * distances
        mine = [w[np.searchsorted(w, low) : np.searchsorted(w, high)] - low for w in wanted]
        for layer in range(L):
            for distance in range(1, distances + 1):
                target = (layer + distance) % L
                chosen = mine[target]
                some = chosen[chosen % distances == distance - 1] // distances
                if layer + distance >= L:
                    some = some[~block.ends[some]]
                if not len(some):
                    continue
                at = slice(filled[target], filled[target] + len(some))
                made[target].features[at] = block.features(layer, distance, some)
                made[target].chosen[at] = block.truth(layer, distance)[some]
                made[target].distance[at] = distance
                filled[target] = at.stop
    return [Sample(s.target, s.features[:n], s.chosen[:n], s.distance[:n]) for s, n in zip(made, filled, strict=True)]


def knot_counts(chance: npt.NDArray[Any], chosen: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    """(chosen, all) [len(KNOTS)] of chances in 1/4096, each at the knot that it is nearest to."""
    knot = np.searchsorted((KNOTS[1:] + KNOTS[:-1]) / 2, chance.ravel())
    hits: Floats = np.bincount(knot, chosen.ravel().astype(np.float64), len(KNOTS)).astype(np.float64)
    return hits, np.bincount(knot, minlength=len(KNOTS)).astype(np.float64)


def rising_shares(hits: Floats, count: Floats) -> npt.NDArray[np.uint16]:
    """hits / count in 2^-16, pooled until they never fall (pool adjacent violators); empty places take their lower
    neighbour's."""
    pools: list[tuple[float, float, int]] = []
    for hit, number in zip(hits.tolist(), count.tolist(), strict=True):
        pools.append((hit, number, 1))
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] >= pools[-1][0] * pools[-2][1]:
            last = pools.pop()
            pools[-1] = (pools[-1][0] + last[0], pools[-1][1] + last[1], pools[-1][2] + last[2])
    means = [hit / max(number, 1.0) for hit, number, length in pools for _ in range(length)]
    shares: npt.NDArray[np.uint16] = np.minimum(np.rint(np.array(means) * SCORE_ONE), SCORE_ONE - 1).astype(np.uint16)
    return shares


def uncalibrated(distances: int) -> npt.NDArray[np.uint16]:
    """The pre-gate's own chances [D, len(KNOTS)] in 2^-16."""
    own = np.minimum(KNOTS * (SCORE_ONE // CHANCE_ONE), SCORE_ONE - 1).astype(np.uint16)
    return np.repeat(own[None], distances, axis=0)


def calibrate(sample: Sample, distances: int, num_experts: int) -> npt.NDArray[np.uint16]:
    """Share chosen [D, len(KNOTS)] in 2^-16 at each knot of the pre-gate's chance, never falling."""
    made = []
    for distance in range(1, distances + 1):
        rows = sample.distance == distance
        made.append(rising_shares(*knot_counts(sample.features[rows, :num_experts], sample.chosen[rows])))
    return np.stack(made)


def base_of(sample: Sample, calibration: npt.NDArray[np.uint16], num_experts: int) -> Floats:
    """The calibrated pre-gate [n, E] that the trees correct."""
    tables = calibration_tables(calibration)
    return tables[sample.distance[:, None] - 1, sample.features[:, :num_experts]] / SCORE_ONE


def grow(sample: Sample, base: Floats, growing: Growing, leaves: int, seed: int) -> Any:
    """The fitted sklearn forest of chosen - base."""
    from sklearn.ensemble import RandomForestRegressor  # type: ignore[import-untyped, import-not-found, unused-ignore]

    forest = RandomForestRegressor(
        growing.trees,
        max_depth=growing.depth,
        min_samples_leaf=growing.least,
        max_leaf_nodes=leaves,
        max_features=growing.features,
        random_state=seed,
        n_jobs=1,
    )
    return forest.fit(sample.features.astype(np.float32), sample.chosen - base)


@dataclass(frozen=True)
class Packed:
    """One tree: nodes int16 [I, 4] and leaves int8 [V, E], as `Forest` takes them."""

    nodes: npt.NDArray[np.int16]
    leaves: npt.NDArray[np.int8]


def pack(tree: Any) -> Packed:
    """A tree of sklearn in integers: x ≤ t for whole x is x ≤ floor(t)."""
    inner = tree.children_left >= 0
    values = np.asarray(tree.value).reshape(len(inner), -1)
    leaves = np.clip(np.rint(values[~inner] * LEAF_ONE), -127, 127).astype(np.int8)
    if not inner.any():
        return Packed(np.array([[0, 0, -1, -1]], np.int16), leaves)
    place = np.where(inner, np.cumsum(inner) - 1, -np.cumsum(~inner))
    children = np.stack([place[tree.children_left[inner]], place[tree.children_right[inner]]], axis=1)
    split = np.stack([tree.feature[inner], np.floor(tree.threshold[inner])], axis=1)
    return Packed(np.concatenate([split, children], axis=1).astype(np.int16), leaves)


def join(trees: list[Packed], calibration: npt.NDArray[np.uint16], max_tokens: int = 1) -> Arrays:
    """Arrays of a `Forest`, from the trees of layer 0, 1 … and calibration [D, L, len(KNOTS)]."""
    return {
        "nodes": np.concatenate([tree.nodes for tree in trees]),
        "leaves": np.concatenate([tree.leaves for tree in trees]),
        "first_node": np.cumsum([0, *(len(tree.nodes) for tree in trees)]).astype(np.int32),
        "first_leaf": np.cumsum([0, *(len(tree.leaves) for tree in trees)]).astype(np.int32),
        "calibration": calibration,
        "max_tokens": np.array([max_tokens], np.int32),
    }


def grow_layers(
    samples: list[Sample], growing: Growing, num_experts: int, report: Report
) -> Iterator[tuple[npt.NDArray[np.uint16], Any]]:
    """(calibration [D, len(KNOTS)], sklearn forest) of each target layer."""
    leaves = growing.leaves_a_tree(len(samples), num_experts)
    for layer, sample in enumerate(samples):
        start = time.perf_counter()
        D = growing.distances
        calibration = calibrate(sample, D, num_experts) if growing.calibrated else uncalibrated(D)
        forest = grow(sample, base_of(sample, calibration, num_experts), growing, leaves, growing.seed + layer)
        report(
            f"layer {layer + 1} of {len(samples)}: {len(sample.distance)} rows, {growing.trees} trees of up to "
            f"{leaves} leaves, {time.perf_counter() - start:.1f} s"
        )
        yield calibration, forest


@dataclass(frozen=True, kw_only=True)
class ForestOptions:
    """What `fit-predictor kind=forest` may be told. max_mb: 10^6 bytes of the file; leaf: least rows of a leaf; the
    others as in `Growing`."""

    distances: int = 8
    max_mb: int = 8
    seed: int = 0
    rows: int = 24_000
    trees: int = 12
    depth: int = 12
    leaf: int = 5
    calibrated: bool = True

    def growing(self, distances: int) -> Growing:
        """How the forest grows, for the `distances` that the trace has. ValueError on what cannot be."""
        return Growing(
            distances, self.max_mb, self.seed, self.rows, self.trees, self.depth, self.leaf, calibrated=self.calibrated
        )


def fit_forest(trace: Trace, report: Report, options: ForestOptions) -> tuple[Arrays, dict[str, str]]:
    """Arrays of a `Forest`, and what the file's header says. TraceError where the trace cannot be fitted."""
    if not num_distances(trace):
        raise TraceError(
            f"{trace.paths[0]}: holds no pre-gate (lookahead), which the forest corrects; record it with "
            "one, or fit another kind"
        )
    L, E = trace.num_layers, trace.num_experts
    distances = min(options.distances, num_distances(trace), L - 1)
    if distances < 1:
        raise TraceError(f"{trace.paths[0]}: has one layer; there is nothing to look ahead to")
    growing = options.growing(distances)
    growing.leaves_a_tree(L, E)
    # Held out by request, so that no text is on both sides.
    held = max(trace.num_requests // 8, 1) if trace.num_requests > 1 else 0
    fitted = range(trace.num_requests - held)
    seed, rows = options.seed, options.rows
    samples = draw_samples(trace, fitted, distances, rows, seed)
    judged = draw_samples(trace, range(fitted.stop, trace.num_requests), distances, rows // 8 + 1, seed) if held else []
    calibrations, packed, judge = [], [], Judge(distances, E, trace.top_k)
    for layer, (calibration, forest) in enumerate(grow_layers(samples, growing, E, report)):
        mine = [pack(tree.tree_) for tree in forest.estimators_]
        calibrations.append(calibration)
        packed += mine
        if held:
            judge.add(judged[layer], calibration, forest, join(mine, calibration[:, None]))
    arrays = join(packed, np.stack(calibrations, axis=1))
    told = asdict(options) | {"distances": distances}
    # The size shows in the file itself.
    del told["max_mb"]
    header = {
        "fitted_to": trace.name,
        "num_tokens": str(int(trace.request_start[fitted.stop])),
        "settings": json.dumps(told),
        **(judge.header() if held else {}),
    }
    for line in judge.lines(len(judged), held) if held else ["one request: nothing is held out"]:
        report(line)
    return arrays, header


class Judge:
    """Recall@k on held-out rows: of the pre-gate, calibrated plus forest, and what rounding the leaves loses."""

    def __init__(self, distances: int, num_experts: int, top_k: int) -> None:
        self.D, self.E, self.k = distances, num_experts, top_k
        self.hits = np.zeros((3, distances))
        self.chosen = np.zeros(distances)
        self.worst = 0.0

    def add(self, sample: Sample, calibration: npt.NDArray[np.uint16], forest: Any, arrays: Arrays) -> None:
        """Rows of one target layer whose pre-gate was recorded; sklearn's forest and its arrays, as of one layer."""
        # Past the last layer no pre-gate reaches.
        inside = sample.features[:, -2] + sample.distance == sample.target
        if not inside.any():
            return
        features, chosen, distance = sample.features[inside], sample.chosen[inside], sample.distance[inside]
        some = Sample(sample.target, features, chosen, distance)
        floats = np.clip(base_of(some, calibration, self.E) + forest.predict(features.astype(np.float32)), 0, 1)
        whole = whole_scores(arrays, features, distance, self.E)
        self.worst = max(self.worst, float(np.abs(floats - whole).max()))
        for row, scores in enumerate((features[:, : self.E], floats, whole)):
            best = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, : self.k]
            found = np.take_along_axis(chosen, best, axis=1).sum(axis=1)
            self.hits[row] += np.bincount(distance - 1, found, self.D)
        self.chosen += np.bincount(distance - 1, chosen.sum(axis=1), self.D)

    def recall(self) -> Floats:
        """[3, D]: pre-gate, forest in floats, forest in integers."""
        made: Floats = self.hits / np.maximum(self.chosen, 1)
        return made

    def header(self) -> dict[str, str]:
        """For the file."""
        names = ("pregate", "forest", "forest_rounded")
        return {
            "held_out_recall": json.dumps(
                {name: np.round(row, 4).tolist() for name, row in zip(names, self.recall(), strict=True)}
            )
        }

    def lines(self, num_layers: int, num_requests: int) -> list[str]:
        """For the user."""
        shown = {
            name: " ".join(f"{value:.3f}" for value in row)
            for name, row in zip(("pre-gate", "forest", "rounded"), self.recall(), strict=True)
        }
        head = f"recall@{self.k} by distance on {num_requests} held-out requests"
        return [
            *(f"{head}, {name}: {text}" for name, text in shown.items()),
            f"rounding the leaves moves a chance by at most {self.worst:.5f}",
        ]


def whole_scores(arrays: Arrays, features: Small, distance: npt.NDArray[np.int64], num_experts: int) -> Floats:
    """Chances [n, E] of a forest of one layer, as they are at run time."""
    forest = Forest(arrays, 1, num_experts)
    return np.stack([forest.scores(row, 0, int(d)) for row, d in zip(features, distance, strict=True)]) / SCORE_ONE
