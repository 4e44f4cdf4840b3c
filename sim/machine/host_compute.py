"""The simulated machine whose host computes experts, too, where they lie.

Activations go over, the host takes the experts one by one, the results come back together; activations and results do
not wait for copies. Copies and products read the same memory (`sim.machine.shared_memory`): at each of either that is
enqueued, what has not ended by then is timed anew. Nothing else changes between two waits of the runtime, so that a
wake stays one timeout.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from expertflow.machine import HOST, Costs, HostResult, Record, Wait
from expertflow.model import ModelSpec
from sim.machine.host_bound import HostBoundMachine
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link, bandwidth_at
from sim.machine.shared_memory import ONE, SharedMemory, Stint
from sim.machine.simulated import HostCosts
from sim.specs.hardware import HOST_COMPUTE, Curve, Hardware


class HostTimes(Protocol):
    """What the host takes for its part, in whole ns."""

    def expert_ns(self, num_tokens: int) -> int:
        """The products of one expert over so many tokens, nothing else reading the host's memory."""

    def there_ns(self, num_rows: int) -> int:
        """Until the activations of so many rows are in the host's memory; the results take as long back."""

    def stretch(self, num_bytes: int, copy_ns: int, host_ns: int) -> int:
        """As of `sim.machine.shared_memory.Stretch`."""


