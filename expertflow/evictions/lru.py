"""Least recently used, over all experts or within each layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import Eviction
from expertflow.view import RESIDENT, View


class LRU(Eviction):
    """The resident expert whose last demand (or arrival by prefetch) lies farthest back leaves."""

    def __init__(
        self,
        scope: Annotated[
            str, Rule(choices=("global", "layer"), about="one cache for all layers, or one for each")
        ] = "global",
    ) -> None:
        self.scope = scope

    def start(self, view: View, future: Future | None) -> None:
        self.view = view
        self.residency = view.residency
        num_pools = view.num_layers if self.scope == "layer" else 1
        # A key stays in pool 0 for the global scope: key // span is then always 0.
        self.span = view.num_experts if num_pools > 1 else view.num_experts * view.num_layers
        self.pools: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_pools)]

    def touched(self, keys: Sequence[int]) -> None:
        order = self.pools[keys[0] // self.span]
        move_to_end = order.move_to_end
        for key in keys:
            try:
                move_to_end(key)
            except KeyError:
                order[key] = None

    def admitted(self, key: int, cause: int) -> None:
        order = self.pools[key // self.span]
        if key not in order:
            order[key] = None

    def victim(self, key: int, cause: int) -> int | None:
        residency, pinned = self.residency, self.view.pinned
        for candidate in self.pools[key // self.span]:
            if residency[candidate] == RESIDENT and candidate not in pinned:
                return candidate
        return None

    def evicted(self, key: int, unused: bool) -> None:
        del self.pools[key // self.span][key]
