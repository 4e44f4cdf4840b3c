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
from sim.machine.link import Link
from sim.machine.shared_memory import ONE, SharedMemory, Stint
from sim.machine.simulated import HostCosts
from sim.specs.curves import bandwidth_at
from sim.specs.hardware import HOST_COMPUTE, Curve, Hardware

UNPACKED_BITS = 16.0
"""Weights of so many bits are multiplied as they are: bf16 is the upper half of fp32."""


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

    Quantised weights are unpacked besides, once for all tokens, by the cores that read them: where
    `host_unpack_gweights_per_s` says how fast that is, it adds to the time of reading. GitHub FreeToken#444 has both
    sides of it on two machines: memory is read at 146.1 and 142.7 GB/s, fp4 experts are computed at 110.3 and 108.4,
    and 1 / 110.3 - 1 / 146.1 = 1 / 450 as 1 / 108.4 - 1 / 142.7 = 1 / 451. Many cores hide it, few do not.
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
        unpacks = hardware.host_unpack_gweights_per_s if model.expert_bits < UNPACKED_BITS else None
        self._unpack_ns = model.expert_params / unpacks if unpacks else 0.0
        self._row_bytes = math.ceil(model.hidden_size * model.weight_bits / 8)
        link = hardware.link_gb_per_s
        self._link: Curve = link if isinstance(link, tuple) else ((1, link),)

    def expert_ns(self, num_tokens: int) -> int:
        memory_ns = self._expert_bytes / self._bytes_per_ns
        products_ns = 2 * self._expert_params * num_tokens / self._flops_per_ns
        return math.ceil(max(memory_ns, products_ns) + self._unpack_ns)

    def there_ns(self, num_rows: int) -> int:
        num_bytes = num_rows * self._row_bytes
        return self._half_ns + math.ceil(num_bytes / bandwidth_at(self._link, num_bytes))

    def stretch(self, num_bytes: int, copy_ns: int, host_ns: int) -> int:
        if not copy_ns or not host_ns:
            return ONE
        both = num_bytes / copy_ns + self._expert_bytes / host_ns
        return math.ceil(both / self._capacity * ONE)


class HostFigures:
    """What experts cost on the host and on the GPU beside it, by the figures of a profile: a simulation and a replay
    ask the same.

    link: as the run's copies go over it. chunk_bytes: of one expert. chunk_ns: of each of these on an idle link.
    """

    def __init__(self, kernels: KernelTimes, link: Link, chunk_bytes: Sequence[int], times: HostTimes) -> None:
        self.times = times
        self.chunk_ns = [link.chunk_ns(size, False) for size in chunk_bytes]
        self._expert_ns = kernels.expert_ns
        alone = times.stretch(chunk_bytes[0], self.chunk_ns[0], times.expert_ns(1))
        self._stretch = max(alone, ONE) / ONE

    def costs(self, tokens: Sequence[int], num_tokens: int, link_wait_ns: int) -> Costs:
        """As of `expertflow.machine.HostMachine.estimate`. num_tokens: of the whole forward."""
        rows = min(num_tokens, sum(tokens))
        times = self.times
        return Costs(
            copy_ns=sum(self.chunk_ns),
            link_wait_ns=link_wait_ns,
            gpu_ns=[self._expert_ns(num) for num in tokens],
            host_ns=[times.expert_ns(num) for num in tokens],
            round_trip_ns=2 * times.there_ns(rows) if rows else 0,
            stretch=self._stretch,
        )


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
        self._figures = HostFigures(kernels, link, chunk_bytes, host)
        self._memory = SharedMemory(host.stretch)
        self._counted: deque[tuple[Stint, int]] = deque()
        """Of the chunks under way: their stints, and since when the link counts as theirs at the earliest."""
        self._copied_until_ns = 0
        self._parts: deque[_Part] = deque()
        self._ended: list[HostResult] = []
        self._num_tasks = 0

    def estimate(self, tokens: Sequence[int]) -> Costs:
        return self._figures.costs(tokens, self._num_tokens, max(self._link_free_ns - self.now_ns, 0))

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