class CpuTimes:
    """Implements `HostTimes` by two peaks, as a roofline: the weights of an expert are read once, every token
    multiplies and adds each of them. ValueError where `hardware` says nothing of its host.
    """

    def __init__(self, model: ModelSpec, hardware: Hardware) -> None:
        missing = [key for key in HOST_COMPUTE if getattr(hardware, key) is None]
        if missing:
            raise ValueError(
                f"hardware={hardware.name} lacks {missing[0]}, which a place on the host needs: choose a host with "
                f"+host=desktop, workstation or server, or give +hardware.{missing[0]}=VALUE"
            )
        assert hardware.host_memory_gb_per_s is not None
        assert hardware.host_memory_efficiency is not None
        assert hardware.host_tflops is not None
        assert hardware.host_round_trip_ns is not None
        self._capacity = hardware.host_memory_gb_per_s
        self._bytes_per_ns = hardware.host_memory_gb_per_s * hardware.host_memory_efficiency
        self._flops_per_ns = hardware.host_tflops * 1000
        self._half_ns = -(-hardware.host_round_trip_ns // 2)
        self._expert_bytes, self._expert_params = model.mean_expert_bytes, model.expert_params
        self._row_bytes = math.ceil(model.hidden_size * model.weight_bits / 8)
        link = hardware.link_gb_per_s
        self._link: Curve = link if isinstance(link, tuple) else ((1, link),)

    def expert_ns(self, num_tokens: int) -> int:
        memory_ns = self._expert_bytes / self._bytes_per_ns
        return math.ceil(max(memory_ns, 2 * self._expert_params * num_tokens / self._flops_per_ns))

    def there_ns(self, num_rows: int) -> int:
        num_bytes = num_rows * self._row_bytes
        return self._half_ns + math.ceil(num_bytes / bandwidth_at(self._link, num_bytes))

    def stretch(self, num_bytes: int, copy_ns: int, host_ns: int) -> int:
        if not copy_ns or not host_ns:
            return ONE
        both = num_bytes / copy_ns + self._expert_bytes / host_ns
        return math.ceil(both / self._capacity * ONE)


class _Part(NamedTuple):
    """One expert of a host task. back_ns: what its results take after its products; 0 but for the last one."""

    task: int
    key: int
    stint: Stint
    back_ns: int

    @property
    def end_ns(self) -> int:
        return self.stint.end_ns + self.back_ns


class HostComputeMachine(HostBoundMachine):
    """A `HostBoundMachine` that implements `expertflow.machine.HostMachine`. Sending activations keeps the host busy
    for as long as issuing a copy does."""

    def __init__(
        self, kernels: KernelTimes, link: Link, costs: HostCosts, chunk_bytes: Sequence[int], host: HostTimes
    ) -> None:
        super().__init__(kernels, link, costs, chunk_bytes)
        self.host = host
        self._sizes = tuple(chunk_bytes)
        self._memory = SharedMemory(host.stretch)
        self._counted: deque[tuple[Stint, int]] = deque()
        """Of the chunks under way: their stints, and since when the link counts as theirs at the earliest."""
        self._copied_until_ns = 0
        self._parts: deque[_Part] = deque()
        self._ended: list[HostResult] = []
        self._num_tasks = 0

    def estimate(self, tokens: Sequence[int]) -> Costs:
        first = self._chunk_ns[self._sizes[0]]
        stretch = self.host.stretch(self._sizes[0], first, self.host.expert_ns(1))
        rows = min(self._num_tokens, sum(tokens))
        return Costs(
            copy_ns=sum(self._chunk_ns[size] for size in self._sizes),
            link_wait_ns=max(self._link_free_ns - self.now_ns, 0),
            gpu_ns=[self.kernels.expert_ns(num) for num in tokens],
            host_ns=[self.host.expert_ns(num) for num in tokens],
            round_trip_ns=2 * self.host.there_ns(rows) if rows else 0,
            stretch=max(stretch, ONE) / ONE,
        )

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        issued = self.now_ns = self.now_ns + self._issue_ns
        counted = max(issued, self._end_of(after)) if after else issued
        # A copy that was issued early enough follows the one before it at once.
        earliest = max(counted, issued + self.costs.copy_start_ns)
        work_ns = self._chunk_ns[num_bytes]
        if self._slows:
            work_ns = self.link.chunk_ns(num_bytes, self._computes_at(max(earliest, self._link_free_ns)))
        stint = Stint(earliest, work_ns, num_bytes)
        self._memory.advance(self.now_ns)
        self._memory.copies.append(stint)
        self._chunks.append((load, chunk, 0, 0))
        self._counted_from.append(0)
        self._counted.append((stint, counted))
        self._plan()

    def on_host(self, keys: Sequence[int], tokens: Sequence[int]) -> int:
        self.now_ns += self._issue_ns
        task = self._num_tasks = self._num_tasks + 1
        way_ns = self.host.there_ns(min(self._num_tokens, sum(tokens)))
        self._memory.advance(self.now_ns)
        for key, num_tokens in zip(keys, tokens, strict=True):
            stint = Stint(self.now_ns + way_ns, self.host.expert_ns(num_tokens))
            self._memory.products.append(stint)
            self._parts.append(_Part(task, key, stint, way_ns if key == keys[-1] else 0))
        self._plan()
        return task

    def _plan(self) -> None:
        """Times anew whatever has not ended."""
        self._memory.plan()
        before = self._copied_until_ns
        for place, (stint, counted) in enumerate(self._counted):
            load, chunk, _, _ = self._chunks[place]
            self._chunks[place] = (load, chunk, stint.start_ns, stint.end_ns)
            self._counted_from[place] = max(before, counted)
            before = stint.end_ns
        self._link_free_ns = before

    def wake_ns(self, wait: Wait) -> int:
        kind, ident, drain = wait
        if kind != HOST:
            return super().wake_ns(wait)
        self._after_wake_ns = self.costs.observe_ns
        ended = max([part.end_ns for part in self._parts if part.task == ident])
        if drain and self._chunks:
            ended = min(ended, self._chunks[0][3])
        return max(self.now_ns, ended)

    def record(self, now_ns: int) -> Record:
        told = super().record(now_ns)
        for _ in told[1]:
            self._copied_until_ns = self._counted.popleft()[0].end_ns
        while self._parts and self._parts[0].end_ns <= now_ns:
            part = self._parts.popleft()
            self._ended.append((part.task, part.key, part.stint.start_ns, part.end_ns))
        return told

    def host_ended(self) -> Sequence[HostResult]:
        ended, self._ended = self._ended, []
        return ended
