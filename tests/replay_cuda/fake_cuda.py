"""A torch.cuda without a GPU: streams and events on a simulated time line, bytes that move when the device says so.

Time passes only by what the host calls, so every run is the same. A stream is first in, first out; an event gets its
time when it is recorded, since all that precedes it in its stream is known by then. What a copy or a kernel does to
memory is done when the simulated device gets there: a copy spoils its target at its start and fills it at its end, a
kernel reads and writes at its end, so that what is not ordered on the device is not in order here either.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from replay.cuda import CudaDevice

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
FREE_BYTES = 8 << 30
_SPOILT = 0x7F


class FakeStream:
    """`torch.cuda.Stream`. free_ns: when all that is enqueued has ended."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.free_ns = 0

    def wait_event(self, event: FakeEvent) -> None:
        """What is enqueued later starts no earlier than the event as recorded now; unrecorded: no wait at all."""
        self._cuda.call("wait_event")
        if event.at_ns is not None:
            self.free_ns = max(self.free_ns, event.at_ns)


class FakeEvent:
    """`torch.cuda.Event(enable_timing=True)`. at_ns: when the device passes it; None = never recorded."""

    def __init__(self, cuda: FakeCuda, enable_timing: bool = False) -> None:
        self._cuda = cuda
        self._timed = enable_timing
        self.at_ns: int | None = None
        self.num_records = 0
        cuda.num_events += 1

    def record(self, stream: FakeStream) -> None:
        """At the end of what `stream` holds; a second record makes the first one unreadable."""
        cuda = self._cuda
        cuda.call("record")
        cuda.num_spoiled += self.at_ns is not None and self.at_ns > cuda.true_ns
        self.num_records += 1
        self.at_ns = stream.free_ns = max(stream.free_ns, cuda.true_ns + LATENCY_NS)

    def query(self) -> bool:
        """True for an event that was never recorded, as in CUDA."""
        self._cuda.call("query")
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
        return float(np.float32((cuda.device_ns(end.at_ns) - cuda.device_ns(self.at_ns)) / 1e6))


