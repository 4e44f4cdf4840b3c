"""Who leaves is who is least likely to be needed soon, as the predictor sees it; without its view, who was used least.

The predictor writes `view.outlook` after each forward: the chance that an expert is used in the next forwards, nearer
ones weighing more. Within the predicted window the chance for this very layer counts as well. A prefetch may only push
out what is worth less than itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expertflow.forward import Forward
from expertflow.future import Future
from expertflow.parts import DEMAND, SCORE_ONE, Eviction, Scores
from expertflow.view import RESIDENT, View

_TAKEN = 1 << 40


class Outlook(Eviction):
    """One pool. The resident expert with the lowest worth leaves; among equals the lowest key.

    worth: the outlook; for a layer in the window at least the chance predicted for it, until it has run; for an expert
    used in this forward at least `used` (a share of certainty), until the next outlook. margin: a prefetch is refused
    where its chance is not above the victim's worth times `margin` (0 = never refused). Before there is an outlook, or
    with a predictor that gives none, worth is a running share of the forwards that used the expert (`memory` of the old
    kept).
    """

    scope = "global"

    def __init__(self, used: float = 0.1, margin: float = 1.0, memory: float = 0.9) -> None:
        if not 0 <= used <= 1:
            raise ValueError(f"Outlook used={used} must be in 0 … 1")
        if margin < 0:
            raise ValueError(f"Outlook margin={margin} must be 0 (never refuse a prefetch) or more")
        if not 0 <= memory < 1:
            raise ValueError(f"Outlook memory={memory} must be in [0, 1)")
        self.used, self.margin, self.memory = int(used * SCORE_ONE), margin, memory

    def start(self, view: View, future: Future | None) -> None:
        self.view = view
        self.num_experts = view.num_experts
        num_keys = view.num_layers * view.num_experts
        self.shares = np.full(num_keys, view.top_k / view.num_experts)
        """Running share of the forwards that used each expert."""
        soon = np.rint(self.shares * SCORE_ONE) if view.outlook is None else view.outlook
        self.soon = soon.astype(np.int64)
        """Worth as the last forward left it."""
        self.worth = self.soon.copy()
        self.chance = np.zeros(num_keys, np.int64)
        self.held = np.full(num_keys, _TAKEN, np.int64)
        """Worth of what may leave (resident, not demanded by this layer), more than any for the rest."""
        self.demanded: Sequence[int] = ()

    def touched(self, keys: Sequence[int]) -> None:
        self.demanded = keys
        held = self.held
        for key in keys:
            held[key] = _TAKEN

    def admitted(self, key: int, cause: int) -> None:
        """Not to leave before it has landed; what is there from the start has."""
        if self.view.residency[key] == RESIDENT:
            self.held[key] = self.worth[key]

    def landed(self, key: int) -> None:
        if key not in self.view.pinned:
            self.held[key] = self.worth[key]

    def predicted(self, keys: Sequence[int], layer: int, scores: Scores) -> None:
        first = layer * self.num_experts
        own = slice(first, first + self.num_experts)
        chance = self.chance[own]
        chance[:] = 0
        chance[np.array(scores[0], np.intp) - first] = scores[1]
        np.maximum(self.soon[own], chance, out=self.worth[own])
        self._show(own)

    def _show(self, keys: slice) -> None:
        """Bring `held` up to date with `worth`."""
        held = self.held[keys]
        np.copyto(held, self.worth[keys], where=held < _TAKEN)

    def layer_end(self, layer: int, keys: Sequence[int]) -> None:
        first = layer * self.num_experts
        own = slice(first, first + self.num_experts)
        if self.view.outlook is None:
            shares = self.shares[own]
            shares *= self.memory
            for key in keys:
                shares[key - first] += 1 - self.memory
            self.soon[own] = np.rint(shares * SCORE_ONE)
        worth, residency, held = self.worth, self.view.residency, self.held
        worth[own] = self.soon[own]
        self._show(own)
        for key in keys:
            if worth[key] < self.used:
                worth[key] = self.used
            if residency[key] == RESIDENT:
                held[key] = worth[key]
        self.demanded = ()

    def end_forward(self, forward: Forward) -> None:
        outlook = self.view.outlook
        if outlook is not None:
            self.soon = outlook
            self.worth = outlook.copy()
            self._show(slice(None))

    def victim(self, key: int, cause: int) -> int | None:
        found = int(self.held.argmin())
        worth = int(self.held[found])
        if worth < _TAKEN:
            return found if cause == DEMAND or self.chance[key] > worth * self.margin else None
        # More demand than slots: what this layer has launched may leave after all.
        residency, pinned = self.view.residency, self.view.pinned
        free = [k for k in self.demanded if residency[k] == RESIDENT and k not in pinned]
        return min(free, key=self.worth.__getitem__, default=None)

    def evicted(self, key: int, unused: bool) -> None:
        self.held[key] = _TAKEN
