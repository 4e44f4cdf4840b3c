"""Where the answers of a policy's parts come in: each question is asked through `Answers`, and through nothing else.

What a class of this package answers is taken as it is: its own bound method, at no cost. Around the answer of any other
class stands a check. A check on one more question is one more method here (docs/contract.md lists who asks what).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expertflow.forward import KnownForward
from expertflow.parts import Eviction, Horizon, Order, Part, Place, Placing, Prediction, Predictor, Selection

_OWN = __name__.partition(".")[0] + "."


def is_own(part: Part) -> bool:
    """Whether the class of `part` is one of this package."""
    return type(part).__module__.startswith(_OWN)


class Answers:
    """The questions of one policy, bound to its parts when these have started.

    Attributes are called like the hooks of `expertflow.parts` that they are named after. ValueError names the class
    and what it should not have answered.
    """

    def __init__(
        self,
        predictor: Predictor,
        horizon: Horizon,
        selection: Selection,
        eviction: Eviction,
        order: Order,
        place: Place,
        num_layers: int,
        num_experts: int,
    ) -> None:
        self._predictor, self._selection, self._place = predictor, selection, place
        self._num_layers, self._num_experts = num_layers, num_experts
        self.predict = predictor.predict if is_own(predictor) else self._predict
        self.forecast = predictor.forecast
        self.step = predictor.step
        self.distances = horizon.distances
        self.select = selection.select if is_own(selection) else self._select
        self.victim = eviction.victim
        self.release = eviction.release
        self.arrange = order.arrange
        self.on_host = self._on_host

    def _predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        found = self._predictor.predict(forward, layer, distance)
        if found is None:
            return None
        prediction = Prediction(*found)
        self._check_layer(self._predictor, prediction.keys, (layer + distance) % self._num_layers)
        return prediction

    def _check_layer(self, part: Part, keys: Iterable[int], target: int) -> None:
        for key in keys:
            if key // self._num_experts != target:
                raise ValueError(
                    f"{type(part).__name__} was asked for layer {target} and scored key {key}, which is of another; "
                    "keys are layer * num_experts + expert"
                )

    def _select(self, prediction: Prediction, forward: KnownForward) -> Sequence[int]:
        keys = self._selection.select(prediction, forward)
        known = set(prediction.keys)
        for key in keys:
            if key not in known:
                raise ValueError(f"{type(self._selection).__name__} selected key {key}, which was not predicted")
        return keys

    def _on_host(self, placing: Placing, forward: KnownForward) -> Sequence[int]:
        keys = self._place.on_host(placing, forward)
        if keys:
            raise ValueError(
                f"{type(self._place).__name__} places {len(keys)} experts of layer {placing.layer} on the host, where "
                "nothing computes them yet; answer none, or choose place=gpu"
            )
        return keys
