"""Transition counts: how often experts of one layer follow those of another, and their log-odds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from expertflow.network import origin_of

Floats = npt.NDArray[np.float64]

_MOST_FORWARDS = 1e12


class TransitionCounts:
    """frequency [L, E]: forwards in which the expert was active, per token. cross [D, L, E, E]: source layer l
    and expert, target expert at layer l + d (past the last layer: of the next forward). persistence [L, E, E]:
    the same layer in the forward before."""

    def __init__(self, num_layers: int, num_experts: int, max_distance: int) -> None:
        self.L, self.E, self.D = num_layers, num_experts, max_distance
        self.num_forwards = 0.0
        self.frequency: Floats = np.zeros((num_layers, num_experts))
        self.cross: Floats = np.zeros((max_distance, num_layers, num_experts, num_experts))
        self.persistence: Floats = np.zeros((num_layers, num_experts, num_experts))

    def load(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Start from fitted counts. Raises ValueError if they are of another model, or no counts that can be."""
        origin = origin_of(arrays, "fitted transition counts")
        shapes = {"frequency": (self.L, self.E), "persistence": (self.L, self.E, self.E), "num_forwards": (1,)}
        for name, shape in shapes.items():
            if name not in arrays or arrays[name].shape != shape:
                found = arrays[name].shape if name in arrays else "nothing"
                raise ValueError(
                    f"{origin}: {name} has shape {found}, the trace needs {shape}; "
                    "fit them on a trace of the same model (python -m traces fit-predictor)"
                )
        cross = arrays.get("cross")
        if cross is None or cross.ndim != 4 or cross.shape[1:] != (self.L, self.E, self.E):
            raise ValueError(
                f"{origin}: cross must be [D, {self.L}, {self.E}, {self.E}]; "
                "fit them on a trace of the same model (python -m traces fit-predictor)"
            )
        remedy = "fit them anew (python -m traces fit-predictor kind=transition)"
        for name in (*shapes, "cross"):
            if arrays[name].dtype.kind not in "fiu":
                raise ValueError(f"{origin}: {name} must hold counts, it holds {arrays[name].dtype}; {remedy}")
        values = {name: np.asarray(arrays[name], np.float64) for name in (*shapes, "cross")}
        num_forwards = float(values["num_forwards"][0])
        if not 0 <= num_forwards <= _MOST_FORWARDS:
            raise ValueError(f"{origin}: num_forwards is {num_forwards:g}, it must be 0 or more; {remedy}")
        for name, value in values.items():
            # Counts of a forward are shares of its tokens, at most 1; what was rounded may be a half above.
            if value.size and not (value.min() >= 0 and value.max() <= num_forwards + 1):
                raise ValueError(
                    f"{origin}: {name} holds values that are no counts of {num_forwards:g} forwards "
                    f"(negative, NaN or larger); {remedy}"
                )
            if not num_forwards and value.any():
                raise ValueError(f"{origin}: num_forwards is 0, and {name} holds counts of some; {remedy}")
        self.num_forwards = num_forwards
        self.frequency += values["frequency"]
        self.persistence += values["persistence"]
        num = min(self.D, len(cross))
        self.cross[:num] += values["cross"][:num]

    def learn(self, forwards: Sequence[tuple[Floats, int]], num_distances: int | None = None) -> None:
        """Add consecutive forwards, each (activation counts [L, E], tokens); the first is only the one before.

        num_distances: learn cross-layer counts up to this distance only (None = all). A forward of n tokens adds
        its shares, so that prefill does not drown decode.
        """
        shares = np.stack([activations / tokens for activations, tokens in forwards])
        # Contiguous, so that the products go to BLAS.
        before = np.ascontiguousarray(shares[:-1].transpose(1, 2, 0))
        sources = np.ascontiguousarray(shares[1:].transpose(1, 2, 0))
        now = np.ascontiguousarray(shares[1:].transpose(1, 0, 2))
        self.num_forwards += len(shares) - 1
        self.frequency += shares[1:].sum(axis=0)
        # Fresh memory for each product takes longer than the product, where experts are many.
        added = np.empty_like(self.persistence)
        self.persistence += np.matmul(before, now, out=added)
        for distance in range(1, (self.D if num_distances is None else num_distances) + 1):
            inside = self.L - distance
            np.matmul(sources[:inside], now[distance:], out=added[:inside])
            # Past the last layer the target belongs to the next forward: pairs (i - 1, i).
            np.matmul(before[inside:], now[:distance], out=added[inside:])
            self.cross[distance - 1] += added

    def log_odds(
        self, smoothing: float, num_distances: int, into: Floats | None = None
    ) -> tuple[Floats, Floats, Floats]:
        """(cross [num_distances, L, E, E], persistence, popularity): log P(b | a) / P(b), twice, and log P(b), in nats.

        P(b | a) is smoothed with `smoothing` counts of P(b), which itself starts uniform. into: where `cross` is
        written if it has that shape, such as an earlier answer that is no longer needed.
        """
        popularity = (self.frequency + smoothing / self.E) / (self.num_forwards + smoothing)
        sources = self.frequency[:, :, None]
        persistence = self._ratio(self.persistence, sources, popularity[:, None, :], smoothing)
        cross = self.cross[:num_distances]
        if num_distances:
            targets = np.stack([np.roll(popularity, -d, axis=0) for d in range(1, num_distances + 1)])
            cross = self._ratio(cross, sources[None], targets[:, :, None, :], smoothing, into)
        return cross, persistence, np.log(popularity)

    @staticmethod
    def _ratio(counts: Floats, sources: Floats, target: Floats, smoothing: float, into: Floats | None = None) -> Floats:
        # In place, log((counts + smoothing * target) / (sources + smoothing) / target): tables of many experts are
        # hundreds of megabytes, and fresh memory for each step took longer than the steps.
        made = np.empty_like(counts) if into is None or into.shape != counts.shape else into
        np.add(counts, smoothing * target, out=made)
        made /= sources + smoothing
        made /= target
        return np.log(made, out=made)
