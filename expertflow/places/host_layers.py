"""Whole layers on the host, as llama.cpp places them with `--n-cpu-moe N`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import Place, Placing
from expertflow.view import View


class HostLayers(Place):
    """The experts of the first, or the last, `layers` MoE layers stay on the host; the others are the GPU's.

    llama.cpp keeps the experts of the first N layers in host memory (`--n-cpu-moe N`).
    """

    def __init__(
        self,
        layers: Annotated[int, Rule(0, 10_000, unit="layers", about="whose experts stay on the host")],
        side: Annotated[str, Rule(choices=("first", "last"), about="which end of the model they are")] = "first",
    ) -> None:
        self.layers, self.side = layers, side

    def start(self, view: View, future: Future | None) -> None:
        if self.layers > view.num_layers:
            raise ValueError(
                f"policy.place.layers={self.layers} is more than the model's MoE layers, {view.num_layers}; "
                "give at most these"
            )
        first = 0 if self.side == "first" else view.num_layers - self.layers
        self._own = range(first, first + self.layers)
        self._keys = range(first * view.num_experts, (first + self.layers) * view.num_experts)

    def stays_on_host(self) -> Iterable[int]:
        return self._keys

    def on_host(self, placing: Placing, forward: KnownForward) -> Sequence[int]:
        return placing.missing if placing.layer in self._own else ()
