"""A policy: predictor, horizon, selection, eviction and order, composed.

It asks the parts, the runtime acts. What it returns are values: the list of experts wanted, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from expertflow.forward import Forward
from expertflow.future import Future
from expertflow.parts import Effort, Eviction, Horizon, Order, Part, Predictor, Selection
from expertflow.predictors.none import NoPredictor
from expertflow.view import RESIDENT, Feedback, View


class Policy:
    """Five parts and the window of layers that has been predicted.

    At layer l the distances not predicted before are predicted (normally only the farthest), unless the
    predictor refreshes. Nearer layers come first in the list of wants.
    """

    def __init__(self, predictor: Predictor, horizon: Horizon, selection: Selection, eviction: Eviction,
                 order: Order, future: Future | None = None, effort: Effort | None = None) -> None:  # fmt: skip
        at_once = self._may_fuse(predictor, selection, eviction)
        self.effort = effort or (at_once and predictor.effort_at_once) or predictor.effort
        self.predictor = predictor
        self.horizon = horizon
        self.selection = selection
        self.eviction = eviction
        self.order = order
        self.parts: list[Part] = [predictor, horizon, selection, eviction, order]
        self.future = future
        self.prefetches = not isinstance(predictor, NoPredictor)
        # Without prediction the horizon has nothing to look at: a model of one layer is then no error.
        self.active = self.parts if self.prefetches else [predictor, selection, eviction, order]
        self.reach_counts: list[int] = []
        """How many layer-steps looked this many layers ahead, by reach; 0: nothing was decided."""
        self.num_predicted = 0
        """How many layers the last decision predicted anew."""
        self.total_predicted = self.num_decisions = 0
        for part in self.parts:
            if part.uses_future and future is None:
                raise ValueError(f"{type(part).__name__} needs the future of the trace and was given none")

    @property
    def uses_future(self) -> bool:
        """Whether any part reads ahead in the trace: such a result is a reference, not a policy."""
        return any(part.uses_future for part in self.parts)

    def overrides(self, part: Part, hook: str) -> bool:
        """Whether `part` answers `hook` itself."""
        contract = (Part, Predictor, Horizon, Selection, Eviction, Order)
        return not any(getattr(type(part), hook) is vars(base).get(hook) for base in contract)

    def listeners(self, hook: str) -> list[Callable[..., Any]]:
        """The parts' own methods for `hook`, in the order of the parts."""
        return [getattr(part, hook) for part in self.active if self.overrides(part, hook)]

    def start(self, view: View) -> None:
        """Bind the parts to a run."""
        self.view = view
        self.reach_counts = [0] * (view.num_layers + 1)
        self.num_predicted = self.total_predicted = self.num_decisions = 0
        self._window_event = [-1] * view.num_layers
        self._window_keys: list[Sequence[int]] = [()] * view.num_layers
        self._hears_predicted = self.overrides(self.eviction, "predicted")
        self._hears_overfetch = self.overrides(self.horizon, "overfetched")
        # Bound once: `decide` runs at every layer.
        self._refreshes, self._predict = self.predictor.refreshes, self.predictor.predict
        self._select, self._distances = self.selection.select, self.horizon.distances
        self._residency, self._num_layers, self._num_experts = view.residency, view.num_layers, view.num_experts
        self._begin_listeners = self.listeners("begin_forward")
        self._end_listeners = self.listeners("end_forward")
        self._feedback_listeners = self.listeners("feedback")
        for part in self.active:
            part.start(view, self.future if part.uses_future else None)
        self._fused = self.prefetches and self._fuse()
        self._step, self._selected = self.predictor.step, self.selection.selected

    @staticmethod
    def _may_fuse(predictor: Predictor, selection: Selection, eviction: Eviction) -> bool:
        """Whether all three parts declare, in their very class, how the predictor decides at once."""
        declared: tuple[tuple[Part, str], ...] = (
            (predictor, "fuse"), (predictor, "step"), (selection, "thresholds"), (eviction, "worths")
        )  # fmt: skip
        return predictor.refreshes and all(hook in vars(type(part)) for part, hook in declared)

    def _fuse(self) -> bool:
        """Whether the predictor decides at once, now that all parts have started."""
        predictor, selection, eviction = self.predictor, self.selection, self.eviction
        if not self._may_fuse(predictor, selection, eviction):
            return False
        thresholds, worths = selection.thresholds(), eviction.worths()
        return thresholds is not None and worths is not None and predictor.fuse(thresholds, worths)

    def prepare(self, forwards: Sequence[Forward]) -> None:
        """Let the parts compute ahead what does not depend on timing."""
        for heard in self.listeners("prepare"):
            heard(forwards)

    def begin_forward(self, forward: Forward) -> Sequence[int] | None:
        """Before the forward runs; may return wants for its first layers (None = leave the queue as it is)."""
        self.horizon.num_expected = self.selection.mean_selected()
        for heard in self._begin_listeners:
            heard(forward)
        return None

    def end_forward(self, forward: Forward) -> None:
        """After the tokens have been read back."""
        for heard in self._end_listeners:
            heard(forward)

    def begin_measuring(self) -> None:
        """The warm-up is over."""
        self.reach_counts = [0] * len(self.reach_counts)

    def feedback(self, feedback: Feedback) -> None:
        """About the layer before."""
        for heard in self._feedback_listeners:
            heard(feedback)

    def mean_effort(self) -> float:
        """Of the decisions so far."""
        return self.effort.of(self.total_predicted / max(self.num_decisions, 1))

    def decides(self) -> bool:
        """Whether there is anything to decide at this layer: whether the horizon looks at any. If not, `decide` is not
        called and nothing is charged; what was wanted before stays wanted."""
        if self._distances():
            return True
        self.reach_counts[0] += 1
        return False

    def decide(self, forward: Forward, layer: int) -> list[int]:
        """Experts wanted for the layers ahead, best first, without what is resident or on its way."""
        distances = self._distances()
        reach = distances[-1] if distances else 0
        self.reach_counts[reach] += 1
        self.num_decisions += 1
        if self._fused and reach == len(distances) and reach:
            told = self._step(forward, layer, reach)
            if told is not None:
                wants, num_selected, num_layers, overfetched = told
                self._selected(num_selected, num_layers)
                self.num_predicted = reach
                self.total_predicted += reach
                if overfetched and self._hears_overfetch:
                    self.horizon.overfetched()
                return wants
        return self._ask(forward, layer, distances)

    def _ask(self, forward: Forward, layer: int, distances: Sequence[int]) -> list[int]:
        """`decide` by asking the parts, distance by distance."""
        residency, num_layers, event = self._residency, self._num_layers, self.view.event
        window_event, window_keys = self._window_event, self._window_keys
        wants: list[int] = []
        num_predicted = 0
        for distance in distances:
            target = (layer + distance) % num_layers
            if window_event[target] == event + distance and not self._refreshes:
                keys = window_keys[target]
            else:
                scores = self._predict(forward, layer, distance)
                num_predicted += 1
                if scores is None:
                    # No idea yet is no prediction: nearer by, there may be one.
                    continue
                keys = self._select(scores, forward)
                num_experts = self._num_experts
                for key in keys:
                    if key // num_experts != target:
                        raise ValueError(
                            f"{type(self.predictor).__name__} was asked for layer {target} and scored key {key}, which "
                            "is of another; keys are layer * num_experts + expert"
                        )
                window_event[target] = event + distance
                window_keys[target] = keys
                if self._hears_predicted:
                    self.eviction.predicted(keys, target, scores)
            num_wants = len(wants)
            for key in keys:
                if not residency[key]:
                    wants.append(key)
            if len(wants) > num_wants:
                continue
            if distance == 2 and self._hears_overfetch and keys and all(residency[key] == RESIDENT for key in keys):
                self.horizon.overfetched()
        self.num_predicted = num_predicted
        self.total_predicted += num_predicted
        return wants
