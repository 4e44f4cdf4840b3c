"""The step size that the paper's formula asks for: S = N_e · E_s / (C_s · T_l) (arXiv 2510.26730)."""

from __future__ import annotations

from math import ceil

from expertflow.diversity import embedding_distance
from expertflow.forward import KnownForward
from expertflow.pace import Pace, running_mean
from expertflow.view import View


class StepFormula:
    """Evaluated once a forward on exponential means (`memory` of the old kept) of what was observed.

    limit: the largest step. dist_exponent: N_e is corrected by how diverse the batch is, times (Dist per pair of
    tokens / its running mean) to this power; 0 = not at all. copy_ns: what a copy of an expert takes; 0 = not known.
    """

    def __init__(self, view: View, limit: int, memory: float, dist_exponent: float) -> None:
        self.view = view
        self.limit = limit
        self.pace = Pace(view, memory)
        self.dist_exponent = dist_exponent
        self.pair_distance = 0.0
        self.copy_ns = 0.0

    def evaluate(self, num_expected: float, forward: KnownForward) -> int:
        """The step in layers, 1 … limit, for N_e experts a layer; 0 = not enough was observed yet."""
        pace = self.pace
        pace.look()
        expected = num_expected * self._diversity(forward)
        self.copy_ns = self.view.expert_bytes / pace.bytes_per_ns if pace.bytes_per_ns > 0 else 0.0
        if self.copy_ns <= 0 or pace.layer_ns <= 0:
            return 0
        return min(max(ceil(expected * self.copy_ns / pace.layer_ns), 1), self.limit)

    def _diversity(self, forward: KnownForward) -> float:
        """The correction of N_e for the tokens of this forward; 1 where it is off or nothing is known."""
        pairs = forward.num_tokens * (forward.num_tokens - 1) / 2
        if not self.dist_exponent or not pairs or forward.recorded is None:
            return 1.0
        vectors = forward.recorded.embedding(forward.rows)
        if vectors is None:
            return 1.0
        distance = embedding_distance(vectors) / pairs
        self.pair_distance = running_mean(self.pair_distance, distance, self.pace.memory)
        return float((distance / self.pair_distance) ** self.dist_exponent) if self.pair_distance else 1.0
