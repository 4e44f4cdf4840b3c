"""A machine without a GPU: the two streams are threads, copies move real memory, kernels compute.

The same runtime, policies and `replay.machine.real` drive it as a GPU. A stated bandwidth may throttle the copies: each
then lasts at least `latency + bytes / bandwidth`, and copies back to back keep that pace on average.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import torch

from replay.lost import DeviceLostError
from replay.machine.device import Program, Way, Words, Work
from replay.machine.launch_row import Row
from replay.machine.ways import MemoryWay

_SLACK_NS = 1000
_LATE_NS = 2_000_000
"""ns by which a copy may end late. If it is later, the clock of the link is set to the time of the thread again."""
_SWITCH_S = 20e-6
"""How long a thread may wait for the interpreter: the default of 5 ms would dwarf what is measured here."""
_PR_SET_TIMERSLACK = 29


class _CpuEvent:
    __slots__ = ("happened", "ns")

    def __init__(self) -> None:
        self.happened = False
        self.ns = 0


_Task = tuple[int, _CpuEvent | None, int, _CpuEvent, Callable[[], object], int, _CpuEvent, Callable[[], object] | None]
"""(enqueued at, wait for, pad ns, start, work, least ns, end, what follows the end)."""


class _Stream(threading.Thread):
    """Runs tasks in order and stamps their starts and ends."""

    def __init__(self, device: CpuDevice, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.device = device
        self.tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self.start()

    def run(self) -> None:
        _sharpen_sleep()
        # Per thread: one for each stream and one for the host; more would fight over two cores.
        torch.set_num_threads(1)
        # Compiled products run as they are: the optimiser would compile anew for every shape that it meets, in a run.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            self._serve()

    def _serve(self) -> None:
        clock, news, due = time.perf_counter_ns, self.device.news, 0
        while (task := self.tasks.get()) is not None:
            put_ns, after, pad_ns, start, work, least_ns, end, then = task
            try:
                if after is not None:
                    while not after.happened:
                        time.sleep(20e-6)
                begun = clock()
                if pad_ns:
                    _sleep_until(begun + pad_ns)
                start.ns = clock()
                start.happened = True
                work()
                if least_ns:
                    due = self._pace(put_ns, after, start, least_ns, due)
            except BaseException as error:
                self.device.failure = error
            end.ns = due if least_ns and due > start.ns else clock()
            end.happened = True
            if then is not None:
                then()
            news.put(None)

    def _pace(self, put_ns: int, after: _CpuEvent | None, start: _CpuEvent, least_ns: int, due: int) -> int:
        """Let a copy last as long as the link would take; when it ends, on the link's clock.

        The thread that plays the link wakes late, more so when others hold the interpreter. The link does not: a copy
        that waited behind another begins when that one ended, and one whose bytes are there ends when it is due.
        """
        if put_ns < due and after is None:
            start.ns = due
        due = start.ns + least_ns
        _sleep_until(due)
        late = time.perf_counter_ns()
        return due if late - due < _LATE_NS else late


class CpuDevice:
    """Implements `replay.machine.device.Device` in the host's own memory.

    throttle_gb_per_s: rate of the link in GB/s; None = as fast as the memory goes.
    """

    world = "cpu"
    dtype = torch.float32
    captures = False
    launches_ahead = False
    ends_inside = True

    def __init__(self, throttle_gb_per_s: float | None = None, latency_ns: int = 0) -> None:
        self.torch_device = torch.device("cpu")
        self.throttle_gb_per_s = throttle_gb_per_s
        self.latency_ns = latency_ns
        self.news: SimpleQueue[None] = SimpleQueue()
        self.failure: BaseException | None = None
        self._number = [0]
        self.numbers: Sequence[int] = self._number
        self._switch_s = sys.getswitchinterval()
        self._num_threads = torch.get_num_threads()
        sys.setswitchinterval(_SWITCH_S)
        torch.set_num_threads(1)
        self._epoch_ns = time.perf_counter_ns()
        self._compute = _Stream(self, "compute stream")
        self._link = _Stream(self, "copy stream")

    def describe(self) -> Mapping[str, Any]:
        return {
            "name": platform.processor() or platform.machine(),
            "memory_bytes": None,
            "torch": torch.__version__,
            "throttle_gb_per_s": self.throttle_gb_per_s,
            "dtype": "float32",
        }

    def program(
        self,
        work: Work,
        pad_ns: int = 0,
        words: Words | None = None,
        captured: bool = True,
        row: Row | None = None,
    ) -> Program:
        then = None if words is None else self._gate(*words)

        def run() -> None:
            # New ones: a copy that waits for the last launch is not to wait for this one.
            program.start, program.end = start, end = _CpuEvent(), _CpuEvent()
            self._compute.tasks.put((0, None, pad_ns, start, work, 0, end, then))

        program = Program(_CpuEvent(), _CpuEvent(), run, row)
        return program

    def _gate(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
        """Copies the words, then raises the number: both by the stream's thread alone."""
        numbers = self._number

        def gate() -> None:
            target.copy_(source)
            numbers[0] += 1

        return gate

    def launch(self, program: Program) -> None:
        program.run()

    def copy(self, target: int, source: int, num_bytes: int, after: _CpuEvent | None) -> _CpuEvent:
        start, end = _CpuEvent(), _CpuEvent()
        least_ns = 0
        if self.throttle_gb_per_s is not None:
            least_ns = self.latency_ns + round(num_bytes / self.throttle_gb_per_s)
        now_ns = time.perf_counter_ns()
        self._link.tasks.put(
            (now_ns, after, 0, start, partial(ctypes.memmove, target, source, num_bytes), least_ns, end, None)
        )
        return end

    def disturb(self, target: int, source: int, num_bytes: int) -> None:
        moved = partial(ctypes.memmove, target, source, num_bytes)
        self._compute.tasks.put((0, None, 0, _CpuEvent(), moved, 0, _CpuEvent(), None))

    def happened(self, event: _CpuEvent) -> bool:
        if self.failure is not None:
            raise DeviceLostError(f"a stream of the CPU machine failed: {self.failure}") from self.failure
        return event.happened

    def wait(self, number: int, event: _CpuEvent | None = None, idle: Callable[[], object] | None = None) -> None:
        # The streams are threads of this interpreter: to poll would be to take it from them.
        numbers = self.numbers
        while not ((number > 0 and numbers[0] >= number) or (event is not None and event.happened)):
            if idle is not None:
                idle()
            self.news.get()

    def wait_until(self, there: Callable[[], bool], idle: Callable[[], object] | None, limit_ns: int) -> bool:
        until_ns = time.perf_counter_ns() + limit_ns
        while not there():
            if idle is not None:
                idle()
            left_ns = until_ns - time.perf_counter_ns()
            if left_ns <= 0:
                return False
            with suppress(Empty):
                self.news.get(timeout=left_ns * 1e-9)
        return True

    def way(self, memory: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> Way:
        return MemoryWay(*memory)

    def tell(self) -> None:
        self.news.put(None)

    def time_ns(self, event: _CpuEvent) -> int:
        return event.ns - self._epoch_ns

    def now_ns(self) -> int:
        return time.perf_counter_ns() - self._epoch_ns

    def recycle(self, event: _CpuEvent) -> None:
        """An event of this machine is a small object: the interpreter recycles it."""

    def begin_forward(self) -> None:
        """One clock for everything: no base to renew."""

    def restart_clock(self) -> None:
        self._epoch_ns = time.perf_counter_ns()

    def free_bytes(self) -> int | None:
        return None

    def synchronize(self) -> None:
        for stream in (self._compute, self._link):
            done = _CpuEvent()
            stream.tasks.put((0, None, 0, _CpuEvent(), _nothing, 0, done, None))
            self.wait(0, done)
        if self.failure is not None:
            raise DeviceLostError(f"a stream of the CPU machine failed: {self.failure}") from self.failure

    def close(self) -> None:
        for stream in (self._compute, self._link):
            stream.tasks.put(None)
            stream.join()
        sys.setswitchinterval(self._switch_s)
        torch.set_num_threads(self._num_threads)


def _nothing() -> None:
    """A task that does nothing: it marks a point in its stream."""


def _sleep_until(due_ns: int) -> None:
    left = due_ns - time.perf_counter_ns()
    if left > _SLACK_NS:
        time.sleep(left * 1e-9)


def _sharpen_sleep() -> None:
    """Linux rounds a thread's sleeps up by 50 us unless told otherwise; elsewhere this does nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS))
