"""What a pre-gate says, in the form that traces store, and how often it was right.

A pre-gate guesses, at layer l, what the router of layer l+d will choose: that router, applied early. Knows tensors
only. Shape letters: n tokens, L MoE layers, K top-k, E experts, D distances ahead, M listed candidates.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

KINDS = ("residual", "normed")
"""residual: the hidden state that enters the MoE block of layer l, before its norm, through the pre-MoE norm of layer
l+d, then the router of layer l+d. The attention of layer l is in that state, unless the model runs both side by side.
normed: the router input of layer l as it is (normed with layer l's own norm), through the router of layer l+d."""


def ranking(logits: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [n,E] in the order the router prefers them, and their logits [n,E] dealt out in that order.

    logits float32 [n,E], chosen [n,K] the ids that the router chose on the same input. What was chosen comes first,
    the rest follows by logit: a router may choose by more than its logits (a correction bias, groups of experts).
    For one that does not, this is plain sorting. Otherwise the largest logits go to the chosen ones, so that whoever
    ranks by the stored scores finds the router's own choice.
    """
    span = logits.amax(dim=1, keepdim=True) - logits.amin(dim=1, keepdim=True) + 1.0
    bonus = torch.zeros_like(logits).scatter(1, chosen, span.expand(-1, chosen.shape[1]).contiguous())
    order = torch.argsort(logits + bonus, dim=1, descending=True, stable=True)
    return order, torch.sort(logits, dim=1, descending=True).values


def chances(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """How likely each expert is chosen, [n,E] in 0 … 1: min(1, K · softmax), as readers of `lookahead` take it."""
    return torch.clamp(top_k * torch.softmax(logits, dim=1), max=1.0)


def listed(logits: torch.Tensor, chosen: torch.Tensor, top_k: int, num_listed: int) -> tuple[torch.Tensor, ...]:
    """The M best candidates, ids int64 [n,M] and their chances in 1/255, uint8 [n,M]."""
    order, values = ranking(logits, chosen)
    scores = torch.round(255 * chances(values, top_k)[:, :num_listed]).to(torch.uint8)
    return order[:, :num_listed], scores


def dense(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Scores of all experts, float16 [n,E]: the logits, as dealt out by `ranking`."""
    order, values = ranking(logits, chosen)
    return torch.empty_like(values).scatter(1, order, values).to(torch.float16)


def num_right(guessed: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """How many of `actual` [n,K] are among `guessed` [n,K] (in both −1 = none); uint8 [n]."""
    found = (actual[:, :, None] == guessed[:, None, :]).any(dim=2) & (actual >= 0)
    return found.sum(dim=1).to(torch.uint8)


class Recall:
    """Recall@K of each kind of pre-gate by distance: of what layer l+d chose, the share that was among its top K."""

    def __init__(self, num_layers: int, distances: int) -> None:
        self.num_layers, self.distances = num_layers, distances
        self._right: dict[str, npt.NDArray[np.int64]] = {}
        self._chosen = np.zeros(distances, np.int64)

    def add(self, hits: Mapping[str, npt.NDArray[np.uint8]], experts: npt.NDArray[np.int32]) -> None:
        """Count rows: hits by kind, [n,L,D], at (l, d−1) for layer l+d; experts [n,L,K], −1 = none."""
        for kind, found in hits.items():
            self._right[kind] = self._right.get(kind, 0) + found.sum(axis=(0, 1), dtype=np.int64)
        chosen = (experts >= 0).sum(axis=(0, 2))
        self._chosen += [int(chosen[d:].sum()) for d in range(1, self.distances + 1)]

    def by_distance(self) -> dict[str, list[float]]:
        """kind → recall at 1 … D layers ahead, 0 … 1."""
        return {kind: (right / np.maximum(self._chosen, 1)).tolist() for kind, right in self._right.items()}

    def best(self) -> str:
        """The kind with the higher mean over the distances; of equals the one that is first in KINDS."""
        table = self.by_distance()
        return max((kind for kind in KINDS if kind in table), key=lambda kind: sum(table[kind]))
