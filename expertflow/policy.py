"""A policy: predictor, horizon, selection, eviction, order and place, composed.

It asks the parts, the runtime acts. What it returns are values: the list of experts wanted, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from expertflow.answers import Answers, Guards, Parts
from expertflow.boundary import Guard, PartError, check_unchanged, declared, is_guarded, is_own
from expertflow.forward import Forward, KnownForward, Unveiling
from expertflow.future import Future
from expertflow.keys import plain
from expertflow.parts import Announced, Effort, Eviction, Horizon, Order, Part, Place, Placing, Predictor, Selection
from expertflow.places.gpu import Gpu
from expertflow.view import RESIDENT, Feedback, View

_KINDS: tuple[type[Part], ...] = (Predictor, Horizon, Selection, Eviction, Order, Place)
_CONTRACT: tuple[type[Part], ...] = (Part, *_KINDS)


class Policy:
    """Six parts and the window of layers that has been predicted.

    At layer l the distances not predicted before are predicted (normally only the farthest), unless the
    predictor refreshes. Nearer layers come first in the list of wants. place: None = everything on the GPU.
    ValueError for a part of another kind, or one that declares what it may not.
    """

    def __init__(
        self,
        predictor: Predictor,
        horizon: Horizon,
        selection: Selection,
        eviction: Eviction,
        order: Order,
        future: Future | None = None,
        effort: Effort | None = None,
        place: Place | None = None,
    ) -> None:
        self.predictor = predictor
        self.horizon = horizon
        self.selection = selection
        self.eviction = eviction
        self.order = order
        self.place: Place = Gpu() if place is None else place
        self.parts: list[Part] = [predictor, horizon, selection, eviction, order, self.place]
        self._declared = [declared(part, kind) for part, kind in zip(self.parts, _KINDS, strict=True)]
        self.uses_future = any(bool(told["uses_future"]) for told in self._declared)
        """Whether any part reads ahead in the trace: such a result is a reference, not a policy."""
        self.future = future
        self.prefetches = predictor.predicts
        self.places = self.overrides(self.place, "on_host")
        """Whether the place is to be asked: whether it may answer anything but the GPU."""
        # Without prediction the horizon has nothing to look at: a model of one layer is then no error.
        self.active = [self.prefetches or kind is not Horizon for kind in _KINDS]
        # What the eviction keeps is then read and written in place: by classes of this package alone.
        fusing: tuple[Part, ...] = (predictor, selection, eviction)
        self._at_once = predictor.refreshes and all(part.at_once and is_own(part) for part in fusing)
        self.effort = effort or (self._at_once and predictor.effort_at_once) or predictor.effort
        self.reach_counts: list[int] = []
        """How many layer-steps looked this many layers ahead, by reach; 0: nothing was decided."""
        self.distances: Sequence[int] = ()
        """What the horizon answered last."""
        self.num_expected = 0.0
        """N_e: mean number of experts selected per predicted layer in the last forward that predicted any; 0 = not
        known yet."""
        self.num_predicted = 0
        """How many layers the last decision predicted anew."""
        self.decision_effort = 0.0
        """What the last decision took (`Effort.of`)."""
        self.total_predicted = self.num_decisions = 0
        for part in self.parts:
            if part.uses_future and future is None:
                raise ValueError(f"{type(part).__name__} needs the future of the trace and was given none")

    @property
    def guarded(self) -> bool:
        """Whether any part is of a class whose answers are checked, and which is shown copies of what others share."""
        return any(map(is_guarded, self.parts))

    def overrides(self, part: Part, hook: str) -> bool:
        """Whether `part` answers `hook` itself."""
        return not any(getattr(type(part), hook) is vars(base).get(hook) for base in _CONTRACT)

    def listeners(self, hook: str) -> list[Callable[..., Any]]:
        """The parts' own methods for `hook`, in the order of the parts, with what stands around them. After `start`."""
        heard: list[Callable[..., Any]] = []
        for part, guard, active in zip(self.parts, self._guards, self.active, strict=True):
            if active and self.overrides(part, hook):
                if guard is None:
                    heard.append(getattr(part, hook))
                else:
                    heard.append(guard.told_layer_end() if hook == "layer_end" else guard.told(hook))
        return heard

    def start(self, view: View, shown: View | None = None) -> None:
        """Bind the parts to a run. shown: what parts whose answers are checked see of it, where that is not `view`."""
        self.view = view
        self._guards = Guards(*(Guard(part, view) if is_guarded(part) else None for part in self.parts))
        self.reach_counts = [0] * (view.num_layers + 1)
        self.num_expected = self.decision_effort = 0.0
        self.num_predicted = self.total_predicted = self.num_decisions = 0
        self._num_selected = self._num_layers_selected = 0
        self._efforts = [self.effort.of(layers) for layers in range(view.num_layers + 1)]
        self._window_event = [-1] * view.num_layers
        self._window_keys: list[Sequence[int]] = [()] * view.num_layers
        self._fetches_later = self.overrides(self.place, "for_later")
        self._hears_predicted = self.overrides(self.eviction, "predicted")
        self._hears_overfetch = self.overrides(self.horizon, "overfetched")
        self._hears_forecast = self.overrides(self.eviction, "foreseen") and self.overrides(self.predictor, "forecast")
        self._begin_listeners = self.listeners("begin_forward")
        self._routed_listeners = self.listeners("routed")
        self._end_listeners = self.listeners("end_forward")
        self._feedback_listeners = self.listeners("feedback")
        self.hears_feedback = bool(self._feedback_listeners)
        """Whether any part hears `feedback`."""
        hear_of_forwards = self._begin_listeners or self._routed_listeners or self._end_listeners
        self.follows = bool(self.prefetches or self.places or hear_of_forwards)
        """Whether any part looks at forwards, which are then shown to it as their routing becomes known."""
        self._frozen = self.guarded
        self._start_parts(view, shown or view)
        parts = Parts(self.predictor, self.horizon, self.selection, self.eviction, self.order, self.place)
        self.answers = answers = Answers(parts, self._guards, view, self._declared[3]["scope"] == "layer")
        self.stays_on_host = frozenset(answers.stays_on_host()) if self.places else frozenset()
        """Keys that are never copied."""
        # Bound once: `decide` runs at every layer.
        self._refreshes, self._predict = self.predictor.refreshes, answers.predict
        self._select, self._distances = answers.select, answers.distances
        self._residency, self._num_layers = view.residency, view.num_layers
        self._hand_on_forecast()
        self._step = self.predictor.step if self.prefetches and self._fuse() else None

    def _start_parts(self, view: View, shown: View) -> None:
        for part, guard, told, active in zip(self.parts, self._guards, self._declared, self.active, strict=True):
            future = self.future if told["uses_future"] else None
            if not active:
                continue
            if guard is None:
                part.start(view, future)
            else:
                guard.told("start")(shown, future)
        self._check_declared()

    def _check_declared(self) -> None:
        """What parts have declared was counted on when the run was set up."""
        for part, kind, guard, told in zip(self.parts, _KINDS, self._guards, self._declared, strict=True):
            if guard is not None:
                check_unchanged(guard, part, kind, told)

    def _others(self) -> str:
        """The classes that are not of this package."""
        return plain(", ".join(type(part).__name__ for part in self.parts if is_guarded(part)), 120)

    def unsound(self, error: AssertionError) -> PartError:
        """The error for a run whose books do not balance, and of which a part may have changed what is not its own."""
        return PartError(
            f"{self._others()}: the run's books do not balance ({plain(str(error), 90)}); "
            "a part changes no class and no value that is not its own"
        )

    def tampered(self) -> PartError:
        """The error for a policy of which a part has written to what is shown of the slots."""
        where = f"forward {self.view.forward}, layer {self.view.layer}"
        return PartError(
            f"{self._others()}: a part has written to the memory behind view.residency ({where}); "
            "a part reads its view, and acts by what it answers"
        )

    def _fuse(self) -> bool:
        """Whether the predictor decides at once, now that all parts have started."""
        if not self._at_once:
            return False
        thresholds, worths = self.selection.thresholds(), self.eviction.worths()
        return thresholds is not None and worths is not None and self.predictor.fuse(thresholds, worths)

    def _hand_on_forecast(self) -> None:
        if self._hears_forecast:
            forecast = self.answers.forecast()
            if forecast is not None:
                self.answers.foreseen(forecast)

    def announced(self) -> Announced | None:
        """Who takes forwards before they run, if anybody does (`Predictor.announced`): a predictor of ours alone."""
        return self.predictor.announced() if is_own(self.predictor) else None

    def begin_forward(self, forward: Forward) -> None:
        """Before the forward runs."""
        if self._num_layers_selected:
            self.num_expected = self._num_selected / self._num_layers_selected
            self._num_selected = self._num_layers_selected = 0
        self.answers.expect(self.num_expected)
        if self.follows:
            self._unveiling = Unveiling(forward, self._frozen)
            self.known: KnownForward = self._unveiling.known
            """The forward that runs, as the parts see it."""
            for heard in self._begin_listeners:
                heard(self.known)

    def routed(self, layer: int) -> None:
        """The routing of `layer`, the next one of this forward, has been read; only needed if `follows`."""
        self._unveiling.reveal(layer)
        if self._routed_listeners:
            for heard in self._routed_listeners:
                heard(self.known, layer)

    def end_forward(self) -> None:
        """After the tokens have been read back."""
        if self.follows:
            self._unveiling.end()
        for heard in self._end_listeners:
            heard(self.known)
        self._hand_on_forecast()
        if self._frozen:
            self._check_declared()

    def begin_measuring(self) -> None:
        """The warm-up is over."""
        self.reach_counts = [0] * len(self.reach_counts)

    def feedback(self, feedback: Feedback) -> None:
        """About the layer before."""
        for heard in self._feedback_listeners:
            heard(feedback)

    def place_experts(self, placing: Placing) -> Sequence[int]:
        """Those of `placing.missing` that the host computes. Only needed if `places`."""
        return self.answers.on_host(placing, self.known)

    def fetched_later(self, keys: Sequence[int], queued: Sequence[int]) -> Sequence[int]:
        """Those of `keys`, just placed on the host, that are copied as well (`Place.for_later`)."""
        if not self._fetches_later:
            return ()
        stays = self.stays_on_host
        return [key for key in self.answers.for_later(keys, queued) if key not in stays]

    def mean_effort(self) -> float:
        """Of the decisions so far."""
        return self.effort.of(self.total_predicted / max(self.num_decisions, 1))

    def decide(self, layer: int) -> Sequence[int] | None:
        """Experts wanted for the layers ahead, best first, without what is resident or on its way.

        None: the horizon looks at no layer, so that there is nothing to decide and nothing to charge; what was wanted
        before stays wanted.
        """
        distances = self.distances = self._distances()
        if not distances:
            self.reach_counts[0] += 1
            return None
        reach = distances[-1]
        self.reach_counts[reach] += 1
        self.num_decisions += 1
        if self._step is not None and reach == len(distances):
            told = self._step(self.known, layer, reach)
            if told is not None:
                wants, num_selected, num_layers, overfetched = told
                self._num_selected += num_selected
                self._num_layers_selected += num_layers
                self._spend(reach)
                if overfetched and self._hears_overfetch:
                    self.answers.overfetched()
                return wants
        return self._ask(layer, distances)

    def _spend(self, num_predicted: int) -> None:
        """A decision has predicted so many layers anew."""
        self.num_predicted = num_predicted
        self.total_predicted += num_predicted
        self.decision_effort = self._efforts[num_predicted]

    def _ask(self, layer: int, distances: Sequence[int]) -> list[int]:
        """`decide` by asking the parts, distance by distance."""
        residency, num_layers, event, forward = self._residency, self._num_layers, self.view.event, self.known
        window_event, window_keys = self._window_event, self._window_keys
        wants: list[int] = []
        num_predicted = 0
        for distance in distances:
            target = (layer + distance) % num_layers
            if window_event[target] == event + distance and not self._refreshes:
                keys = window_keys[target]
            else:
                prediction = self._predict(forward, layer, distance)
                num_predicted += 1
                if prediction is None:
                    # No idea yet is no prediction: nearer by, there may be one.
                    continue
                keys = self._select(prediction, forward)
                self._num_selected += len(keys)
                self._num_layers_selected += 1
                window_event[target] = event + distance
                window_keys[target] = keys
                if self._hears_predicted:
                    self.answers.predicted(keys, target, prediction)
            num_wants = len(wants)
            for key in keys:
                if not residency[key]:
                    wants.append(key)
            if len(wants) > num_wants:
                continue
            if distance == 2 and self._hears_overfetch and keys and all(residency[key] == RESIDENT for key in keys):
                self.answers.overfetched()
        self._spend(num_predicted)
        return wants
