"""An NVIDIA GPU through torch: one compute and one copy stream, pooled events, a clock that both sides share.

Times are CUDA's own, from events. `elapsed_time` is a float32 of milliseconds, exact to a few ns only while its base
is young, so the base is renewed at every forward and whenever it has grown old. The host's clock is tied to them by
the least delay ever seen between an event and the host's finding it.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from replay.device import DeviceLostError, Span

_BASE_LIFE_NS = 10_000_000
"""A float32 of milliseconds resolves 1 ns up to 16 ms; at a minute it would be 4 us."""
_FORGET_NS = 5_000
"""Host and device clocks drift apart, by less than 200 ppm: the least delay seen is forgotten by 1 ns in so many."""
_PATIENCE_NS = 60_000_000_000
_POLLS = 4096
_SPIN_CYCLES = (50_000, 2_000_000)
_SETTLE_NS = 50_000_000
"""An idle GPU runs at a fraction of its clock; after this much work it has come up."""
_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
_OUR_MISTAKES = ("device not ready", "invalid argument", "invalid configuration argument", "invalid resource handle",
                 "CUBLAS_STATUS_INVALID_VALUE", "CUBLAS_STATUS_NOT_SUPPORTED")  # fmt: skip
"""CUDA errors that a wrong call earns and the device survives: they deserve their traceback."""


def explained(error: RuntimeError) -> Exception:
    """What `error`, raised by torch, means here: DeviceLostError, a ValueError with a remedy, or itself.

    Told apart by text: versions of torch differ in the class of a CUDA error, none in how it begins.
    """
    if isinstance(error, DeviceLostError):
        return error
    text = str(error)
    line = text.splitlines()[0].strip() if text.strip() else type(error).__name__
    if isinstance(error, torch.cuda.OutOfMemoryError):
        # Its first line is a paragraph: what was tried, what is free, who has the rest.
        return ValueError(f"GPU memory: {'. '.join(line.split('. ')[:2]).rstrip('.')}; lower residency, batch_size or "
                          "prefill_chunk, or close what else uses the GPU")  # fmt: skip
    if not line.startswith("CUDA error") or any(mistake in line for mistake in _OUR_MISTAKES):
        return error
    if any(memory in line for memory in _MEMORY):
        # The allocator speaks for GPU memory with a class of its own: what is left is pinned memory and libraries.
        return ValueError(f"memory that the GPU must reach: {line}; lower host_memory_gb (pinned memory) or residency")
    if "no kernel image" in line:
        return ValueError(f"machine=cuda: {line}: this build of torch has no kernels for this GPU; install one that "
                          "has, or choose machine=cpu")  # fmt: skip
    return DeviceLostError(line)


@contextmanager
def explaining() -> Iterator[None]:
    """Around what allocates or computes on the device beside `CudaDevice`: its errors as `explained`."""
    try:
        yield
    except RuntimeError as error:
        meaning = explained(error)
        if meaning is error:
            raise
        raise meaning from error


class CudaDevice:
    """Implements `replay.device.Device` on the current CUDA device; its settings are left as they are.

    ValueError if there is none, or none that works.
    """

    world = "cuda"
    dtype = torch.bfloat16

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("machine=cuda: torch sees no CUDA device here; choose machine=cpu, or install a CUDA "
                             "build of torch")  # fmt: skip
        self._lost = False
        self._pool: list[Any] = []
        self._next_base: Any = None
        try:
            self._guarded(self._open)
        except RuntimeError as error:
            raise ValueError(f"machine=cuda: the GPU does not answer ({str(error).splitlines()[0]}); see what "
                             "nvidia-smi says, or choose machine=cpu") from error  # fmt: skip

    def _open(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        # Neither stream waits for the default one, nor it for them: whoever fills memory there must synchronise.
        self._compute = torch.cuda.Stream(device=self.torch_device)
        self._link = torch.cuda.Stream(device=self.torch_device)
        self._base = self._event()
        self._restart_clock()

    def describe(self) -> Mapping[str, Any]:
        found = torch.cuda.get_device_properties(self.torch_device)
        return {
            "name": found.name,
            "memory_bytes": found.total_memory,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "platform": platform.system(),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _event(self) -> Any:
        return self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Most CUDA errors are sticky: nothing that follows on this device would work."""
        try:
            return call(*arguments)
        except RuntimeError as error:
            meaning = explained(error)
            self._lost = self._lost or isinstance(meaning, DeviceLostError)
            if meaning is error:
                raise
            raise meaning from error

    # -- the clock -------------------------------------------------------------------------------------------

    def restart_clock(self) -> None:
        self._guarded(self._restart_clock)

    def _restart_clock(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        # Anew for every run: the last one's kernels have brought the GPU to the clock that it runs at under load.
        self._overhead_ns, self._cycles_per_ns = self._measure_spin()
        if self._next_base is not None:
            self._pool.append(self._next_base)
            self._next_base = None
        self._base_ns = 0
        self._least_lag_ns = 1 << 62
        self._lag_at_ns = time.perf_counter_ns()
        self._base.record(self._compute)
        self._based_at_ns = self._lag_at_ns
        self._wait([self._base])
        for _ in range(50):
            probe = self._event()
            probe.record(self._compute)
            self._wait([probe])
            self._time_ns(probe)
            self._pool.append(probe)

    def _measure_spin(self) -> tuple[float, float]:
        """(ns, cycles per ns): what a spin kernel of no cycles takes between two events, and how fast it counts."""
        short, long = _SPIN_CYCLES
        spun_ns, last, tries = 0.0, 0.0, 0
        while True:
            long_ns = statistics.median(self._spin_ns(long) for _ in range(3))
            spun_ns += 3 * long_ns
            tries += 1
            steady = abs(long_ns - last) < 0.003 * long_ns or tries > 200
            if spun_ns > _SETTLE_NS and steady:
                break
            last = long_ns
        short_ns = statistics.median(self._spin_ns(short) for _ in range(5))
        rate = (long - short) / (long_ns - short_ns)
        return max(short_ns - short / rate, 0.0), rate

    def _spin_ns(self, cycles: int) -> float:
        start, end = self._event(), self._event()
        with torch.cuda.stream(self._compute):
            # The host must be ahead: else its own time between two calls would count.
            torch.cuda._sleep(_SPIN_CYCLES[0])
            start.record(self._compute)
            torch.cuda._sleep(cycles)
            end.record(self._compute)
        self._wait([end])
        self._pool += (start, end)
        return float(start.elapsed_time(end)) * 1e6

    def _renew_base(self) -> None:
        self._next_base = self._event()
        self._next_base.record(self._compute)
        self._based_at_ns = time.perf_counter_ns()

    def _keep_base_young(self) -> None:
        """Forwards may last seconds, and calibrations have none."""
        if self._next_base is None and time.perf_counter_ns() - self._based_at_ns > _BASE_LIFE_NS:
            self._renew_base()

    def begin_forward(self) -> None:
        if self._next_base is None:
            self._guarded(self._renew_base)

    def time_ns(self, event: Any) -> int:
        return int(self._guarded(self._time_ns, event))

    def _time_ns(self, event: Any) -> int:
        # It has happened, so the host's present bounds it from above; asking CUDA takes microseconds.
        found_ns = time.perf_counter_ns()
        coming = self._next_base
        if coming is not None and coming.query():
            self._base_ns += round(self._base.elapsed_time(coming) * 1e6)
            self._pool.append(self._base)
            self._base, self._next_base = coming, None
        # Negative for what happened before the base did.
        at_ns: int = self._base_ns + round(self._base.elapsed_time(event) * 1e6)
        # Forgetting is slower than time: `now_ns` never steps back, nor before an event that it was told of.
        forgotten_ns = (found_ns - self._lag_at_ns) // _FORGET_NS
        self._lag_at_ns += forgotten_ns * _FORGET_NS
        self._least_lag_ns = min(self._least_lag_ns + forgotten_ns, found_ns - at_ns)
        return at_ns

    def now_ns(self) -> int:
        return time.perf_counter_ns() - self._least_lag_ns

    # -- the streams -----------------------------------------------------------------------------------------

    def launch(self, work: Callable[[], None], pad_ns: int) -> Span:
        return self._guarded(self._launch, work, pad_ns)  # type: ignore[no-any-return]

    def _launch(self, work: Callable[[], None], pad_ns: int) -> Span:
        self._keep_base_young()
        start, end, stream = self._event(), self._event(), self._compute
        with torch.cuda.stream(stream):
            cycles = round((pad_ns - self._overhead_ns) * self._cycles_per_ns)
            if cycles > 0:
                torch.cuda._sleep(cycles)
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
        self._keep_base_young()
        start, end, stream = self._event(), self._event(), self._link
        if after is not None:
            # Of `after` as it was last recorded: it may be recycled and recorded again while this stream waits.
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
        began_ns = time.perf_counter_ns()
        queries = [event.query for event in events]
        while time.perf_counter_ns() - began_ns < _PATIENCE_NS:
            for _ in range(_POLLS):
                for query in queries:
                    if query():
                        return
        raise DeviceLostError(f"the GPU has not answered for {_PATIENCE_NS // 10**9} s")

    def recycle(self, event: Any) -> None:
        self._pool.append(event)

    # -- the whole device ------------------------------------------------------------------------------------

    def free_bytes(self) -> int | None:
        return int(self._guarded(self._free_bytes))

    def _free_bytes(self) -> int:
        # What torch keeps for later is taken in CUDA's eyes, and free in ours.
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return int(free)

    def synchronize(self) -> None:
        self._guarded(torch.cuda.synchronize, self.torch_device)

    def close(self) -> None:
        self._pool.clear()
        if not self._lost:
            # On a lost device this would raise in its turn.
            torch.cuda.empty_cache()
