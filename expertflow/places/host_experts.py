"""A fixed set of experts on the host, as ktransformers and static offloading place them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import Place, Placing
from expertflow.view import View


class HostExperts(Place):
    """Experts that stay on the host: those of a list, or all but the most used.

    experts: their keys (`layer * num_experts + expert`). used_on [num_layers * num_experts]: how often each was used in
    some trace, of which a configuration names the file; the most used are the GPU's, as many as there are slots (by
    layer, where the cache is split), ties by key, and all others stay on the host. One of the two.
    """

    def __init__(
        self,
        experts: Annotated[
            list[int] | None, Rule(0, 2**31 - 1, null="see used_on", about="keys of those that stay on the host")
        ] = None,
        used_on: Annotated[
            Sequence[int] | None,
            Rule(extra="the file of a trace", null="see experts", about="whose most used experts are the GPU's"),
        ] = None,
    ) -> None:
        if (experts is None) == (used_on is None):
            raise ValueError("policy.place takes either experts, a list of keys, or used_on, a trace; give one of them")
        self.experts, self.used_on = experts, used_on

    def start(self, view: View, future: Future | None) -> None:
        num_keys = view.num_layers * view.num_experts
        if self.experts is not None:
            wrong = next((key for key in self.experts if not 0 <= key < num_keys), None)
            if wrong is not None:
                raise ValueError(
                    f"policy.place.experts: {wrong} is no key; the model has 0 to {num_keys - 1}, "
                    "layer * num_experts + expert"
                )
            self._keys = frozenset(self.experts)
            return
        assert self.used_on is not None
        if len(self.used_on) != num_keys:
            raise ValueError(
                f"policy.place.used_on is of {len(self.used_on)} experts, the model has {num_keys}; give a trace of it"
            )
        uses, span = self.used_on, view.num_experts if view.slots_by_layer else num_keys
        kept: set[int] = set()
        for pool, num_slots in enumerate(view.slots_by_layer or [view.num_slots]):
            own = range(pool * span, pool * span + span)
            kept.update(sorted(own, key=lambda key: (-uses[key], key))[:num_slots])
        self._keys = frozenset(range(num_keys)) - kept

    def stays_on_host(self) -> Iterable[int]:
        return self._keys

    def on_host(self, placing: Placing, forward: KnownForward) -> Sequence[int]:
        keys = self._keys
        return [key for key in placing.missing if key in keys]
