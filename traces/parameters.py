"""The parameter file of the generator (`traces.generate` says what each means): read, checked, written.

Shapes: L layers, K top-k, E experts, M topics, Q factors, H = 2 half-lives, C = K + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.files import replace_file, safetensors_bytes
from traces.layout import MAX_EXPERTS
from traces.limits import check_bytes
from traces.messages import fault
from traces.reading import read_arrays

PARAMETER_FORMAT = "expertflow-routing-parameters"
REMEDY = "make the file anew: python -m traces fit"
GROUP = 64  # requests generated side by side

Arrays = dict[str, npt.NDArray[Any]]


class Rule(NamedTuple):
    """Shape letters of a parameter, and the range of its values; above: `low` itself is outside."""

    letters: str
    low: float = -1e6
    high: float = 1e6
    above: bool = False


REQUIRED: Mapping[str, Rule] = {
    "bias": Rule("LE"),
    "cross": Rule("LEE"),
    "loadings": Rule("LEQ"),
    "residual": Rule("LE", 0.0),
    "topics": Rule("MQ"),
    "topic_length": Rule("M", 0.0, 1e12, above=True),  # of the source's requests, in tokens
    "topic_scale": Rule("L", 0.0),
    "drift_scale": Rule("L", 0.0),
    "repeat": Rule("L"),
    "wander_share": Rule("", 0.0, 1.0),
    "skew": Rule(""),
    "half_lives": Rule("H", 0.0, 1e12, above=True),  # of wander and of drift, in tokens
    "row_size": Rule("LC", 0.0, 1.0),  # probability of 0 … K experts in a row
}
WEIGHTS: Mapping[str, Rule] = {"weight_gap": Rule("LGP", -1e3, 1e3), "weight_sum": Rule("L", 0.0, 65_504.0)}
"""Both or neither: gaps between ranks [L, K − 1, quantiles], and what a row's gate weights add up to."""
_SUM_OFF = 1e-3


def check_params(params: Arrays, path: str | Path = "routing parameters") -> None:
    """TraceError unless every array is there, shapes agree, and every value is in its range; path: for messages."""
    rules = {**REQUIRED, **(WEIGHTS if params.keys() & WEIGHTS.keys() else {})}
    sizes: dict[str, int] = {"H": 2}
    for name, rule in rules.items():
        if name not in params:
            raise fault(path, f"array {name!r}", "is missing", REMEDY)
        shape = params[name].shape
        known = tuple(sizes.setdefault(letter, size) for letter, size in zip(rule.letters, shape, strict=False))
        if len(shape) != len(rule.letters) or shape != known or (0 in shape and name not in WEIGHTS):
            agreed = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
            problem = f"has the shape {list(shape)}, it must be [{', '.join(rule.letters)}] with {agreed}"
            raise fault(path, f"array {name!r}", problem, REMEDY)
    if not 1 < sizes["C"] <= sizes["E"] + 1 or sizes["E"] > MAX_EXPERTS:
        problem = f"allows {sizes['C'] - 1} of {sizes['E']} experts"
        raise fault(path, "array 'row_size'", problem, f"it must be 1 … E of at most {MAX_EXPERTS}; {REMEDY}")
    if "P" in sizes and (sizes["G"] != sizes["C"] - 2 or sizes["P"] < 2):
        problem = f"has the shape {list(params['weight_gap'].shape)}, it must be [L, {sizes['C'] - 2}, 2 or more]"
        raise fault(path, "array 'weight_gap'", problem, REMEDY)
    for name, rule in rules.items():
        _check_values(path, name, rule, params[name])
    _check_row_sizes(path, params["row_size"])


def _check_values(path: str | Path, name: str, rule: Rule, array: npt.NDArray[Any]) -> None:
    if array.dtype.kind not in "fiu":
        raise fault(path, f"array {name!r}", f"holds {array.dtype}", f"it must hold numbers; {REMEDY}")
    if array.dtype.itemsize < 4:
        # Half precision would have the bounds rounded to its own, with a warning of numpy's.
        array = array.astype(np.float64)
    inside = (array > rule.low) if rule.above else (array >= rule.low)
    inside &= array <= rule.high
    if not inside.all():
        at = np.unravel_index(int(np.argmin(inside)), array.shape)
        place = "".join(f"[{int(index)}]" for index in at)
        bound = f"above {rule.low:g}" if rule.above else f"{rule.low:g} or more"
        problem = f"is {float(array[at]):g}, it must be {bound} and at most {rule.high:g}"
        raise fault(path, f"array {name!r}{place}", problem, REMEDY)


def _check_row_sizes(path: str | Path, sizes: npt.NDArray[Any]) -> None:
    """A layer's shares add up to one, and no row is empty."""
    total = sizes.astype(np.float64).sum(axis=1)
    if (wrong := np.abs(total - 1) > _SUM_OFF).any():
        layer = int(np.argmax(wrong))
        problem = f"adds up to {total[layer]:g}, shares of one must add up to 1"
        raise fault(path, f"array 'row_size'[{layer}]", problem, REMEDY)
    if (empty := sizes[:, 0] > 0).any():
        layer = int(np.argmax(empty))
        problem = f"is {float(sizes[layer, 0]):g}: a token chooses an expert in every layer"
        raise fault(path, f"array 'row_size'[{layer}][0]", problem, REMEDY)


def load_params(path: str | Path) -> tuple[Arrays, dict[str, str]]:
    """Arrays and header of a parameter file. TraceError names file, array and value of what is wrong."""
    path = Path(path)
    params, header = read_arrays(path, REMEDY)
    if header.get("format") != PARAMETER_FORMAT:
        found = header["format"][:40] if "format" in header else None
        remedy = f"a parameter file has {PARAMETER_FORMAT!r}; {REMEDY}"
        raise fault(path, "header", f"format is {found!r}", remedy)
    check_params(params, path)
    check_bytes(path, "arrays", generator_bytes(params))
    return params, header


def generator_bytes(params: Arrays) -> int:
    """At most so many bytes the generator takes beside the trace: float64 copies, and the state of `GROUP` requests."""
    state = GROUP * (params["bias"].size + int(params["loadings"].shape[2]))
    return 8 * (3 * sum(array.size for array in params.values()) + 16 * state)


def save_params(path: str | Path, params: Arrays, **header: str) -> None:
    """Write a parameter file, whole or not at all; `header` says what it was fitted to."""
    check_params(params)
    told = {"format": PARAMETER_FORMAT, "format_version": "1", **header}
    replace_file(Path(path), safetensors_bytes(params, told))
