"""Counting transitions of a trace, for the transition predictor's start (`expertflow.transitions`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertflow.transitions import TransitionCounts
from traces.batching import BatchConfig, Batches
from traces.limits import check_pairs
from traces.reader import Trace

_BLOCK = 256
_LARGEST = np.iinfo(np.uint16).max


@dataclass(frozen=True, kw_only=True)
class TransitionOptions:
    """What `fit-predictor kind=transition` may be told. distances: layers ahead that are counted."""

    distances: int = 8


def fit_transition(
    trace: Trace, report: Callable[[str], None], options: TransitionOptions
) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, str]]:
    """Counts over the whole trace at batch 1; the file's arrays and header."""
    counts = count_transitions(trace, options.distances)
    report(f"{trace.num_tokens} tokens of {trace.name}, {counts.D} distances")
    return to_arrays(counts), {"fitted_to": trace.name, "num_tokens": str(trace.num_tokens)}


def count_transitions(trace: Trace, max_distance: int) -> TransitionCounts:
    """Transition counts over a trace at batch 1."""
    check_pairs(trace.paths[0], trace.num_layers, trace.num_experts, max_distance + 1)
    counts = TransitionCounts(trace.num_layers, trace.num_experts, min(max_distance, trace.num_layers - 1))
    shape = (trace.num_layers, trace.num_experts)
    recent: list[tuple[npt.NDArray[np.float64], int]] = [(np.zeros(shape), 1)]
    for forward in Batches(trace, BatchConfig()):
        active = np.zeros(shape)
        for layer, keys in enumerate(forward.demands):
            for key in keys:
                tokens = 1 if forward.counts is None else forward.counts[layer][key]
                active[layer, key - layer * trace.num_experts] = tokens
        recent.append((active, forward.num_tokens))
        if len(recent) > _BLOCK:
            counts.learn(recent)
            recent = recent[-1:]
    if len(recent) > 1:
        counts.learn(recent)
    return counts


def to_arrays(counts: TransitionCounts) -> dict[str, npt.NDArray[np.generic]]:
    """Counts in 16 bits, scaled down if the trace is longer than that holds."""
    scale = min(1.0, _LARGEST / max(counts.num_forwards, 1.0))
    arrays = {"frequency": counts.frequency, "cross": counts.cross, "persistence": counts.persistence}
    scaled: dict[str, npt.NDArray[np.generic]] = {
        name: np.rint(value * scale).astype(np.uint16) for name, value in arrays.items()
    }
    scaled["num_forwards"] = np.array([counts.num_forwards * scale])
    return scaled
