"""The simulated machine with a host whose own code costs time: several kernels to a launch, and the policy's work.

Apart from `sim.machine`, whose hot path stays free of it. Where all these costs are 0 both take the same times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expertflow.forward import Forward
from expertflow.machine import GATE, Record, Wait
from sim.kernels import KernelTimes
from sim.link import Link
from sim.machine import HostCosts, SimMachine


class HostBoundMachine(SimMachine):
    """A `SimMachine` that also charges the host for what `Stack` names beside its overheads on the stream.

    The first kernel of a launch arrives as ever; the host then stays busy until it has enqueued the last one,
    and the group ends no sooner than that one arrives. Time after a wake delays what the host does next, not
    what it learns: the record of the wake is as old as the wake.
    """

    def __init__(self, kernels: KernelTimes, link: Link, costs: HostCosts, chunk_bytes: Sequence[int]) -> None:
        super().__init__(kernels, link, costs, chunk_bytes)
        self._rest_ns = 0
        self._after_wake_ns = 0

    def begin_forward(self, forward: Forward) -> None:
        super().begin_forward(forward)
        self.now_ns += self.costs.forward_ns

    def attention(self, layer: int) -> int:
        self._rest_ns = self.costs.attention_launch_ns
        return super().attention(layer)

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        self._rest_ns = len(keys) * self.costs.expert_launch_ns
        if shared and self._has_shared:
            self._rest_ns += self.costs.shared_launch_ns
        return super().experts(layer, keys, counts, shared)

    def head(self) -> int:
        self._rest_ns = self.costs.head_launch_ns
        return super().head()

    def _enqueue(self, duration_ns: int, gap_ns: int) -> int:
        mark = super()._enqueue(duration_ns + self.costs.group_ns, gap_ns)
        self.now_ns += self._rest_ns
        arrived = self.now_ns + self._latency_ns
        if arrived > self._stream_free_ns:
            # The kernels run as they come; between the first and the last the group counts as running.
            self._marks[-1] = (mark, self._marks[-1][1], arrived)
            self._stream_free_ns = arrived
        return mark

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        # A copy that was issued early enough follows the one before it at once.
        begun = self.now_ns + self.costs.issue_ns + self.costs.copy_start_ns
        if begun > self._link_free_ns:
            self._link_free_ns = begun
        super().copy(load, chunk, key, slot, num_bytes, after)

    def wake_ns(self, wait: Wait) -> int:
        at = super().wake_ns(wait)
        # A wake in time for the router's end has its routing; one before it is a chunk's.
        routed = wait[0] == GATE and at >= self._stream_free_ns
        self._after_wake_ns = self.costs.classify_ns if routed else self.costs.observe_ns
        return at

    def record(self, now_ns: int) -> Record:
        record = super().record(now_ns)
        self.now_ns = now_ns + self._after_wake_ns
        return record


def machine_for(kernels: KernelTimes, link: Link, costs: HostCosts, chunk_bytes: Sequence[int]) -> SimMachine:
    """The faster of the two machines that charges all of `costs`."""
    machine_type = HostBoundMachine if costs.host_bound else SimMachine
    return machine_type(kernels, link, costs, chunk_bytes)
