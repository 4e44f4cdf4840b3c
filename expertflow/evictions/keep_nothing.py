"""No cache: every expert is given up as soon as its layer has run (offloading without reuse)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expertflow.evictions.lru import LRU
from expertflow.view import RESIDENT


class KeepNothing(LRU):
    """Releases the layer's experts when they have run; gives way in order of use if slots run short."""

    def release(self, layer: int, keys: Sequence[int]) -> Iterable[int]:
        return [key for key in keys if self.residency[key] == RESIDENT]
