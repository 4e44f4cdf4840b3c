"""The history network's predictions from one layer, by numpy: for several tokens, and where nothing is compiled."""

from __future__ import annotations

import numpy as np

from expertflow.forward import KnownForward
from expertflow.network import UNIT, Floats, Ints, chance_of
from expertflow.parts import Prediction
from expertflow.predictors.history import RoutingHistory
from expertflow.predictors.ranking import rank_scores


def any_of(chances: Ints, times: int = 1) -> Ints:
    """Chances [...] in 2^-16 that any of the rows [rows, ...] comes true, each `times` times over."""
    never: Floats = (1.0 - chances / UNIT).prod(axis=0) ** times
    found: Ints = np.rint(UNIT * (1.0 - never)).astype(np.int64)
    return found


class NumpyInference:
    """Distances 1 … reach at once: on one row numpy costs by the call, not by the size."""

    def __init__(self, history: RoutingHistory, num_kept: int) -> None:
        self.history = history
        self.net = history.net
        self.num_kept = num_kept
        self._own: Floats = np.empty((0, self.net.L, self.net.E))
        self._own_of: Floats | None = None
        """Log-odds by distance of these features."""

    def begin_forward(self) -> None:
        """Features may have changed in place since the forward before."""
        self._own_of = None

    def look(self, forward: KnownForward, layer: int, reach: int, chance: Ints) -> list[Prediction | None]:
        """Predictions at distances 1 … reach from `layer`; chance [any, E] is written."""
        net, history = self.net, self.history
        first = (layer + 1) % net.L
        hidden = history.activations(layer) if first else history.after
        features = history.features
        if self._own_of is not features or len(self._own) < reach:
            self._own = np.stack([net.own_odds(features, distance) for distance in range(1, reach + 1)])
            self._own_of = features
        odds = net.odds_ahead(hidden, first, reach)
        steps = np.arange(reach)
        odds += self._own[steps, first + steps]
        known = reach
        if net.pregate is not None and first:
            pregate = self._pregate(forward, layer, reach)
            known = pregate.shape[1]
            # [rows, known, E]: the history of the mean token, the pre-gate of each.
            odds = odds[:known] + net.pregate_odds(pregate, net.pregate_ahead[first][:known].T[..., None])
            each, times = chance_of(odds), 1
        else:
            each, times = chance_of(odds)[None], history.num_tokens
        single = history.num_tokens == 1
        found, num_kept = (each[0], self.num_kept) if single else (any_of(each, times), net.E)
        keys, scores = rank_scores(found, ((first + steps[:known]) * net.E)[:, None], num_kept)
        chance[:known] = found
        made: list[Prediction | None] = list(map(Prediction, keys.tolist(), scores.tolist(), chance[:known]))
        return made + [None] * (reach - known)

    def _pregate(self, forward: KnownForward, layer: int, reach: int) -> Floats:
        """Chances [rows, known, E] of the pre-gate recorded at `layer` for the forward's rows, as far as that goes."""
        recorded = None if forward.recorded is None else forward.recorded.lookahead(forward.rows, layer)
        if recorded is None:
            return np.zeros((1, 0, self.net.E))
        chance: Floats = recorded[:, :reach].astype(np.float64)
        missing = np.isnan(chance).any(axis=(0, 2))
        return chance[:, : int(missing.argmax())] if missing.any() else chance
