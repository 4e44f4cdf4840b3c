"""Which useful prefetches were redundant: the same policy without prefetch would have hit as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expertflow.forward import Forward
from expertflow.observer import Observer
from expertflow.parts import PREFETCH


def without_prefetch(policy: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same policy with its predictor switched off."""
    return {**policy, "predictor": {"_target_": "expertflow.predictors.none.NoPredictor"}}


class HitRecord(Observer):
    """Per event, the keys that hit. One bit set per access would do; a frozenset per event is readable."""

    def __init__(self) -> None:
        self.hits: list[frozenset[int]] = []

    def demanded(
        self,
        forward: Forward,
        layer: int,
        now_ns: int,
        hits: Sequence[int],
        late: Sequence[int],
        missing: Sequence[int],
    ) -> None:
        self.hits.append(frozenset(hits))


class RedundancyCounter(Observer):
    """Counts useful prefetches whose demand was a hit without prefetch as well; `begin_after` forwards are skipped."""

    def __init__(self, plain: HitRecord, num_chunks: int, begin_after: int = 0) -> None:
        self.plain = plain
        self.last_chunk = num_chunks - 1
        self.begin_after = begin_after
        self.num_redundant = 0
        self._prefetched: set[int] = set()
        self._late: set[int] = set()
        self._event = -1
        self._num_forwards = 0

    def copied(self, key: int, chunk: int, cause: int, start_ns: int, end_ns: int) -> None:
        if chunk < self.last_chunk:
            return
        if cause == PREFETCH and key not in self._late:
            self._prefetched.add(key)
        else:
            self._prefetched.discard(key)
        self._late.discard(key)

    def demanded(
        self,
        forward: Forward,
        layer: int,
        now_ns: int,
        hits: Sequence[int],
        late: Sequence[int],
        missing: Sequence[int],
    ) -> None:
        self._event += 1
        # What is demanded in flight has been of use by the time it lands: it does not count at its next hit.
        self._late.update(late)
        if not self._prefetched:
            return
        if self._num_forwards >= self.begin_after:
            there = self.plain.hits[self._event]
            self.num_redundant += sum(key in self._prefetched and key in there for key in hits)
        self._prefetched.difference_update(hits, late, missing)

    def end_forward(self, forward: Forward, now_ns: int) -> None:
        self._num_forwards += 1
