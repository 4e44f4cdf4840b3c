"""Rows of a trace in blocks, as forwards of one token: what was chosen, what was before, and the pre-gate.

What fitted predictors learn from and are scored on. Shape letters: n rows of a block, L layers, E experts, D distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from expertflow.features import LAYERS_BACK, NUM_HASHES, SHARE_ONE, Small, hashed, num_features, write_features
from traces.batching import RecordedRows
from traces.reader import Trace

BLOCK_ROWS = 256
Singles = npt.NDArray[np.float32]


@dataclass
class RowBlock:
    """Rows first … first + n - 1 of a trace.

    chosen float32 [n, L, E], 0 or 1; before [n, L, E], of the row before in the same request, else 0; after [n, L, E],
    of the row after; ends bool [n], there is none; starts bool [n], the row begins its request; tokens int64 [n], -1
    where not recorded; has_pregate.
    """

    trace: Trace
    first: int
    chosen: Singles
    before: Singles
    after: Singles
    starts: npt.NDArray[np.bool_]
    ends: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int64]
    has_pregate: bool
    _places: npt.NDArray[np.int64] | None = field(default=None, repr=False)
    _pregate: tuple[int, Singles | None] = field(default=(-1, None), repr=False)
    _shares: Small | None = field(default=None, repr=False)

    @property
    def num_rows(self) -> int:
        """n."""
        return len(self.chosen)

    def take(self, rows: npt.NDArray[np.int64]) -> RowBlock:
        """Some of the rows; whatever their order."""
        some = replace(
            self,
            chosen=self.chosen[rows],
            before=self.before[rows],
            after=self.after[rows],
            starts=self.starts[rows],
            ends=self.ends[rows],
            tokens=self.tokens[rows],
            _places=rows if self._places is None else self._places[rows],
        )
        some._shares = None
        some._pregate = (-1, None)
        return some

    def pregate(self, layer: int) -> Singles | None:
        """The pre-gate's chances [n, D, E] recorded at `layer`, NaN past the last layer; None where there is none."""
        if not self.has_pregate:
            return None
        if self._pregate[0] != layer:
            places = range(self.num_rows) if self._places is None else self._places.tolist()
            rows = [self.first + place for place in places]
            self._pregate = (layer, RecordedRows(self.trace).lookahead(rows, layer))
        return self._pregate[1]

    def features(self, layer: int, distance: int, rows: npt.NDArray[np.int64] | None = None) -> Small:
        """The forest's features [n, F], of all rows or some, as `expertflow.features.ForwardFeatures` gives them."""
        L, E = self.chosen.shape[1:]
        some = np.arange(self.num_rows) if rows is None else rows
        if self._shares is None:
            history = np.concatenate([self.before, self.chosen], axis=1)[:, max(L - LAYERS_BACK, 0) :]
            # A model of fewer layers than are looked back on has zeros before them.
            history = np.pad(history, ((0, 0), (LAYERS_BACK + L - history.shape[1], 0), (0, 0)))
            self._shares = (history * SHARE_ONE).astype(np.int16).reshape(self.num_rows, -1)
        out: Small = np.zeros((len(some), num_features(E)), np.int16)
        if self.tokens[0] >= 0:
            out[np.arange(len(some)), num_features(E) - NUM_HASHES - 4 + hashed(self.tokens[some])] = 1
        out[:, -3] = 1
        inside = layer + distance < L
        found = self.pregate(layer) if inside else None
        chance = None if found is None else found[some, distance - 1]
        write_features(out, self._shares[some], chance, layer, distance, L, E)
        return out

    def truth(self, layer: int, distance: int) -> Singles:
        """What the target layer chose [n, E]: in the row itself, past the last layer in the row after."""
        L = self.chosen.shape[1]
        target = layer + distance
        return self.chosen[:, target] if target < L else self.after[:, target - L]


def num_distances(trace: Trace) -> int:
    """How many layers ahead the trace's pre-gate was recorded; 0 without one."""
    found = trace.lookahead if trace.lookahead is not None else trace.lookahead_ids
    return 0 if found is None else int(found.shape[2])


def row_blocks(trace: Trace, requests: range, size: int = BLOCK_ROWS) -> Iterator[RowBlock]:
    """The rows of requests in trace order, `size` at a time."""
    start, stop = int(trace.request_start[requests.start]), int(trace.request_start[requests.stop])
    begins = np.zeros(stop - start + 1, bool)
    begins[np.asarray(trace.request_start[requests.start : requests.stop + 1]) - start] = True
    last = np.zeros((1, trace.num_layers, trace.num_experts), np.float32)
    for first in range(start, stop, size):
        end = min(first + size, stop)
        held = _one_hot(trace, first, min(end + 1, stop))
        if end == stop:
            held = np.concatenate([held, np.zeros_like(held[:1])])
        starts, ends = begins[first - start : end - start], begins[first - start + 1 : end - start + 1]
        chosen = held[:-1]
        before = np.where(starts[:, None, None], 0, np.concatenate([last, chosen[:-1]])).astype(np.float32)
        ids = trace.token_ids
        tokens = np.full(end - first, -1) if ids is None else np.asarray(ids[first:end])
        yield RowBlock(
            trace, first, chosen, before, held[1:], starts, ends, tokens.astype(np.int64), num_distances(trace) > 0
        )
        last = chosen[-1:]


def _one_hot(trace: Trace, first: int, stop: int) -> Singles:
    ids = np.asarray(trace.experts[first:stop])
    # Padding falls into the last column, which is cut off.
    index = np.minimum(ids.astype(np.int64), trace.num_experts)
    made = np.zeros((*ids.shape[:2], trace.num_experts + 1), np.float32)
    np.put_along_axis(made, index, np.float32(1), axis=2)
    return made[:, :, : trace.num_experts]
