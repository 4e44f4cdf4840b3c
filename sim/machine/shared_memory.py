"""Two queues that read the host's memory, copies to the GPU and experts that the host computes, and slow each other.

While both are busy each runs at the factor min(1, capacity / (rate of the copy + rate of the products)) of its own
rate: what takes 1 ns of work alone then takes `stretch` = 1 / factor. Measured on a machine of eight channels: copies
alone 26.1 GB/s, products alone 110, both at once 119.5 (GitHub FreeToken#444). Whole nanoseconds: work that is left is
rounded up whenever it is looked at, and so is an end. Knows nothing of experts, kernels or a runtime.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

ONE = 1 << 20
"""One, of a stretch: integers in 2^-20, so that ends are the same on every machine."""
_NEVER = 1 << 62

Stretch = Callable[[int, int, int], int]
"""Of a copy of so many bytes that takes so many ns alone, beside products that take so many ns alone; in 2^-20."""


class Stint:
    """One copy, or the products of one expert: `work_ns` alone, not before `earliest_ns`. start_ns, end_ns: as planned.
    num_bytes: of a copy."""

    __slots__ = ("begun", "earliest_ns", "end_ns", "left_ns", "num_bytes", "start_ns", "work_ns")

    def __init__(self, earliest_ns: int, work_ns: int, num_bytes: int = 0) -> None:
        self.earliest_ns = earliest_ns
        self.work_ns = self.left_ns = work_ns
        self.num_bytes = num_bytes
        self.start_ns = self.end_ns = 0
        self.begun = False


class SharedMemory:
    """copies, products: what had not ended at `now_ns`, each queue first in, first out."""

    def __init__(self, stretch: Stretch) -> None:
        self.copies: deque[Stint] = deque()
        self.products: deque[Stint] = deque()
        self.now_ns = 0
        self._stretch = stretch
        self._known: dict[tuple[int, int, int], int] = {}

    def advance(self, now_ns: int) -> None:
        """Time has come to `now_ns`: take off what was done by then, and forget what has ended."""
        copies, products = list(self.copies), list(self.products)
        lefts = self._walk(copies, products, now_ns, True)
        for stints, queue, left in zip((copies, products), (self.copies, self.products), lefts, strict=True):
            for stint, left_ns in zip(stints, left, strict=True):
                stint.left_ns = left_ns
            while queue and queue[0].left_ns < 0:
                queue.popleft()
        self.now_ns = now_ns

    def plan(self) -> None:
        """Set start and end of everything, as if nothing more were to come."""
        self._walk(list(self.copies), list(self.products), _NEVER, False)

    def _walk(
        self, copies: list[Stint], products: list[Stint], until_ns: int, happens: bool
    ) -> tuple[list[int], list[int]]:
        """Go through both queues from `now_ns` up to `until_ns`; the work left of each, -1 where it has ended."""
        queues = (copies, products)
        lefts = ([stint.left_ns for stint in copies], [stint.left_ns for stint in products])
        heads, now = [0, 0], self.now_ns
        # Of each queue, how many are under way or over, as far as this walk has come.
        begun = [sum(stint.begun for stint in stints) for stints in queues]
        while True:
            waiting = [side for side in (0, 1) if heads[side] < len(queues[side])]
            running = [side for side in waiting if queues[side][heads[side]].earliest_ns <= now]
            later = min(
                (queues[side][heads[side]].earliest_ns for side in waiting if side not in running), default=_NEVER
            )
            if not running:
                if later >= until_ns:
                    return lefts
                now = later
                continue
            stretch = self._stretch_of(copies[heads[0]], products[heads[1]]) if len(running) == 2 else ONE
            ends = [now + -(-lefts[side][heads[side]] * stretch // ONE) for side in running]
            stop = min(*ends, later, until_ns)
            for side, end in zip(running, ends, strict=True):
                place = heads[side]
                stint = queues[side][place]
                if place == begun[side]:
                    stint.start_ns, stint.begun = now, happens
                    begun[side] += 1
                if end <= stop:
                    stint.end_ns, lefts[side][place] = end, -1
                    heads[side] += 1
                else:
                    lefts[side][place] -= (stop - now) * ONE // stretch
            now = stop
            if now >= until_ns:
                return lefts

    def _stretch_of(self, copy: Stint, products: Stint) -> int:
        told = (copy.num_bytes, copy.work_ns, products.work_ns)
        known = self._known.get(told)
        if known is None:
            known = self._known[told] = max(self._stretch(*told), ONE)
        return known
