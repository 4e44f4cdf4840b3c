"""A trace as what the history network learns from: weighted routing, what was used before, what came after.

Letters as in `expertflow.network`; T rows. Whatever the network sees at run time is made the same way here, in floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.network import LOG_FLOOR, OWN_SHIFTS, SHIFTS
from traces.batching import RecordedRows
from traces.container import fault
from traces.reader import Trace

WEIGHT_SUM = 32
"""Rank weights are whole and add up to about this."""
MAX_ROWS = 60_000
Singles = npt.NDArray[np.float32]


def rank_weights(trace: Trace, rows: int) -> npt.NDArray[np.int64]:
    """Mean gate weight of the best, second … expert as whole numbers [K]; equal where none were recorded."""
    if trace.weights is None:
        return np.full(trace.top_k, max(round(WEIGHT_SUM / trace.top_k), 1), np.int64)
    mean = np.asarray(trace.weights[:rows]).astype(np.float64).mean(axis=(0, 1))
    whole: npt.NDArray[np.int64] = np.maximum(np.rint(WEIGHT_SUM * mean / mean.sum()), 1).astype(np.int64)
    return whole


@dataclass(frozen=True)
class Dataset:
    """Rows 0 … T - 1 of whole requests.

    experts int64 [T, L, K]; routing [T, L·E], rank weights / (WEIGHT_SUM / 2) where chosen; chosen [T, L, E], 0 or 1;
    sums [R, T, L·E], routing remembered at each rate before the row; use [T, L, E, F - 1], remembered use before the
    row; shares [T, L, E], use in the row before; future [T, L, E], discounted use after the row; last [T], the row ends
    its request.
    """

    weights: npt.NDArray[np.int64]
    experts: npt.NDArray[np.int64]
    routing: Singles
    chosen: Singles
    sums: Singles
    use: Singles
    shares: Singles
    future: Singles
    last: npt.NDArray[np.bool_]
    mean_routing: Singles
    frequency: Singles

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.experts)


def read_dataset(trace: Trace, requests: range, discount: float, like: Dataset | None = None) -> Dataset:
    """Rows of the requests. like: take rank weights and the start of a request from that (a training set's).

    ValueError where rows have fewer than K experts or there are too many rows for memory.
    """
    first, stop = int(trace.request_start[requests.start]), int(trace.request_start[requests.stop])
    if stop - first > MAX_ROWS:
        raise ValueError(f"{stop - first} rows are more than are fitted at once ({MAX_ROWS}); give rows=N")
    experts = np.asarray(trace.experts[first:stop]).astype(np.int64)
    T, L = experts.shape[:2]
    E = trace.num_experts
    if experts.size and experts.max() >= E:
        problem = "has rows with fewer than top_k experts"
        raise fault(trace.paths[0], "experts", problem, "such traces cannot be fitted yet")
    weights = rank_weights(trace, stop) if like is None else like.weights
    routing, chosen = np.zeros((T, L, E), np.float32), np.zeros((T, L, E), np.float32)
    shown = np.broadcast_to((weights / (WEIGHT_SUM / 2)).astype(np.float32), experts.shape)
    np.put_along_axis(routing, experts, shown, axis=2)
    np.put_along_axis(chosen, experts, np.float32(1), axis=2)
    mean_routing = routing.mean(axis=0) if like is None else like.mean_routing
    frequency = chosen.mean(axis=0) if like is None else like.frequency
    starts = np.zeros(T, bool)
    begins = np.asarray(trace.request_start[requests.start : requests.stop]) - first
    starts[begins] = True
    rates = np.array([2.0**-shift for shift in SHIFTS], np.float32)[:, None, None]
    own_rates = np.array([2.0**-shift for shift in OWN_SHIFTS], np.float32)
    sums = np.zeros((len(SHIFTS), T, L * E), np.float32)
    use = np.zeros((T, L, E, len(OWN_SHIFTS)), np.float32)
    shares = np.zeros((T, L, E), np.float32)
    kept, used = np.zeros((len(SHIFTS), L, E), np.float32), np.zeros((L, E, len(OWN_SHIFTS)), np.float32)
    for row in range(T):
        if starts[row]:
            kept = np.repeat(mean_routing[None], len(SHIFTS), axis=0)
            used = np.repeat(frequency[..., None], len(OWN_SHIFTS), axis=-1)
        else:
            shares[row] = chosen[row - 1]
        sums[:, row] = kept.reshape(len(SHIFTS), -1)
        use[row] = used
        kept = kept + (routing[row] - kept) * rates
        used = used + (chosen[row][..., None] - used) * own_rates
    future = np.zeros((T, L, E), np.float32)
    ahead = np.zeros((L, E), np.float32)
    for row in range(T - 2, -1, -1):
        ahead = discount * ahead + (1 - discount) * chosen[row + 1]
        future[row] = ahead
    last = np.append(starts[1:], True)
    return Dataset(
        weights, experts, routing.reshape(T, -1), chosen, sums, use, shares, future, last, mean_routing, frequency
    )


def log_use(use: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Remembered use as the network is shown it."""
    return np.log(use + LOG_FLOOR)


def read_pregate(trace: Trace, dataset_first: int, num_rows: int) -> npt.NDArray[np.float16] | None:
    """Chances [T, L, D, E] of the recorded pre-gate, 0 past the last layer; None where a trace has none."""
    if trace.lookahead is None and trace.lookahead_ids is None:
        return None
    recorded = RecordedRows(trace)
    layers = []
    for layer in range(trace.num_layers):
        found = recorded.lookahead(range(dataset_first, dataset_first + num_rows), layer)
        assert found is not None
        layers.append(np.nan_to_num(found).astype(np.float16))
    return np.stack(layers, axis=1)
