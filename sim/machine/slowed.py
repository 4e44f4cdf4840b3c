"""The simulated machine whose kernels run slower beside a busy link: both read and write the GPU's memory.

Apart from `sim.machine.simulated`, whose hot path stays free of it. Where all factors are 1 both take the same times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expertflow.hints import mypyc_attr
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.machine.simulated import HostCosts, SimMachine


@mypyc_attr(allow_interpreted_subclasses=True)
class SlowedMachine(SimMachine):
    """A `SimMachine` whose kernels take up to `KernelTimes.slowdowns` times as long.

    Fixed at the launch: of the time that a kernel would run on an idle link, the share that is covered by the copies
    known by then counts with the factor. Copies issued later change nothing, wherever they come to lie.
    """

    def __init__(self, kernels: KernelTimes, link: Link, costs: HostCosts, chunk_bytes: Sequence[int]) -> None:
        super().__init__(kernels, link, costs, chunk_bytes)
        self._attention_slowdown, self._experts_slowdown, self._head_slowdown = kernels.slowdowns
        self._slowdown = 1.0

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
        if self._slowdown > 1.0:
            _, start, end = self._marks[-1]
            covered = sum(max(0, min(end, until) - max(start, since)) for _, _, since, until in self._chunks)
            if covered:
                # idle * (1 + (factor - 1) * covered / idle), without the division.
                end = start + round(duration_ns + (self._slowdown - 1.0) * covered)
                self._marks[-1] = (mark, start, end)
                self._stream_free_ns = end
        return mark
