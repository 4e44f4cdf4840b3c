"""A torch.cuda without a GPU: streams, events and graphs on a simulated time line, bytes that move when the device says
so.

Time passes only by what the host calls, so every run is the same. A stream is first in, first out; an event gets its
time when it is recorded, since all that precedes it in its stream is known by then. A graph holds what was captured and
does it at every replay, for one call of the host. What a copy or a kernel does to memory is done when the simulated
device gets there: a copy spoils its target at its start and fills it at its end, a kernel reads and writes at its end,
so that what is not ordered on the device is not in order here either. A kernel that waits for the host holds up all
that its stream is given, without a time, until the host has written the word. Calls of several threads take turns:
with a host's worker, and only then, a run depends on when the system lets each run.
"""

from __future__ import annotations

import ctypes
import heapq
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from replay.machine.cuda import CudaDevice
from replay.machine.device import Program, Words, Work
from replay.machine.launch_row import Row
from replay.machine.rows import TOLD

HOST_EPOCH_NS = 7_000_000_000_000
DEVICE_EPOCH_NS = 31_000_000_000
LATENCY_NS = 2_500
"""From the host's call to the earliest moment at which an idle device does what was asked."""
CALL_NS = 700
WORK_NS = 15_000
SPIN_NS = 3_300
"""What a spin kernel of no cycles takes."""
IDLE_GHZ, BUSY_GHZ = 0.6, 1.7
RAMP_NS = 30_000_000
"""Work after which the device has left its idle clock."""
GB_PER_S = 1.0
COPY_NS = 4_000
GATE_NS = 1_300
POLL_NS = 40
"""A look at a number in memory, which is no call."""
FREE_BYTES = 8 << 30
STAGE_NS = 1_900
"""From the host's word to the kernels behind it."""
_SPOILT = 0x7F
_NEVER_NS = 1 << 61
"""When that happens which still waits for the host."""


def in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of a `FakeCuda`, which no other thread enters meanwhile."""

    @wraps(method)
    def alone(self: FakeCuda, *given: Any, **named: Any) -> Any:
        with self.lock:
            return method(self, *given, **named)

    return alone


class FakeStream:
    """`torch.cuda.Stream`. free_ns: when all that is enqueued has ended."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.free_ns = 0

    def wait_event(self, event: FakeEvent) -> None:
        """What is enqueued later starts no earlier than the event as recorded now; unrecorded: no wait at all."""
        self._cuda.call("wait_event")
        if event.at_ns is not None:
            assert event.at_ns < _NEVER_NS, "a stream waits for kernels that wait for the host"
            self.free_ns = max(self.free_ns, event.at_ns)


