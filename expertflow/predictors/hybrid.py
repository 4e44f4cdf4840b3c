"""The pre-gate, where the trace holds one, corrected by what the routing history says (arXiv 2510.26730).

The correction is a fitted `HistoryNetwork` in place of the paper's forest (`forest.py`). Without a recorded pre-gate
the history alone predicts. At the end of each forward it also forecasts how likely each expert is to be used in the
next ones. What is known is kept by `history.py`; what is made of it is computed in one of three ways, to the same
integers: compiled (`hybrid_compiled.py`: forwards of one token, where numba is installed), by numpy forward by forward
(`hybrid_numpy.py`), or by numpy for announced forwards together (`hybrid_block.py`: where numba is missing).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt

from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.network import HistoryNetwork, Ints, compiled_functions
from expertflow.parts import Announced, Effort, Prediction, Predictor, Step, Worths
from expertflow.predictors.history import RoutingHistory
from expertflow.predictors.hybrid_block import AnnouncedBlock
from expertflow.predictors.hybrid_compiled import CompiledNetwork
from expertflow.predictors.hybrid_numpy import NumpyInference
from expertflow.view import View


class HybridPredictor(Predictor):
    """Distances 1 … D of the fitted network, up to the last layer; from the last layer, the next forward's first.

    fitted: the arrays of `HistoryNetwork`. keep: how many of the best are returned for a single token (0 = all experts;
    all anyway for several tokens). refreshes: nearer predictions replace farther ones. Of several tokens the history is
    taken as their mean and the pre-gate as each one's; predicted is the chance that any of them picks an expert.
    """

    at_once: ClassVar[bool] = True
    fitted_kind: ClassVar[str] = "hybrid"
    # Measured, in units of the 20 us that the shipped profiles assume (results/LOG.md, 2026-11-27).
    effort: Effort = Effort(0.5, 0.25)
    effort_at_once: Effort | None = Effort(0.4, 0.08)

    def __init__(
        self,
        fitted: Annotated[
            Mapping[str, npt.NDArray[np.generic]] | None,
            Rule(
                extra="auto or a file of python -m traces fit-predictor",
                about="auto: what is shipped",
            ),
        ],
        keep: Annotated[
            int, Rule(0, 65_535, unit="experts", about="the best are returned for a single token, 0 = all")
        ] = 0,
        refreshes: Annotated[bool, Rule(about="nearer predictions replace farther ones")] = True,
    ) -> None:
        if fitted is None:
            raise ValueError(
                "HybridPredictor needs a fitted network for this model and none is shipped; fit one with "
                "python -m traces fit-predictor, or choose policy/predictor=transition"
            )
        if keep < 0:
            raise ValueError(f"HybridPredictor keep={keep} must be 0 (all experts) or more")
        self.fitted = fitted
        self.keep = keep
        self.refreshes = refreshes

    def start(self, view: View, future: Future | None) -> None:
        self.view = view
        self.net = net = HistoryNetwork(self.fitted, view.num_layers, view.num_experts)
        num_kept = min(net.E, self.keep or net.E)
        # Of the next forward nothing is known before the last layer.
        self._most = [min(net.L - 1 - layer, net.D) for layer in range(net.L - 1)] + [net.D]
        functions = compiled_functions() if len(net.rank_weights) == view.top_k else None
        self.compiled = None if functions is None else CompiledNetwork(net, functions, num_kept)
        """What runs compiled, for one token; None: numpy does it all."""
        self.history = RoutingHistory(net, view.top_k, self.compiled)
        self.window = _Window(self.history, num_kept)
        self.block = AnnouncedBlock(self.history, num_kept)

    def announced(self) -> Announced | None:
        return self.block

    def begin_forward(self, forward: KnownForward) -> None:
        if not self.block.begin_forward(forward.index):
            self.history.begin_forward(forward)
            self.window.begin_forward()

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        last = self.net.L - 1
        if distance > self.net.D or (layer < last < layer + distance):
            return None
        if self.block.runs:
            return self.block.predict(layer, distance)
        return self.window.predict(forward, layer, distance)

    def end_forward(self, forward: KnownForward) -> None:
        if not self.block.runs:
            self.history.know(forward, self.net.L - 1)

    def forecast(self) -> Ints:
        return self.block.forecast() if self.block.runs else self.history.forecast()

    # -- a whole decision at once ------------------------------------------------------------------------------------

    def fuse(self, thresholds: Ints, worths: Worths) -> bool:
        if self.compiled is None:
            return False
        self.compiled.decide_by(thresholds, self.view.residency, worths)
        return True

    def step(self, forward: KnownForward, layer: int, reach: int) -> Step | None:
        most = self._most[layer]
        if reach > most:
            reach = most
        if self.block.runs:
            return self.block.step(layer, reach)
        history = self.history
        quick = history.quick
        if quick is None:
            return None
        keys = history.take(forward, layer)
        # What `predict` has looked at is not kept up.
        self.window.clear()
        pregate = quick.pregate(forward, layer)
        return quick.decide(keys, layer, history.packed, pregate, reach)


class _Window:
    """What was predicted from one layer, distance by distance, as far as anybody asked."""

    def __init__(self, history: RoutingHistory, num_kept: int) -> None:
        self.history = history
        self.net = history.net
        self._inference = NumpyInference(history, num_kept)
        self._expected = self._asked = 1
        """How far was asked for at the layer before, and at this one."""
        self._layer = -1
        self._seen: list[Prediction | None] = []
        self._chance: Ints = np.zeros((self.net.D, self.net.E), np.int64)
        """What was found for distances 1, 2, … at this layer."""

    def begin_forward(self) -> None:
        """Nothing is known of this forward yet."""
        self.clear()
        self._inference.begin_forward()

    def clear(self) -> None:
        """What was seen is out of date."""
        self._layer = -1

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        """As `Predictor.predict`."""
        history = self.history
        if self._layer != layer:
            # A horizon changes little from layer to layer: as far as was asked there is looked at once.
            self._expected, self._asked = self._asked, 1
            self._layer, self._seen = layer, []
            history.know(forward, layer)
        if distance > self._asked:
            self._asked = distance
        if distance > len(self._seen):
            reach = min(max(self._expected, distance), self.net.D, self.net.L - (layer + 1) % self.net.L)
            quick = history.quick
            if quick is None:
                self._seen = self._inference.look(forward, layer, reach, self._chance)
            elif self._seen and self._seen[-1] is None:
                # The pre-gate has ended; what it says farther off is not asked for.
                self._seen += [None] * (reach - len(self._seen))
            else:
                # What was not seen before.
                seen = len(self._seen)
                pregate = quick.pregate(forward, layer)
                self._seen += quick.look(history.packed, pregate, layer, seen, self._chance[seen:reach])
        return self._seen[distance - 1]
