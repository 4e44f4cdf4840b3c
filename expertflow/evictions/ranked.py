"""Eviction by a rank that changes only when an expert is touched or admitted: a heap with lazy deletion."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Annotated

from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import Eviction
from expertflow.view import RESIDENT, View

Entry = tuple[int, int, int]
"""(rank, touch number, key): the smallest leaves, among equals the least recently touched."""


class RankedEviction(Eviction):
    """Base of LFU and Belady: `_rank(key)` small means leave soon. Ranks outlive eviction."""

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
        num_keys = view.num_layers * view.num_experts
        num_pools = view.num_layers if self.scope == "layer" else 1
        self.span = num_keys // num_pools
        self.heaps: list[list[Entry]] = [[] for _ in range(num_pools)]
        self.current: list[Entry | None] = [None] * num_keys
        self.num_touches = 0
        self.touch_number = [0] * num_keys

    def _rank(self, key: int) -> int:
        raise NotImplementedError

    def _enter(self, keys: Sequence[int]) -> None:
        heap = self.heaps[keys[0] // self.span]
        current, touch_number = self.current, self.touch_number
        for key in keys:
            entry = (self._rank(key), touch_number[key], key)
            if current[key] != entry:
                current[key] = entry
                heappush(heap, entry)
        if len(heap) > 8 * self.span + 64:
            # Stale entries sink for Belady and pile up where nothing is evicted: rebuild before they cost memory.
            heap[:] = [entry for entry in heap if current[entry[2]] is entry]
            heapify(heap)

    def touched(self, keys: Sequence[int]) -> None:
        for key in keys:
            self.num_touches += 1
            self.touch_number[key] = self.num_touches
        self._enter(keys)

    def admitted(self, key: int, cause: int) -> None:
        if self.current[key] is None:
            self.num_touches += 1
            self.touch_number[key] = self.num_touches
            self._enter((key,))

    def victim(self, key: int, cause: int) -> int | None:
        heap = self.heaps[key // self.span]
        residency, pinned, current = self.residency, self.view.pinned, self.current
        aside: list[Entry] = []
        found = None
        while heap:
            entry = heap[0]
            candidate = entry[2]
            if current[candidate] is entry and residency[candidate] == RESIDENT and candidate not in pinned:
                found = candidate
                break
            heappop(heap)
            if current[candidate] is entry:
                aside.append(entry)
        for entry in aside:
            heappush(heap, entry)
        return found

    def evicted(self, key: int, unused: bool) -> None:
        self.current[key] = None
