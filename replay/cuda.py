"""An NVIDIA GPU through torch: one compute and one copy stream, pooled events, a clock that both sides share.

Times are CUDA's own, from events; `elapsed_time` is a float32 of milliseconds, so the base is renewed at every
forward. The host's clock is tied to them by the least delay ever seen between an event and the host's finding it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from replay.device import DeviceLostError, Span

_SPIN_PROBE_CYCLES = 4_000_000
_FORWARDS_A_WINDOW = 256
"""Host and device clocks drift: the least delay is kept over the last one to two windows."""


class CudaDevice:
    """Implements `replay.device.Device`. Needs a current CUDA device; its settings are left as they are."""

    world = "cuda"
    dtype = torch.bfloat16

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("machine=cuda: torch sees no CUDA device here; choose machine=cpu, or install a CUDA "
                             "build of torch")  # fmt: skip
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._compute = torch.cuda.Stream()
        self._link = torch.cuda.Stream()
        self._pool: list[Any] = []
        self._num_forwards = 0
        self._next_base: Any = None
        self._base = self._event()
        self.restart_clock()
        self._cycles_per_ns = self._guarded(self._measure_spin)

    def describe(self) -> Mapping[str, Any]:
        found = torch.cuda.get_device_properties(self.torch_device)
        return {
            "name": found.name,
            "memory_bytes": found.total_memory,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "platform": platform.system(),
            "dtype": "bfloat16",
        }

    def _event(self) -> Any:
        return self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """A CUDA error is sticky: nothing that follows on this device would work."""
        try:
            return call(*arguments)
        except RuntimeError as error:
            if "CUDA" in str(error):
                raise DeviceLostError(str(error).splitlines()[0]) from error
            raise

    def restart_clock(self) -> None:
        self._guarded(self._seed_clock)

    def _seed_clock(self) -> None:
        torch.cuda.synchronize()
        self._next_base = None
        self._base_ns = 0
        self._least_lag_ns = self._window_lag_ns = 1 << 62
        self._base.record(self._compute)
        self._base.synchronize()
        for _ in range(50):
            probe = self._event()
            probe.record(self._compute)
            probe.synchronize()
            self.time_ns(probe)
            self._pool.append(probe)

    def _measure_spin(self) -> float:
        """Cycles that torch's spin kernel burns per ns: how a pad is made to last."""
        start, end = self._event(), self._event()
        with torch.cuda.stream(self._compute):
            for _ in range(2):
                start.record(self._compute)
                torch.cuda._sleep(_SPIN_PROBE_CYCLES)
                end.record(self._compute)
        end.synchronize()
        return _SPIN_PROBE_CYCLES / (float(start.elapsed_time(end)) * 1e6)

    def launch(self, work: Callable[[], None], pad_ns: int) -> Span:
        return self._guarded(self._launch, work, pad_ns)  # type: ignore[no-any-return]

    def _launch(self, work: Callable[[], None], pad_ns: int) -> Span:
        start, end, stream = self._event(), self._event(), self._compute
        with torch.cuda.stream(stream):
            if pad_ns:
                torch.cuda._sleep(round(pad_ns * self._cycles_per_ns))
            start.record(stream)
            work()
            end.record(stream)
        return start, end

    def read_back(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        return self._guarded(self._read_back, target, source)

    def _read_back(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        end = self._event()
        with torch.cuda.stream(self._compute):
            target.copy_(source, non_blocking=True)
            end.record(self._compute)
        return end

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Span:
        return self._guarded(self._copy, target, source, after)  # type: ignore[no-any-return]

    def _copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Span:
        start, end, stream = self._event(), self._event(), self._link
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            start.record(stream)
            target.copy_(source, non_blocking=True)
            end.record(stream)
        return start, end

    def happened(self, event: Any) -> bool:
        return bool(self._guarded(event.query))

    def wait(self, events: Sequence[Any]) -> None:
        self._guarded(self._wait, events)

    def _wait(self, events: Sequence[Any]) -> None:
        # Polled: a blocking synchronisation sleeps for longer than a chunk takes, and knows only one event.
        if len(events) == 1:
            query = events[0].query
            while not query():
                pass
            return
        while not any(event.query() for event in events):
            pass

    def time_ns(self, event: Any) -> int:
        coming = self._next_base
        if coming is not None and coming.query():
            self._base_ns += round(self._base.elapsed_time(coming) * 1e6)
            self._pool.append(self._base)
            self._base, self._next_base = coming, None
        at_ns = self._base_ns + round(self._base.elapsed_time(event) * 1e6)
        lag_ns = time.perf_counter_ns() - at_ns
        if lag_ns < self._window_lag_ns:
            self._window_lag_ns = lag_ns
            if lag_ns < self._least_lag_ns:
                self._least_lag_ns = lag_ns
        return at_ns

    def now_ns(self) -> int:
        return time.perf_counter_ns() - self._least_lag_ns

    def recycle(self, event: Any) -> None:
        self._pool.append(event)

    def begin_forward(self) -> None:
        if self._next_base is None:
            self._next_base = self._event()
            self._guarded(self._next_base.record, self._compute)
        self._num_forwards += 1
        if self._num_forwards % _FORWARDS_A_WINDOW == 0:
            self._least_lag_ns, self._window_lag_ns = self._window_lag_ns, 1 << 62

    def free_bytes(self) -> int | None:
        free, _ = self._guarded(torch.cuda.mem_get_info)
        return int(free)

    def synchronize(self) -> None:
        self._guarded(torch.cuda.synchronize)

    def close(self) -> None:
        self._pool.clear()