class FakeEvent:
    """`torch.cuda.Event(enable_timing=True)`. at_ns: when the device passes it; None = never recorded."""

    def __init__(self, cuda: FakeCuda, enable_timing: bool = False, external: bool = False) -> None:
        self._cuda = cuda
        self._timed = enable_timing
        self._external = external
        self.at_ns: int | None = None
        self.in_graph = False
        self.happened_ns: int | None = None
        """When the device passed it at the launch before the last one."""
        self.is_read = True
        cuda.num_events += 1
        if external:
            cuda.external.append(self)

    def record(self, stream: FakeStream) -> None:
        """At the end of what `stream` holds; a second record makes the first one unreadable."""
        if self._cuda.capturing is not None:
            # Another kind would become a dependency inside the graph, and never have a time.
            assert self._external, "a captured event must be external"
            self._cuda.capturing.nodes.append(lambda: self.pass_by(stream, in_graph=True))
            return
        self._cuda.call("record")
        self.pass_by(stream)

    def pass_by(self, stream: FakeStream, in_graph: bool = False) -> None:
        """As the device comes to it."""
        with self._cuda.lock:
            self._pass_by(stream, in_graph)

    def _pass_by(self, stream: FakeStream, in_graph: bool) -> None:
        cuda = self._cuda
        if self.at_ns == _NEVER_NS:
            self.at_ns = stream.free_ns = max(stream.free_ns, cuda.true_ns + LATENCY_NS)
            return
        cuda.num_spoiled += self.at_ns is not None and self.at_ns > cuda.true_ns
        cuda.num_unread += not self.is_read
        self.is_read = not self._external
        self.in_graph, self.happened_ns = in_graph, self.at_ns
        if cuda.holds(stream, lambda: self._pass_by(stream, in_graph)):
            self.at_ns = _NEVER_NS
            return
        self.at_ns = stream.free_ns = max(stream.free_ns, cuda.true_ns + LATENCY_NS)

    def query(self) -> bool:
        """True for an event that was never recorded, as in CUDA."""
        self._cuda.call("query")
        if self._cuda.forgetful and self.in_graph and self.happened_ns is not None:
            return True
        return self.at_ns is None or self.at_ns <= self._cuda.true_ns

    def synchronize(self) -> None:
        """Blocks the host."""
        self._cuda.call("synchronize")
        self._cuda.advance_to(self.at_ns or 0)

    def elapsed_time(self, end: FakeEvent) -> float:
        """A float32 of milliseconds, negative if `end` came first."""
        cuda = self._cuda
        cuda.call("elapsed_time")
        if not (self._timed and end._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.at_ns is None or end.at_ns is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if max(self.at_ns, end.at_ns) > cuda.true_ns:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        end.is_read = True
        return float(np.float32((cuda.device_ns(end.at_ns) - cuda.device_ns(self.at_ns)) / 1e6))


class FakeGraph:
    """`torch.cuda.CUDAGraph`: what is enqueued while it captures is done at each replay, on the current stream."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.nodes: list[Callable[[], object]] = []

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        """From here on nothing runs."""
        assert self._cuda.capturing is None
        self._cuda.call("capture_begin")
        self._cuda.capturing = self

    def capture_end(self) -> None:
        """The graph is complete."""
        assert self._cuda.capturing is self
        self._cuda.capturing = None
        self._cuda.num_graphs += 1

    def replay(self) -> None:
        """One call, whatever the graph holds."""
        self._cuda.call("replay")
        for node in self.nodes:
            node()


class Numbers:
    """The number in pinned memory: looking at it is no call, but takes time."""

    def __init__(self, cuda: FakeCuda, flag: torch.Tensor) -> None:
        self._cuda, self._flag = cuda, flag

    def __getitem__(self, place: int) -> int:
        self._cuda.advance_to(self._cuda.true_ns + POLL_NS)
        return int(self._flag[place])


class FakeCuda:
    """One GPU and the host that drives it. drift_ppm: by how much the device's clock runs faster than the host's."""

    def __init__(self, drift_ppm: int = 0) -> None:
        self.drift_ppm = drift_ppm
        self.lock = threading.RLock()
        self.true_ns = 0
        self.calls: Counter[str] = Counter()
        self.call_ns: dict[str, int] = {}
        self.num_events = 0
        self.num_spoiled = 0
        """Events recorded anew before they had happened."""
        self.num_unread = 0
        """Events of graphs recorded anew before anyone had asked for their time."""
        self.external: list[FakeEvent] = []
        self.forgetful = False
        """Whether an event inside a graph seems to have happened as soon as an earlier launch has passed it."""
        self.num_graphs = 0
        self.capturing: FakeGraph | None = None
        self.default = FakeStream(self)
        self.streams = [self.default]
        self.current = self.default
        self.pinned: list[range] = []
        self.num_pageable = 0
        self._spun_ns = 0
        self.num_held = 0
        """Launches that waited for the host."""
        self._held: tuple[FakeStream, Row, int, list[Callable[[], object]]] | None = None
        self._begun: Counter[Row] = Counter()
        self._due: list[tuple[int, int, Callable[[], object]]] = []
        self._order = count()
        self._failure: tuple[str, int, RuntimeError, bool] | None = None

    # -- time ------------------------------------------------------------------------------------------------

    def perf_counter_ns(self) -> int:
        """The host's clock."""
        self.advance_to(self.true_ns + 40)
        return HOST_EPOCH_NS + self.true_ns

    def device_ns(self, true_ns: int) -> int:
        """The device's clock at `true_ns`."""
        return DEVICE_EPOCH_NS + true_ns + true_ns * self.drift_ppm // 1_000_000

    @in_turn
    def advance_to(self, true_ns: int) -> None:
        """Let the device do what falls due until then, in its order."""
        if self._held is not None and self._held[1].words[TOLD] >= self._held[2]:
            # The word was written before this moment, whatever the host does now.
            self._let_go()
        self.true_ns = max(self.true_ns, true_ns)
        if self._due and self._due[0][0] <= self.true_ns:
            while self._due and self._due[0][0] <= self.true_ns:
                heapq.heappop(self._due)[2]()

    @in_turn
    def call(self, name: str) -> None:
        """One call of the host: takes time, and fails if it is to."""
        self.calls[name] += 1
        if self._failure is not None:
            failing, left, error, sticky = self._failure
            if name == failing or left < 0:
                self._failure = (failing, left - 1, error, sticky)
                if left <= 0:
                    if not sticky:
                        self._failure = None
                    raise error
        self.advance_to(self.true_ns + self.call_ns.get(name, CALL_NS))

    def fail(self, name: str, error: RuntimeError, after: int = 0, sticky: bool = True) -> None:
        """The call of `name` after `after` more of them raises `error`; if sticky every later call of any name too."""
        self._failure = (name, after, error, sticky)

    # -- work ------------------------------------------------------------------------------------------------

    @in_turn
    def enqueue(
        self, duration_ns: int, at_start: Callable[[], object] | None = None, at_end: Callable[[], object] | None = None
    ) -> int:
        """Put work of a known duration onto the current stream; returns when it ends."""
        stream = self.current
        if self.holds(stream, lambda: self.enqueue(duration_ns, at_start, at_end)):
            return _NEVER_NS
        start_ns = max(stream.free_ns, self.true_ns + LATENCY_NS)
        stream.free_ns = start_ns + duration_ns
        for at_ns, action in ((start_ns, at_start), (stream.free_ns, at_end)):
            if action is not None:
                heapq.heappush(self._due, (at_ns, next(self._order), action))
        return stream.free_ns

    def stage(self, row: Row) -> None:
        """The kernel that waits until the host has told `row` once for each of its launches."""
        if self.capturing is not None:
            self.capturing.nodes.append(lambda: self._stage(row))
            return
        self.call("kernel")
        self._stage(row)

    @in_turn
    def _stage(self, row: Row) -> None:
        self._begun[row] += 1
        if row.words[TOLD] < self._begun[row]:
            assert self._held is None, "two launches wait for the host"
            self.num_held += 1
            self._held = self.current, row, self._begun[row], []
        self.enqueue(STAGE_NS)

    def holds(self, stream: FakeStream, action: Callable[[], object]) -> bool:
        """Whether `stream` waits for the host; then `action` is done once it has come."""
        if self._held is None or self._held[0] is not stream:
            return False
        self._held[3].append(action)
        return True

    def _let_go(self) -> None:
        assert self._held is not None
        stream, _, _, actions = self._held
        before, self.current, self._held = self.current, stream, None
        for action in actions:
            action()
        self.current = before

    def sleep(self, cycles: int) -> None:
        """`torch.cuda._sleep`."""
        if self.capturing is not None:
            self.capturing.nodes.append(lambda: self._spin(cycles))
            return
        self.call("_sleep")
        self._spin(cycles)

    def _spin(self, cycles: int) -> None:
        ghz = BUSY_GHZ if self._spun_ns > RAMP_NS else IDLE_GHZ
        taken_ns = SPIN_NS + round(cycles / ghz)
        self._spun_ns += taken_ns
        self.enqueue(taken_ns)

    @in_turn
    def kernel(self, duration_ns: int, work: Callable[[], object]) -> None:
        """A kernel on the current stream, or in the graph that is being captured."""
        if self.capturing is not None:
            self.capturing.nodes.append(lambda: self.enqueue(duration_ns, at_end=work))
            return
        self.call("kernel")
        self.enqueue(duration_ns, at_end=work)

    def memcpy(self, target: int, source: int, num_bytes: int, stream: FakeStream) -> None:
        """`cudaMemcpyAsync` to the device; from memory that is not pinned it blocks the host."""
        self._memcpy(target, source, num_bytes, stream, source)

    def memcpy_back(self, target: int, source: int, num_bytes: int, stream: FakeStream) -> None:
        """The same from the device, into memory of the host."""
        self._memcpy(target, source, num_bytes, stream, target)

    @in_turn
    def _memcpy(self, target: int, source: int, num_bytes: int, stream: FakeStream, on_host: int) -> None:
        assert self.capturing is None
        self.call("memcpy")
        before, self.current = self.current, stream
        end_ns = self.enqueue(
            COPY_NS + round(num_bytes / GB_PER_S),
            lambda: ctypes.memset(target, _SPOILT, num_bytes),
            lambda: ctypes.memmove(target, source, num_bytes),
        )
        self.current = before
        if not any(on_host in pinned for pinned in self.pinned):
            self.num_pageable += 1
            self.advance_to(end_ns)

    @in_turn
    def synchronize(self, device: object = None) -> None:
        """`torch.cuda.synchronize`."""
        self.call("synchronize")
        assert self._held is None, "the host waits for kernels that wait for it"
        self.advance_to(max(stream.free_ns for stream in self.streams))

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        """`torch.cuda.mem_get_info`."""
        self.call("mem_get_info")
        return FREE_BYTES, 2 * FREE_BYTES

    def set_stream(self, stream: FakeStream) -> None:
        """`torch.cuda.set_stream`."""
        self.current = stream

    def forget_unread(self) -> None:
        """What was launched so far was launched for its own sake."""
        self.num_unread = 0
        for event in self.external:
            event.is_read = True

    def new_stream(self, device: object = None, priority: int = 0) -> FakeStream:
        """`torch.cuda.Stream`."""
        self.call("Stream")
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        """Stand in for torch.cuda, and for the host's clock as `replay.machine` sees it."""
        properties = SimpleNamespace(name="Fake GPU", total_memory=2 * FREE_BYTES)
        for name, stand_in in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: properties,
            "mem_get_info": self.mem_get_info,
            "synchronize": self.synchronize,
            "empty_cache": lambda: self.call("empty_cache"),
            "Stream": self.new_stream,
            "Event": lambda enable_timing=False, external=False: FakeEvent(self, enable_timing, external),
            "CUDAGraph": lambda: FakeGraph(self),
            "graph_pool_handle": lambda: (0, 0),
            "set_stream": self.set_stream,
            "set_device": lambda device: self.call("set_device"),
            "current_stream": lambda device: self.current,
            "_sleep": self.sleep,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        for name in ("zeros", "empty"):
            monkeypatch.setattr(torch, name, self._pinning(getattr(torch, name)))
        monkeypatch.setattr("replay.machine.cuda.time", SimpleNamespace(perf_counter_ns=self.perf_counter_ns))
        monkeypatch.setattr("replay.machine.cuda.raw_copy", lambda: (self.memcpy, "a stand-in"))
        monkeypatch.setattr("replay.machine.cuda.raw_copy_back", lambda: self.memcpy_back)
        return self

    def _pinning(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*shape: Any, pin_memory: bool = False, device: Any = None, **kinds: Any) -> torch.Tensor:
            tensor = make(*shape, **kinds)
            if pin_memory:
                assert device is None, "only host memory is pinned"
                start = tensor.untyped_storage().data_ptr()
                self.pinned.append(range(start, start + tensor.untyped_storage().nbytes()))
            return tensor

        return made


class DeviceOnFake(CudaDevice):
    """`CudaDevice` whose GPU memory is the host's. Kernels run when the fake reaches them."""

    dtype = torch.float32

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        super().__init__()
        # Opening it launches programs for their own sake.
        cuda.forget_unread()
        self.numbers = Numbers(cuda, self._flag)  # type: ignore[assignment]
        self.torch_device = torch.device("cpu")

    def program(
        self,
        work: Work,
        pad_ns: int = 0,
        words: Words | None = None,
        captured: bool = True,
        row: Row | None = None,
    ) -> Program:
        """As CudaDevice's; `work` is one kernel, done by the time the stream has passed it."""
        return super().program(lambda: self.cuda.kernel(WORK_NS, work), pad_ns, words, captured, row)

    def _stage(self, row: Row) -> Work:
        return lambda: self.cuda.stage(row)

    def _gate(self, source: torch.Tensor, target: torch.Tensor) -> Work:
        def raise_number() -> None:
            target.copy_(source)
            self._flag += 1

        return lambda: self.cuda.kernel(GATE_NS, raise_number)


@contextmanager
def on_fake(drift_ppm: int = 0, forgetful: bool = False) -> Iterator[tuple[FakeCuda, DeviceOnFake]]:
    """A fake GPU and the device on it; torch is itself again afterwards. forgetful: see `FakeCuda`."""
    # What the CPU computes in place of a GPU is small, and compiled for no shape: each comes a few times only.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch, torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            cuda = FakeCuda(drift_ppm).install(monkeypatch)
            cuda.forgetful = forgetful
            yield cuda, DeviceOnFake(cuda)
    finally:
        torch.set_num_threads(threads)
