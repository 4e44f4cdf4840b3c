"""The simulated machine whose kernels run slower beside a busy link: both read and write the GPU's memory.

Apart from `sim.machine.simulated`, whose hot path stays free of it. Where all factors are 1 both take the same times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expertflow.hints import mypyc_attr
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.machine.simulated import HostCosts, SimMachine

_MOST_KEPT = 64
"""Launches that are remembered; so many are never under way."""


@mypyc_attr(allow_interpreted_subclasses=True)
class SlowedMachine(SimMachine):
    """A `SimMachine` whose kernels take up to `KernelTimes.slowdowns` times as long.

    Of the time that a kernel would run on an idle link, the share that copies cover counts with the factor: those known
    at its launch, and each that is issued before its end. What is behind it in the stream begins later by as much.
    """

    def __init__(self, kernels: KernelTimes, link: Link, costs: HostCosts, chunk_bytes: Sequence[int]) -> None:
        super().__init__(kernels, link, costs, chunk_bytes)
        self._attention_slowdown, self._experts_slowdown, self._head_slowdown = kernels.slowdowns
        self._slowdown = 1.0
        self._launches: dict[int, tuple[float, int, int, int]] = {}
        """By mark, those not reported yet among them: (factor, ns on an idle link, when its launch arrives, ns before
        it)."""

    def attention(self, layer: int) -> int:
        self._slowdown = self._attention_slowdown
        return super().attention(layer)

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        self._slowdown = self._experts_slowdown
        return super().experts(layer, keys, counts, shared)

    def head(self) -> int:
        self._slowdown = self._head_slowdown
        return super().head()

    def _enqueue(self, duration_ns: int, gap_ns: int) -> int:
        mark = super()._enqueue(duration_ns, gap_ns)
        if len(self._launches) > _MOST_KEPT:
            self._launches = {number: self._launches[number] for number, _, _ in self._marks[:-1]}
        self._launches[mark] = self._slowdown, duration_ns, self.now_ns + self._latency_ns, gap_ns
        if self._slowdown > 1.0:
            _, start, end = self._marks[-1]
            covered = sum(max(0, min(end, until) - max(start, since)) for _, _, since, until in self._chunks)
            if covered:
                # idle * (1 + (factor - 1) * covered / idle), without the division.
                end = start + round(duration_ns + (self._slowdown - 1.0) * covered)
                self._marks[-1] = (mark, start, end)
                self._stream_free_ns = end
        return mark

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        super().copy(load, chunk, key, slot, num_bytes, after)
        _, _, since, until = self._chunks[-1]
        marks = self._marks
        if marks and marks[-1][2] > since:
            self._slow_down(since, until)

    def _slow_down(self, since: int, until: int) -> None:
        """Kernels that run beside a copy from `since` to `until`, issued just now, end later than was thought."""
        marks, free = self._marks, 0
        for place, (mark, start, end) in enumerate(marks):
            factor, idle_ns, arrival, gap_ns = self._launches[mark]
            more_ns = end - start - idle_ns
            if place:
                start = max(arrival, free) + gap_ns
            covered = min(start + idle_ns, until) - max(start, since)
            if covered > 0:
                more_ns += round((factor - 1.0) * covered)
            free = start + idle_ns + more_ns
            marks[place] = (mark, start, free)
        self._stream_free_ns = free
