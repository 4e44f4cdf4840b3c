"""The simulated machine with a host whose own code costs time beside its launches, copies and decisions.

Apart from `sim.machine.simulated`, whose hot path stays free of it. Where all these costs are 0 both take the same
times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from expertflow.forward import Forward
from expertflow.hints import mypyc_attr
from expertflow.machine import GATE, Record, Wait
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.machine.simulated import HostCosts, SimMachine
from sim.machine.slowed import SlowedMachine


@mypyc_attr(allow_interpreted_subclasses=True)
class HostBoundMachine(SlowedMachine):
    """A `SlowedMachine` that also charges the host for what `Stack` names beside its overheads on the stream.

    Time after a wake delays what the host does next, not what it learns: the record of the wake is as old as the
    wake.
    """

    def __init__(self, kernels: KernelTimes, link: Link, costs: HostCosts, chunk_bytes: Sequence[int]) -> None:
        super().__init__(kernels, link, costs, chunk_bytes)
        self._after_wake_ns = 0
        self._counted_from: deque[int] = deque()
        """Of the chunks under way, from when they count; an idle link begins later, and slows kernels from then."""
        self._release_costs = costs.release_ns, costs.release_latency_ns
        self._launch_costs = costs.launch_ns, costs.launch_latency_ns
        self._demands: Sequence[Sequence[int]] = ()
        """Of a forward that launches experts ahead, by layer; else empty."""
        self._num_left = 0
        """Experts of this layer that have not been told to begin."""

    def begin_forward(self, forward: Forward) -> None:
        super().begin_forward(forward)
        self.now_ns += self.costs.forward_ns
        is_ahead = self.costs.release_ns and len(forward.rows) == 1 and not forward.has_prompt
        self._demands = forward.demands if is_ahead else ()

    def attention(self, layer: int) -> int:
        mark = super().attention(layer)
        if self._demands:
            self._num_left = len(self._demands[layer])
            self.now_ns += self.costs.launch_ns
        return mark

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        if not self._demands:
            return super().experts(layer, keys, counts, shared)
        self._launch_ns, self._latency_ns = self._release_costs
        mark = super().experts(layer, keys, counts, shared)
        self._launch_ns, self._latency_ns = self._launch_costs
        self._num_left -= len(keys)
        if self._num_left > 0:
            self.now_ns += self.costs.launch_ns
        return mark

    def _enqueue(self, duration_ns: int, gap_ns: int) -> int:
        return super()._enqueue(duration_ns + self.costs.group_ns, gap_ns)

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        # A copy that was issued early enough follows the one before it at once.
        free, issued = self._link_free_ns, self.now_ns + self.costs.issue_ns
        begun = issued + self.costs.copy_start_ns
        if begun > free:
            self._link_free_ns = begun
        super().copy(load, chunk, key, slot, num_bytes, after)
        start = self._chunks[-1][2]
        self._counted_from.append(max(free, issued, self._end_of(after)) if start == begun > free else start)

    def wake_ns(self, wait: Wait) -> int:
        at = super().wake_ns(wait)
        # A wake in time for the router's end has its routing; one before it is a chunk's.
        routed = wait[0] == GATE and at >= self._stream_free_ns
        self._after_wake_ns = self.costs.classify_ns if routed else self.costs.observe_ns
        return at

    def record(self, now_ns: int) -> Record:
        at, chunks, marks = super().record(now_ns)
        self.now_ns = now_ns + self._after_wake_ns
        if chunks:
            # Counted from its issue, as a real machine counts it: that knows no event at which a link begins.
            start = self._counted_from.popleft
            chunks = [(load, chunk, start(), end) for load, chunk, _, end in chunks]
        return at, chunks, marks


def machine_for(kernels: KernelTimes, link: Link, costs: HostCosts, chunk_bytes: Sequence[int]) -> SimMachine:
    """The fastest of the three machines that charges all of `costs` and all that slows `kernels`."""
    if costs.host_bound:
        return HostBoundMachine(kernels, link, costs, chunk_bytes)
    machine_type = SlowedMachine if max(kernels.slowdowns) > 1.0 else SimMachine
    return machine_type(kernels, link, costs, chunk_bytes)
