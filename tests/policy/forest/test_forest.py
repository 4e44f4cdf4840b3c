"""The forest in integers: equal to scikit-learn's, refused where damaged, within its size; the calibration below it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from expertflow import forest as forest_module
from expertflow.features import CHANCE_ONE, num_features
from expertflow.forest import KNOTS, LEAF_ONE, Forest, calibration_tables
from expertflow.units import SCORE_ONE
from tests.policy.forest.support import needs_fit
from traces.container import TraceError
from traces.fitting.forest import Growing, join, knot_counts, pack, rising_shares, uncalibrated

E = 5
F = num_features(E)


def sklearn_forest(trees: int, seed: int = 0, **limits: Any) -> tuple[Any, npt.NDArray[np.int16]]:
    """A regressor of E outputs in -1 … 1, and the whole-number features [n, F] that it was fitted to."""
    needs_fit()
    from sklearn.ensemble import RandomForestRegressor

    draws = np.random.default_rng(seed)
    features = draws.integers(0, 6, size=(400, F)).astype(np.int16)
    wanted = np.tanh(draws.normal(size=(400, E)) + (features[:, :E] > 2) - (features[:, E : 2 * E] > 3))
    made = RandomForestRegressor(trees, max_depth=12, min_samples_leaf=2, random_state=seed, **limits)
    return made.fit(features.astype(np.float32), wanted), features


def flat(level: int = 0) -> npt.NDArray[np.uint16]:
    """A calibration [1, 1, knots] that gives every chance the same."""
    return np.full((1, 1, len(KNOTS)), level, np.uint16)


def packed(made: Any, level: int = 0) -> dict[str, npt.NDArray[np.generic]]:
    """Arrays of one layer."""
    return join([pack(tree.tree_) for tree in made.estimators_], flat(level))


def walk(arrays: dict[str, Any], features: list[int], level: int) -> list[int]:
    """The forest's scores, the slow way."""
    total = [0] * E
    num_trees = len(arrays["first_node"]) - 1
    for tree in range(num_trees):
        node, first, leaf = 0, int(arrays["first_node"][tree]), int(arrays["first_leaf"][tree])
        while node >= 0:
            feature, threshold, left, right = (int(value) for value in arrays["nodes"][first + node])
            node = left if features[feature] <= threshold else right
        total = [t + int(v) for t, v in zip(total, arrays["leaves"][leaf + ~node], strict=True)]
    bases = [level + (min(max(features[e], 0), CHANCE_ONE) >> 6) for e in range(E)]
    return [min(max(b + t * 512 // num_trees, 0), SCORE_ONE) for b, t in zip(bases, total, strict=True)]


@pytest.mark.parametrize("limits", [{}, {"max_leaf_nodes": 20}])
def test_compiled_equals_sklearn_with_rounded_leaves(limits: dict[str, int]) -> None:
    """A power of two of trees: the mean is a whole number of 2^-16, so nothing but sklearn's floats is rounded."""
    made, features = sklearn_forest(4, **limits)
    arrays = packed(made, SCORE_ONE // 2)
    forest = Forest(arrays, 1, E)
    draws = np.random.default_rng(1)
    rows = np.concatenate([features[:50], draws.integers(-3, 9, size=(200, F)).astype(np.int16)])
    floats = made.predict(rows.astype(np.float32))
    for tree in made.estimators_:
        tree.tree_.value[:] = np.clip(np.rint(tree.tree_.value * LEAF_ONE), -127, 127) / LEAF_ONE
    rounded = made.predict(rows.astype(np.float32))
    found = np.array([forest.scores(row, 0, 1) for row in rows]) / SCORE_ONE
    base = (SCORE_ONE // 2 + (np.clip(rows[:, :E].astype(int), 0, CHANCE_ONE) >> 6)) / SCORE_ONE
    inside = (base + rounded > 0) & (base + rounded < 1)
    assert inside.mean() > 0.5
    assert np.abs(found - base - rounded)[inside].max() <= 1e-6
    # What rounding costs: half a unit of a leaf; and where nothing was clipped it is seen.
    assert 1e-4 < np.abs(rounded - floats).max() <= 0.5 / LEAF_ONE + 1 / 128


@pytest.mark.parametrize("level", [0, 30_000, 65_535])
def test_compiled_equals_a_walk_in_plain_python(level: int) -> None:
    made, _ = sklearn_forest(7, seed=2)
    arrays = packed(made, level)
    forest = Forest(arrays, 1, E)
    rows = np.random.default_rng(3).integers(-40, 5000, size=(60, F)).astype(np.int16)
    found = [forest.scores(row, 0, 1).tolist() for row in rows]
    assert found == [walk(arrays, row.tolist(), level) for row in rows]
    assert min(map(min, found)) >= 0
    assert max(map(max, found)) <= SCORE_ONE


def test_a_tree_without_a_split_is_its_leaf() -> None:
    needs_fit()
    from sklearn.ensemble import RandomForestRegressor

    made = RandomForestRegressor(2, bootstrap=False).fit(np.zeros((4, F)), np.full((4, E), 0.25))
    forest = Forest(packed(made), 1, E)
    assert forest.scores(np.zeros(F, np.int16), 0, 1).tolist() == [SCORE_ONE // 4] * E


def test_layers_and_distances_take_their_own_trees_and_calibration() -> None:
    needs_fit()
    from sklearn.ensemble import RandomForestRegressor

    trees = [
        RandomForestRegressor(1, bootstrap=False).fit(np.zeros((4, F)), np.full((4, E), value)) for value in (0.25, 0.5)
    ]
    calibration = np.stack([np.full((2, len(KNOTS)), 1000 * distance, np.uint16) for distance in (1, 2)])
    forest = Forest(join([pack(made.estimators_[0].tree_) for made in trees], calibration), 2, E)
    zero = np.zeros(F, np.int16)
    for layer, value in enumerate((0.25, 0.5)):
        for distance in (1, 2):
            expected = 1000 * distance + int(value * SCORE_ONE)
            assert forest.scores(zero, layer, distance).tolist() == [expected] * E


def _swap(name: str, value: Any) -> Any:
    return lambda arrays: arrays | {name: value(arrays[name])}


def _child(value: int) -> Any:
    def change(nodes: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
        made = nodes.copy()
        made[0, 2] = value
        return made

    return _swap("nodes", change)


DAMAGED = {
    "nodes has shape": _swap("nodes", lambda nodes: nodes[:, :3]),
    "leaves has shape": _swap("leaves", lambda leaves: leaves[:, 1:]),
    "calibration has shape": _swap("calibration", lambda knots: knots[:, :, 1:]),
    "nodes must hold whole numbers": _swap("nodes", lambda nodes: nodes.astype(np.float32)),
    "leaves is missing": lambda arrays: {key: value for key, value in arrays.items() if key != "leaves"},
    "trees are damaged": _child(0),
    "trees are damaged ": _child(9999),
    "trees are damaged  ": _child(-9999),
    "trees are damaged   ": _swap("first_leaf", lambda first: first + 1),
    "trees are damaged    ": _swap("leaves", lambda leaves: leaves[:-1]),
}


@pytest.mark.parametrize("problem", DAMAGED)
def test_what_does_not_fit_is_refused_in_one_line(problem: str) -> None:
    arrays = packed(sklearn_forest(2)[0])
    Forest(arrays, 1, E)
    with pytest.raises(ValueError, match=problem.strip()) as raised:
        Forest(DAMAGED[problem](arrays), 1, E)
    assert "\n" not in str(raised.value)
    assert "fit-predictor" in str(raised.value)


def test_trees_that_cannot_be_shared_among_layers_are_refused() -> None:
    arrays = packed(sklearn_forest(3)[0]) | {"calibration": np.zeros((1, 2, len(KNOTS)), np.uint16)}
    with pytest.raises(ValueError, match="3 trees cannot be shared among 2 layers"):
        Forest(arrays, 2, E)


def test_without_numba_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "expertflow.compiled", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ValueError, match=r"pip install 'expertflow\[fast\]'"):
        forest_module.compiled()


# -- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mb", [0.3, 1.0, 4.0])
def test_as_many_leaves_as_fit_and_no_more(mb: float) -> None:
    growing = Growing(distances=4, mb=mb, trees=10)
    leaves = growing.leaves_a_tree(6, 40)
    nodes, fixed = leaves - 1, 2 * 4 * 6 * len(KNOTS) + 8 * 61
    size = 60 * (nodes * 8 + leaves * 40) + fixed
    assert size + 4096 <= mb * 1e6
    assert size + 60 * 48 + 60 * 8 + 4096 > mb * 1e6 or leaves == 1 << 12


def test_a_size_for_no_tree_is_refused() -> None:
    with pytest.raises(TraceError, match=r"max_mb=0\.01 is too little for 24 layers"):
        Growing(mb=0.01).leaves_a_tree(24, 60)


# -- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "count", "expected"),
    [
        ([0, 1, 2], [4, 4, 4], [0, 0.25, 0.5]),
        ([2, 1, 3], [4, 4, 4], [0.375, 0.375, 0.75]),
        ([3, 2, 1], [3, 4, 5], [0.5, 0.5, 0.5]),
        ([1, 0, 3], [4, 0, 4], [0.25, 0.25, 0.75]),
        ([0, 0, 1], [0, 0, 2], [0.5, 0.5, 0.5]),
    ],
)
def test_shares_never_fall(hits: list[float], count: list[float], expected: list[float]) -> None:
    found = rising_shares(np.array(hits, float), np.array(count, float))
    assert found.tolist() == [round(value * SCORE_ONE) for value in expected]


def test_shares_equal_isotonic_regression() -> None:
    needs_fit()
    from sklearn.isotonic import IsotonicRegression

    draws = np.random.default_rng(0)
    count = draws.integers(1, 50, size=40).astype(float)
    hits = np.floor(count * np.sort(draws.random(40)) * draws.random(40))
    expected = IsotonicRegression().fit_transform(np.arange(40.0), hits / count, sample_weight=count)
    assert np.abs(rising_shares(hits, count) / SCORE_ONE - expected).max() < 2e-5


def test_tables_pass_through_the_knots_and_keep_the_order_of_the_pregate() -> None:
    knots = np.sort(np.random.default_rng(0).integers(0, SCORE_ONE, size=len(KNOTS))).astype(np.uint16)
    table = calibration_tables(knots)
    assert (table[KNOTS] - knots.astype(int)).tolist() == (KNOTS >> 6).tolist()
    assert (np.diff(table) >= 0).all()
    same = calibration_tables(np.full(len(KNOTS), 500))
    assert (same[[64, 640, 4096]] == [501, 510, 564]).all()


def test_an_uncalibrated_pregate_is_itself() -> None:
    table = calibration_tables(uncalibrated(2)[1]) - (np.arange(CHANCE_ONE + 1) >> 6)
    assert np.abs(table - 16 * np.arange(CHANCE_ONE + 1)).max() <= 1


def test_each_chance_counts_at_its_nearest_knot() -> None:
    hits, count = knot_counts(np.array([[0, 1, 4096], [3970, 130, 130]]), np.array([[0, 1, 1], [1, 0, 1]]))
    where = {int(KNOTS[place]): (hits[place], count[place]) for place in np.flatnonzero(count)}
    assert where == {0: (0, 1), 1: (1, 1), 128: (1, 2), 4096: (2, 2)}
