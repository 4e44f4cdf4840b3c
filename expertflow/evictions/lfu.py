"""Least frequently used: one count per (forward, layer) that demands the expert; counts outlive eviction."""

from __future__ import annotations

from collections.abc import Sequence

from expertflow.evictions.ranked import RankedEviction
from expertflow.future import Future
from expertflow.view import View


class LFU(RankedEviction):
    """The resident expert with the fewest demands leaves; among equals the least recently touched."""

    def start(self, view: View, future: Future | None) -> None:
        super().start(view, future)
        self.counts = [0] * len(self.current)

    def touched(self, keys: Sequence[int]) -> None:
        for key in keys:
            self.counts[key] += 1
        super().touched(keys)

    def _rank(self, key: int) -> int:
        return self.counts[key]
