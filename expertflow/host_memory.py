"""Host memory as a cache above storage: which experts are in it, whole or in part, and which of them gives way.

It holds all that the GPU holds (inclusive): only experts that the GPU does not hold, that are whole and that nobody
waits for can leave. Weights are read-only, so leaving it costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from dataclasses import dataclass
from math import isqrt

LRU, PAGE_CACHE = "lru", "page_cache"
EVICTIONS = (LRU, PAGE_CACHE)
"""Evictions of host memory, by name."""


@dataclass(frozen=True)
class HostMemorySpec:
    """num_slots: experts that it holds. read_depth: reads issued and not yet seen to have ended. eviction: its name."""

    num_slots: int
    read_depth: int = 2
    eviction: str = LRU


class HostEviction(ABC):
    """Hears of every expert in host memory and says who leaves. It knows of no time and no GPU."""

    @abstractmethod
    def read(self, key: int) -> None:
        """`key` begins to be read from storage."""

    @abstractmethod
    def used(self, key: int) -> None:
        """The GPU begins to copy `key`, and holds it until `freed`."""

    @abstractmethod
    def freed(self, key: int) -> None:
        """`key` may leave from now on: it is whole, and the GPU does not hold it."""

    @abstractmethod
    def victim(self, kept: Container[int]) -> int | None:
        """Who leaves of those that may, none of `kept`; None where there is nobody. It is gone when this returns."""


class LeastRecent(HostEviction):
    """What the GPU gave up, or storage delivered, longest ago leaves. Until the GPU gives it up an expert is in use."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}

    def read(self, key: int) -> None:
        """What is being read cannot leave: its age begins when it is whole."""

    def used(self, key: int) -> None:
        self._order.pop(key, None)

    def freed(self, key: int) -> None:
        self._order[key] = None

    def victim(self, kept: Container[int]) -> int | None:
        for key in self._order:
            if key not in kept:
                del self._order[key]
                return key
        return None


class PageCache(HostEviction):
    """An approximation of how Linux (6.x) reclaims clean file pages, an expert at a time; `docs/policies.md` says more.

    Two lists, inactive and active, each oldest first. What is read becomes inactive; a second use makes it active
    (`mark_page_accessed`), and so does a read of what left so recently that a cache larger by the active list would
    have kept it (`workingset_refault`). The oldest inactive expert leaves, used or not. Before that the oldest active
    ones become inactive while the active list is longer than the inactive one times the integer square root of ten
    times their gigabytes, at least once (`inactive_is_low`). What the GPU holds is on neither list, as locked pages.
    """

    def __init__(self, expert_bytes: int) -> None:
        self._expert_bytes = expert_bytes
        self._inactive: dict[int, None] = {}
        self._active: dict[int, None] = {}
        self._is_active: set[int] = set()
        self._is_referenced: set[int] = set()
        self._age = 0
        """Evictions and activations so far."""
        self._left_at: dict[int, int] = {}
        """Age at which an expert left, by key."""

    def read(self, key: int) -> None:
        left = self._left_at.pop(key, None)
        if left is not None and self._age - left <= len(self._active):
            self._activate(key)

    def _activate(self, key: int) -> None:
        self._is_active.add(key)
        self._is_referenced.discard(key)
        self._age += 1

    def used(self, key: int) -> None:
        if key not in self._is_referenced:
            self._is_referenced.add(key)
        elif key not in self._is_active:
            self._activate(key)
        self._inactive.pop(key, None)
        self._active.pop(key, None)

    def freed(self, key: int) -> None:
        (self._active if key in self._is_active else self._inactive)[key] = None

    def _shrink_active(self) -> None:
        active, inactive = self._active, self._inactive
        gigabytes = (len(active) + len(inactive)) * self._expert_bytes >> 30
        ratio = max(isqrt(10 * gigabytes), 1)
        while len(active) > ratio * len(inactive):
            key = next(iter(active))
            del active[key]
            inactive[key] = None
            self._is_active.discard(key)
            self._is_referenced.discard(key)

    def victim(self, kept: Container[int]) -> int | None:
        self._shrink_active()
        for keys in (self._inactive, self._active):
            for key in keys:
                if key not in kept:
                    del keys[key]
                    self._is_active.discard(key)
                    self._is_referenced.discard(key)
                    self._age += 1
                    self._left_at[key] = self._age
                    return key
        return None


class HostMemory:
    """there [N], asked [N]: how many chunks of each expert are in host memory; how many were asked of storage, or were
    there from the start. room_of [N]: the room of each expert, -1 = none. fresh [N]: 1 from the begin of a read until
    the GPU begins to copy.

    ValueError for an unknown eviction or no room at all.
    """

    def __init__(self, spec: HostMemorySpec, num_keys: int, chunk_bytes: Sequence[int]) -> None:
        if spec.eviction not in EVICTIONS:
            raise ValueError(f"storage.eviction={spec.eviction!r} is unknown; choose one of: {', '.join(EVICTIONS)}")
        if spec.num_slots < 1 or spec.read_depth < 1:
            raise ValueError(f"host memory of {spec.num_slots} experts, {spec.read_depth} reads at once: both from 1")
        self.spec = spec
        self.num_chunks = len(chunk_bytes)
        self.there = [0] * num_keys
        self.asked = [0] * num_keys
        self.room_of = [-1] * num_keys
        self.fresh = bytearray(num_keys)
        self.num_fresh = 0
        self.num_initial = 0
        self.free = list(range(spec.num_slots - 1, -1, -1))
        self.eviction: HostEviction = PageCache(sum(chunk_bytes)) if spec.eviction == PAGE_CACHE else LeastRecent()

    def fill(self, held: Sequence[int], others: Sequence[int]) -> None:
        """What is there from the start: `held`, which the GPU holds, then `others`, best first, as far as they fit."""
        if len(held) > len(self.free):
            raise ValueError(f"host memory of {self.spec.num_slots} experts cannot hold the {len(held)} of the GPU")
        for key in held:
            self._place(key)
            self.eviction.used(key)
        placed = [key for key in others if self.room_of[key] < 0][: len(self.free)]
        # Best last, as if it had been used last.
        for key in reversed(placed):
            self._place(key)
            self.eviction.freed(key)
        self.num_initial = len(held) + len(placed)

    def _place(self, key: int) -> None:
        self.room_of[key] = self.free.pop()
        self.there[key] = self.asked[key] = self.num_chunks

    def begin(self, key: int) -> None:
        """`key` takes a free room: it begins to be read."""
        self.room_of[key] = self.free.pop()
        self.fresh[key] = 1
        self.num_fresh += 1
        self.eviction.read(key)

    def leave(self, kept: Container[int]) -> int | None:
        """Make room: the key that left, None where none may; `fresh` still tells whether it was read in vain."""
        key = self.eviction.victim(kept)
        if key is not None:
            self.free.append(self.room_of[key])
            self.room_of[key] = -1
            self.there[key] = self.asked[key] = 0
        return key

    def used(self, key: int) -> bool:
        """The GPU begins to copy `key`; whether that was read for this."""
        was_fresh = self.fresh[key] == 1
        if was_fresh:
            self.fresh[key] = 0
            self.num_fresh -= 1
        self.eviction.used(key)
        return was_fresh
