"""Regression forests as flat integer arrays, one forest per target layer, evaluated in compiled code.

A forest adds its mean leaf to the pre-gate's calibrated chance. Features, thresholds and leaves are integers, so the
sum is exact in any order and a score is the same on every machine. Knows arrays; no traces, files or scikit-learn.
Shape letters: L target layers, E experts, B trees of a layer, I inner nodes, V leaves, D distances, F features.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.features import CHANCE_ONE, num_features
from expertflow.network import origin_of

Arrays = Mapping[str, npt.NDArray[np.generic]]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]

LEAF_ONE = 1 << 7
"""Leaves are int8 in units of 1/128."""
KNOTS = np.array(
    [0, 1, 2, 4, 8, 16, *range(32, 128, 16), *range(128, 512, 32), *range(512, 1024, 64), *range(1024, 4097, 256)],
    np.int64,
)
"""Pre-gate chances, in 1/4096, at which the calibrated chance is stored; linear between them."""
_ORDER_SHIFT = 6
_INT16 = (-(1 << 15), (1 << 15) - 1)
_MOST_PLACES = 1 << 60
_REMEDY = "fit one on a trace of the same model (python -m traces fit-predictor)"


def calibration_tables(knots: npt.NDArray[np.generic]) -> Words:
    """Calibrated chances in 2^-16 by the pre-gate's chance, int32 [..., 4097], from values at KNOTS [..., len(KNOTS)].

    Up to 2^-10 is added in the pre-gate's own order, so that chances calibrated alike do not tie.
    """
    values = knots.astype(np.int64)
    chance = np.arange(CHANCE_ONE + 1)
    left = np.clip(np.searchsorted(KNOTS, chance, side="right") - 1, 0, len(KNOTS) - 2)
    width = KNOTS[left + 1] - KNOTS[left]
    between = (values[..., left + 1] - values[..., left]) * (chance - KNOTS[left]) // width
    return np.ascontiguousarray(values[..., left] + between + (chance >> _ORDER_SHIFT), dtype=np.int32)


class Forest:
    """Fitted arrays, checked, in the types they are evaluated in.

    arrays: nodes int16 [I, 4] (feature, threshold, left, right: go left if feature ≤ threshold; a child ≥ 0 is an
    inner node and < 0 the leaf ~child, both counted from the tree's first), first_node and first_leaf int32 [L·B + 1],
    leaves int8 [V, E], calibration uint16 [D, L, len(KNOTS)], max_tokens int32 [1] (of the forwards it was fitted to).
    ValueError names what does not fit the model.
    """

    def __init__(self, arrays: Arrays, num_layers: int, num_experts: int) -> None:
        self.L, self.E = num_layers, num_experts
        origin = origin_of(arrays, "fitted forest")
        nodes = _array(arrays, "nodes", (None, 4), "i", _INT16)
        self.leaves = _array(arrays, "leaves", (None, num_experts), "i", (-128, 127)).astype(np.int8)
        calibration = _array(arrays, "calibration", (None, num_layers, len(KNOTS)), "iu", (0, (1 << 16) - 1))
        first_node = _array(arrays, "first_node", (None,), "i", (0, _MOST_PLACES)).astype(np.int64)
        first_leaf = _array(arrays, "first_leaf", (None,), "i", (0, _MOST_PLACES)).astype(np.int64)
        self.max_tokens = int(_array(arrays, "max_tokens", (1,), "i", (1, 1 << 30))[0])
        self.D = len(calibration)
        self.B = (len(first_node) - 1) // num_layers
        if self.B < 1 or self.B > 1024 or len(first_node) != num_layers * self.B + 1 or self.D < 1:
            raise ValueError(
                f"{origin}: {len(first_node) - 1} trees cannot be shared among {num_layers} layers; {_REMEDY}"
            )
        absolute = _absolute(nodes.astype(np.int64), first_node, first_leaf, len(self.leaves), num_experts)
        if absolute is None:
            raise ValueError(f"{origin}: its trees are damaged; {_REMEDY}")
        self.nodes = absolute
        self.roots = first_node[:-1].reshape(num_layers, self.B).astype(np.int32)
        self.tables = calibration_tables(calibration)

    def scores(self, features: npt.NDArray[np.int16], target: int, distance: int) -> Ints:
        """Chances [E] in 2^-16 from one vector of features."""
        out = np.empty(self.E, np.int64)
        compiled()(self.nodes, self.roots[target], self.leaves, self.tables[distance - 1, target], features, out)
        return out


def _array(
    arrays: Arrays, name: str, shape: Sequence[int | None], kinds: str, within: tuple[int, int]
) -> npt.NDArray[Any]:
    origin = origin_of(arrays, "fitted forest")
    if name not in arrays:
        raise ValueError(f"{origin}: {name} is missing; write it with python -m traces fit-predictor")
    found = arrays[name]
    if found.ndim != len(shape) or any(w not in (None, h) for w, h in zip(shape, found.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{origin}: {name} has shape {found.shape}, the trace needs ({wanted}); {_REMEDY}")
    if found.dtype.kind not in kinds:
        raise ValueError(f"{origin}: {name} must hold whole numbers, it holds {found.dtype}; {_REMEDY}")
    values, (least, most) = np.asarray(found), within
    if values.size and not (values.min() >= least and values.max() <= most):
        worst = values.max() if values.max() > most else values.min()
        raise ValueError(f"{origin}: {name} holds {worst}, it must be {least} … {most}; {_REMEDY}")
    return values


def _absolute(nodes: Ints, first_node: Ints, first_leaf: Ints, num_leaves: int, num_experts: int) -> Words | None:
    """Nodes whose children count from the first of all; None where a walk might leave its tree, or not end."""
    sizes, leaves = np.diff(first_node), np.diff(first_leaf)
    sound = (
        len(first_leaf) == len(first_node)
        and first_node[0] == 0
        and first_leaf[0] == 0
        and first_node[-1] == len(nodes)
        and first_leaf[-1] == num_leaves
        and (sizes > 0).all()
        and (leaves > 0).all()
    )
    if sound:
        tree = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(len(nodes)) - first_node[tree]
        children = nodes[:, 2:]
        # A child that comes after its parent is a walk that ends.
        inner = (children > place[:, None]) & (children < sizes[tree, None])
        outer = (children < 0) & (~children < leaves[tree, None])
        features = (nodes[:, 0] >= 0) & (nodes[:, 0] < num_features(num_experts))
        sound = bool((inner | outer).all() and features.all())
    if not sound:
        return None
    absolute = np.where(children < 0, ~(~children + first_leaf[tree, None]), children + first_node[tree, None])
    return np.ascontiguousarray(np.concatenate([nodes[:, :2], absolute], axis=1), dtype=np.int32)


def compiled() -> Callable[..., None]:
    """`compiled.evaluate_forest`; ValueError where numba is missing."""
    try:
        found: Callable[..., None] = importlib.import_module("expertflow.compiled").evaluate_forest
    except ImportError:
        raise ValueError("the forest predictor needs numba; install it: pip install 'expertflow[fast]'") from None
    return found
