"""Who leaves is who is least likely to be needed soon, as the predictor sees it; without its view, who was used least.

After each forward the predictor's forecast comes in (`foreseen`): the chance that an expert is used in the next
forwards, nearer ones weighing more. Within the predicted window the chance for this very layer counts as well. A
prefetch may only push out what is worth less than itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt

from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.network import compiled_functions
from expertflow.parts import DEMAND, Eviction, Prediction, Worths
from expertflow.units import SCORE_ONE, TAKEN
from expertflow.view import RESIDENT, View


class Outlook(Eviction):
    """One pool. The resident expert with the lowest worth leaves; among equals the lowest key.

    worth: the forecast; for a layer in the window at least the chance predicted for it, until it has run; for an expert
    used in this forward at least `used` (a share of certainty), until the next forecast. margin: a prefetch is refused
    where its chance is not above the victim's worth times `margin` (0 = never refused). Before there is a forecast, or
    with a predictor that gives none, worth is a running share of the forwards that used the expert (`memory` of the old
    kept).
    """

    scope = "global"
    at_once: ClassVar[bool] = True

    def __init__(
        self,
        used: Annotated[float, Rule(0, 1, about="least worth of an expert used in this forward")] = 0.1,
        margin: Annotated[
            float,
            Rule(0, 1_000_000, about="times a victim's worth is what a prefetch must exceed, 0 = any does"),
        ] = 1.0,
        memory: Annotated[float, Rule(0, 1, below=True, about="share of the old kept in a running mean")] = 0.9,
    ) -> None:
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
        self.has_forecast = False
        """Whether the predictor says how likely experts are in the next forwards."""
        self.soon = np.rint(self.shares * SCORE_ONE).astype(np.int64)
        """Worth as the last forward left it."""
        self.worth = self.soon.copy()
        self.chance = np.zeros(num_keys, np.int64)
        """Chances that experts are used when their layer runs next, as last predicted."""
        self.bar = np.full(num_keys, TAKEN, np.int64)
        """0 for what may leave (resident, not demanded by this layer)."""
        self.held = self.bar | self.worth
        """Worth of what may leave, more than any for the rest."""
        # Slices by layer, and views whose single elements are cheap: this runs between two layers.
        layers = [slice(first, first + self.num_experts) for first in range(0, num_keys, self.num_experts)]
        self.by_layer = [
            (self.soon[own], self.chance[own], self.worth[own], self.bar[own], self.held[own]) for own in layers
        ]
        self.one_worth, self.one_bar, self.one_held = self.worth.data, self.bar.data, self.held.data
        self.one_chance, self._least = self.chance.data, self.held.argmin
        self.demanded: Sequence[int] = ()
        self.keys = np.zeros(self.num_experts, np.int64)
        """Begins with the keys demanded, for compiled functions."""
        self.one_key = self.keys.data
        self.states = np.frombuffer(view.residency, np.uint8)
        functions = compiled_functions()
        self.compiled = functions is not None
        """Whether the work between two layers is done by compiled functions; else Python and numpy do it."""
        if functions is not None:
            own = functions.Choice(*Outlook.worths(self), self.states, self.keys, *[0] * 5)
            self.shared = functions.packed(view.num_layers, view.num_experts, 0, 0, 0, *own)
            self.settle = functions.settle

    def touched(self, keys: Sequence[int]) -> None:
        self.demanded = keys
        bar, held, noted = self.one_bar, self.one_held, self.one_key
        for index, key in enumerate(keys):
            bar[key] = held[key] = TAKEN
            noted[index] = key

    def admitted(self, key: int, cause: int) -> None:
        """Not to leave before it has landed; what is there from the start has."""
        if self.view.residency[key] == RESIDENT:
            self.one_bar[key] = 0
            self.one_held[key] = self.one_worth[key]

    def landed(self, key: int) -> None:
        if key not in self.view.pinned:
            self.one_bar[key] = 0
            self.one_held[key] = self.one_worth[key]

    def foreseen(self, forecast: npt.NDArray[np.int64]) -> None:
        self.has_forecast = True
        self.soon[:] = self.worth[:] = forecast
        np.bitwise_or(self.worth, self.bar, out=self.held)

    def predicted(self, keys: Sequence[int], layer: int, prediction: Prediction) -> None:
        soon, chance, worth, bar, held = self.by_layer[layer]
        if prediction.chances is not None:
            chance[:] = prediction.chances
        else:
            chance[:] = 0
            chance[np.array(prediction.keys, np.intp) - layer * self.num_experts] = prediction.scores
        np.maximum(soon, chance, out=worth)
        np.bitwise_or(worth, bar, out=held)

    def worths(self) -> Worths:
        return Worths(self.soon, self.chance, self.worth, self.bar, self.held)

    def layer_end(self, layer: int, keys: Sequence[int]) -> None:
        touched, self.demanded = self.demanded, ()
        if self.compiled and self.has_forecast:
            num = len(keys)
            if keys is not touched:
                self.keys[:num] = keys
            self.settle(self.shared, num, layer, self.used)
            return
        soon, _, worth, bar, held = self.by_layer[layer]
        if not self.has_forecast:
            first = layer * self.num_experts
            shares = self.shares[first : first + self.num_experts]
            shares *= self.memory
            for key in keys:
                shares[key - first] += 1 - self.memory
            soon[:] = np.rint(shares * SCORE_ONE)
        worth[:] = soon
        one_worth, one_bar, residency, used = self.one_worth, self.one_bar, self.view.residency, self.used
        for key in keys:
            if one_worth[key] < used:
                one_worth[key] = used
            if residency[key] == RESIDENT:
                one_bar[key] = 0
        np.bitwise_or(worth, bar, out=held)

    def victim(self, key: int, cause: int) -> int | None:
        found = int(self._least())
        worth = self.one_held[found]
        pinned = self.view.pinned
        if worth < TAKEN and found in pinned:
            # Where sizes differ several may have to leave for one: those chosen before this one are pinned meanwhile.
            held = self.held.copy()
            held[list(pinned)] = TAKEN
            found = int(held.argmin())
            worth = int(held[found])
        if worth < TAKEN:
            return found if cause == DEMAND or self.one_chance[key] > worth * self.margin else None
        # More demand than slots: what this layer has launched may leave after all.
        residency = self.view.residency
        free = [k for k in self.demanded if residency[k] == RESIDENT and k not in pinned]
        return min(free, key=self.one_worth.__getitem__, default=None)

    def evicted(self, key: int, unused: bool) -> None:
        self.one_bar[key] = self.one_held[key] = TAKEN