class FakeCuda:
    """One GPU and the host that drives it. drift_ppm: by how much the device's clock runs faster than the host's."""

    def __init__(self, drift_ppm: int = 0) -> None:
        self.drift_ppm = drift_ppm
        self.true_ns = 0
        self.calls: Counter[str] = Counter()
        self.call_ns: dict[str, int] = {}
        self.num_events = 0
        self.num_spoiled = 0
        """Events recorded anew before they had happened."""
        self.default = FakeStream(self)
        self.streams = [self.default]
        self.current = self.default
        self.pinned: set[int] = set()
        self.num_pageable = 0
        self._spun_ns = 0
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

    def advance_to(self, true_ns: int) -> None:
        """Let the device do what falls due until then, in its order."""
        self.true_ns = max(self.true_ns, true_ns)
        if self._due and self._due[0][0] <= self.true_ns:
            # The host may be inside a stream's context, where nothing is computed at once; the device is not.
            with _disable_current_modes():
                while self._due and self._due[0][0] <= self.true_ns:
                    heapq.heappop(self._due)[2]()

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

    def enqueue(self, duration_ns: int, at_start: Callable[[], object] | None = None,
                at_end: Callable[[], object] | None = None) -> int:  # fmt: skip
        """Put work of a known duration onto the current stream; returns when it ends."""
        stream = self.current
        start_ns = max(stream.free_ns, self.true_ns + LATENCY_NS)
        stream.free_ns = start_ns + duration_ns
        for at_ns, action in ((start_ns, at_start), (stream.free_ns, at_end)):
            if action is not None:
                heapq.heappush(self._due, (at_ns, next(self._order), action))
        return stream.free_ns

    def sleep(self, cycles: int) -> None:
        """`torch.cuda._sleep`."""
        self.call("_sleep")
        ghz = BUSY_GHZ if self._spun_ns > RAMP_NS else IDLE_GHZ
        taken_ns = SPIN_NS + round(cycles / ghz)
        self._spun_ns += taken_ns
        self.enqueue(taken_ns)

    def move(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """`target.copy_(source, non_blocking=True)`; from or to memory that is not pinned it blocks the host."""
        self.call("copy_")
        num_bytes = target.numel() * target.element_size()
        end_ns = self.enqueue(COPY_NS + round(num_bytes / GB_PER_S), lambda: target.fill_(_SPOILT),
                              lambda: target.copy_(source))  # fmt: skip
        if not {tensor.untyped_storage().data_ptr() for tensor in (target, source)} & self.pinned:
            self.num_pageable += 1
            self.advance_to(end_ns)

    def synchronize(self, device: object = None) -> None:
        """`torch.cuda.synchronize`."""
        self.call("synchronize")
        self.advance_to(max(stream.free_ns for stream in self.streams))

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        """`torch.cuda.mem_get_info`."""
        self.call("mem_get_info")
        return FREE_BYTES, 2 * FREE_BYTES

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        """`torch.cuda.stream`."""
        before, self.current = self.current, stream
        try:
            with _Enqueuing(self):
                yield
        finally:
            self.current = before

    def new_stream(self, device: object = None, priority: int = 0) -> FakeStream:
        """`torch.cuda.Stream`."""
        self.call("Stream")
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        """Stand in for torch.cuda, and for the host's clock as `replay.cuda` sees it."""
        properties = SimpleNamespace(name="Fake GPU", total_memory=2 * FREE_BYTES)
        for name, stand_in in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: properties,
            "mem_get_info": self.mem_get_info,
            "synchronize": self.synchronize,
            "empty_cache": lambda: self.call("empty_cache"),
            "Stream": self.new_stream,
            "Event": lambda enable_timing=False: FakeEvent(self, enable_timing),
            "stream": self.stream,
            "_sleep": self.sleep,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        for name in ("zeros", "empty"):
            monkeypatch.setattr(torch, name, self._pinning(getattr(torch, name)))
        monkeypatch.setattr("replay.cuda.time", SimpleNamespace(perf_counter_ns=self.perf_counter_ns))
        return self

    def _pinning(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*shape: Any, pin_memory: bool = False, **kinds: Any) -> torch.Tensor:
            tensor = make(*shape, **kinds)
            if pin_memory:
                self.pinned.add(tensor.untyped_storage().data_ptr())
            return tensor

        return made


class _Enqueuing(TorchDispatchMode):
    """Inside a stream's context: non-blocking copies go onto the stream, nothing else may be computed at once."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source, *non_blocking = args
            assert (kwargs or {}).get("non_blocking", bool(non_blocking and non_blocking[0])), "a blocking copy"
            self._cuda.move(target, source)
            return target
        raise AssertionError(f"{func} would run before its turn")


class DeviceOnFake(CudaDevice):
    """`CudaDevice` whose GPU memory is the host's. Kernels run when the fake reaches them.

    Every event that was handed out is followed: whoever asks for one that was recorded for something else since, or
    that was given back, is told.
    """

    dtype = torch.float32

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.torch_device = torch.device("cpu")
        # With the event itself: an id is given anew when its object is gone.
        self._out: dict[int, tuple[Any, int]] = {}

    def launch(self, work: Callable[[], None], pad_ns: int) -> tuple[Any, Any]:
        """As CudaDevice's; `work` is done by the time the stream has passed it."""
        return self._follow(super().launch(lambda: self.cuda.enqueue(WORK_NS, at_end=work), pad_ns))

    def read_back(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """As CudaDevice's."""
        (event,) = self._follow((super().read_back(target, source),))
        return event

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[Any, Any]:
        """As CudaDevice's."""
        if after is not None:
            self._check(after)
        return self._follow(super().copy(target, source, after))

    def happened(self, event: Any) -> bool:
        """As CudaDevice's."""
        self._check(event)
        return super().happened(event)

    def wait(self, events: Any) -> None:
        """As CudaDevice's."""
        for event in events:
            self._check(event)
        super().wait(events)

    def time_ns(self, event: Any) -> int:
        """As CudaDevice's."""
        self._check(event)
        return super().time_ns(event)

    def recycle(self, event: Any) -> None:
        """As CudaDevice's."""
        self._check(event)
        del self._out[id(event)]
        super().recycle(event)

    def _follow(self, events: Any) -> Any:
        for event in events:
            assert id(event) not in self._out, "an event was handed out twice"
            self._out[id(event)] = (event, event.num_records)
        return events

    def _check(self, event: Any) -> None:
        followed = self._out.get(id(event))
        assert followed == (event, event.num_records), "an event was asked for after it had been given back"


@contextmanager
def on_fake(drift_ppm: int = 0) -> Iterator[tuple[FakeCuda, DeviceOnFake]]:
    """A fake GPU and the device on it; torch is itself again afterwards."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda = FakeCuda(drift_ppm).install(monkeypatch)
        yield cuda, DeviceOnFake(cuda)
