"""The clock of a CUDA device: when an event happened on the GPU, and what time it is there now.

Times are CUDA's own, from events. `elapsed_time` is a float32 of milliseconds, exact to a few ns only while its base
is young, so the base is renewed at every forward and whenever it has grown old. The host's clock is tied to them by
the least delay ever seen between an event and the host's finding it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

_BASE_LIFE_NS = 10_000_000
"""Age at which the base is renewed: a float32 of milliseconds resolves 1 ns up to 16 ms, and 4 us after a minute."""
_FORGET_NS = 5_000
"""The least delay seen is raised by 1 ns every so many ns, since the clocks of host and device drift apart by up to
200 ppm."""
_SPIN_CYCLES = (50_000, 2_000_000)
_SETTLE_NS = 50_000_000
"""Work after which an idle GPU, which runs at a fraction of its clock rate, has reached its full rate."""
_NUM_PROBES = 50

Wait = Callable[[Any], None]
"""Blocks the host until an event has happened."""


class CudaClock:
    """Times in ns since the last restart, and how long the GPU's spin kernel takes for a number of cycles.

    stream: where its own events are recorded. pool: events that nobody uses; the clock takes its own from there, and
    gives back what it is done with. make_event: makes one where the pool is empty. host_ns: the host's clock, in ns.
    What CUDA raises goes through. `restart` must be called before any time is asked for.
    """

    def __init__(self, stream: Any, pool: list[Any], make_event: Callable[[], Any], host_ns: Callable[[], int]) -> None:
        self._stream, self._pool, self._make_event, self._host_ns = stream, pool, make_event, host_ns
        self._base = self._event()
        self._base_ns = 0
        self._next_base: Any = None
        self._based_at_ns = self._lag_at_ns = self._host_ns()
        self._least_lag_ns = 1 << 62
        self._spin_overhead_ns = 0.0
        self._cycles_per_ns = 0.0

    def restart(self, wait: Wait) -> None:
        """Measure the spin kernel, then count from now. Nothing may run on the device."""
        # Anew for every run: the last one's kernels have brought the GPU to the clock that it runs at under load.
        self._spin_overhead_ns, self._cycles_per_ns = self._measure_spin(wait)
        self.count_from_now(wait)

    def count_from_now(self, wait: Wait) -> None:
        """Record a new base, and learn from a few events how late the host finds one. Nothing may run."""
        if self._next_base is not None:
            self._pool.append(self._next_base)
            self._next_base = None
        self._base_ns = 0
        self._least_lag_ns = 1 << 62
        self._lag_at_ns = self._host_ns()
        self._base.record(self._stream)
        self._based_at_ns = self._lag_at_ns
        wait(self._base)
        for _ in range(_NUM_PROBES):
            probe = self._event()
            probe.record(self._stream)
            wait(probe)
            self.time_ns(probe)
            self._pool.append(probe)

    def cycles(self, pad_ns: int) -> int:
        """How many cycles a spin kernel must count to last `pad_ns`; 0 or less where its launch alone lasts longer."""
        return round((pad_ns - self._spin_overhead_ns) * self._cycles_per_ns)

    def begin_forward(self) -> None:
        """Nothing runs on the stream: renew the base, and forget a little of the least delay."""
        # Forgetting is slower than time: `now_ns` never steps back, nor before an event that it was told of.
        forgotten_ns = (self._host_ns() - self._lag_at_ns) // _FORGET_NS
        self._lag_at_ns += forgotten_ns * _FORGET_NS
        self._least_lag_ns += forgotten_ns
        if self._next_base is None:
            self._renew_base()

    def time_ns(self, event: Any) -> int:
        """When `event`, which has happened, did so."""
        # It has happened, so the host's present bounds it from above; asking CUDA takes microseconds.
        found_ns = self._host_ns()
        coming = self._next_base
        if coming is not None:
            if coming.query():
                self._base_ns += round(self._base.elapsed_time(coming) * 1e6)
                self._pool.append(self._base)
                self._base, self._next_base = coming, None
        elif found_ns - self._based_at_ns > _BASE_LIFE_NS:
            # Forwards may last seconds, and calibrations have none.
            self._renew_base()
        # Negative for what happened before the base did.
        at_ns: int = self._base_ns + round(self._base.elapsed_time(event) * 1e6)
        if found_ns - at_ns < self._least_lag_ns:
            self._least_lag_ns = found_ns - at_ns
        return at_ns

    def now_ns(self) -> int:
        """The host's present; never before an event whose time was asked for."""
        return self._host_ns() - self._least_lag_ns

    def ask(self) -> None:
        """Ask CUDA something: a device that is lost answers whatever it is asked with its error."""
        self._base.query()

    def _event(self) -> Any:
        return self._pool.pop() if self._pool else self._make_event()

    def _renew_base(self) -> None:
        self._next_base = self._event()
        self._next_base.record(self._stream)
        self._based_at_ns = self._host_ns()

    # -- the spin kernel -------------------------------------------------------------------------------------

    def _measure_spin(self, wait: Wait) -> tuple[float, float]:
        """(ns, cycles per ns): what a spin kernel of no cycles takes between two events, and how fast it counts."""
        short, long = _SPIN_CYCLES
        spun_ns, last, tries = 0.0, 0.0, 0
        while True:
            long_ns = statistics.median(self._spin_ns(long, wait) for _ in range(3))
            spun_ns += 3 * long_ns
            tries += 1
            settled = abs(long_ns - last) < 0.003 * long_ns or tries > 200
            if spun_ns > _SETTLE_NS and settled:
                break
            last = long_ns
        short_ns = statistics.median(self._spin_ns(short, wait) for _ in range(5))
        rate = (long - short) / (long_ns - short_ns)
        return max(short_ns - short / rate, 0.0), rate

    def _spin_ns(self, cycles: int, wait: Wait) -> float:
        start, end = self._event(), self._event()
        # The host must be ahead: else its own time between two calls would count.
        torch.cuda._sleep(_SPIN_CYCLES[0])
        start.record(self._stream)
        torch.cuda._sleep(cycles)
        end.record(self._stream)
        wait(end)
        self._pool += (start, end)
        return float(start.elapsed_time(end)) * 1e6
