"""An NVIDIA GPU through torch: programs as CUDA graphs and raw copies, timed by `replay.machine.cuda_clock`.

A program is one graph: a pad, an event, the kernels, an event, and where the host waits for it a kernel that raises a
number in pinned memory, which the host polls. Launching it costs the host some 3 us whatever it holds (results of an
H200 in `results/`). Events inside graphs need torch 2.8, the first with external events.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import torch

from replay.lost import DeviceLostError
from replay.machine.cuda_clock import CudaClock
from replay.machine.cuda_errors import explained, told_if_lost
from replay.machine.device import Program, Way, Words, Work
from replay.machine.launch_row import Row, words_of
from replay.machine.raw import raw_copy, raw_copy_back
from replay.machine.slot_kernels import gate, stage
from replay.machine.ways import CudaWay

_PATIENCE_NS = 60_000_000_000
_POLLS = 64
"""Polls of the device between two looks at the clock and at what else there is to do."""
_ASK_NS = 1_000_000
_PROBE_NS = 2_000_000


class CudaDevice:
    """Implements `replay.machine.device.Device` on the current CUDA device; its settings are left as they are.

    ValueError if there is none, or none that works.
    """

    world = "cuda"
    dtype = torch.bfloat16

    captures = True
    launches_ahead = platform.machine().lower() in ("x86_64", "amd64")
    """A row that is told while its launch waits is read word by word: only hosts that make stores visible in their
    order may do that. Elsewhere rows are written before the launch, whose call orders them."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError(
                "machine=cuda: torch sees no CUDA device here; choose machine=cpu, or install a CUDA build of torch"
            )
        try:
            torch.cuda.Event(enable_timing=True, external=True)
        except TypeError as error:
            raise ValueError(
                f"machine=cuda: torch {torch.__version__} has no timing events inside CUDA graphs; "
                "install torch 2.8 or later"
            ) from error
        self._lost = False
        self._pool: list[Any] = []
        try:
            self._guarded(self._open)
        except RuntimeError as error:
            raise ValueError(
                f"machine=cuda: the GPU does not answer ({str(error).splitlines()[0]}); see what "
                "nvidia-smi says, or choose machine=cpu"
            ) from error

    def _open(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        # Neither stream waits for the default one, nor it for them: whoever fills memory there must synchronise.
        self._compute = torch.cuda.Stream(device=self.torch_device)
        self._link = torch.cuda.Stream(device=self.torch_device)
        # A graph is launched on torch's current stream; entering a context costs four times what a launch does.
        self._before = torch.cuda.current_stream(self.torch_device)
        torch.cuda.set_stream(self._compute)
        self._memory = torch.cuda.graph_pool_handle()
        self._counter = torch.zeros(1, dtype=torch.int64, device=self.torch_device)
        self._flag = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self.numbers: Sequence[int] = words_of(self._flag)
        self._raw_copy, self.copies_by = raw_copy()
        # Graphs share the memory of what they compute in between; a pool that no graph holds may not be used again.
        self._counter.add_(0)
        self._keeper = self._capture(lambda: _ignore(self._counter.add_(0)))
        self._use_clock(CudaClock(self._compute, self._pool, _timing_event, time.perf_counter_ns))
        self._restart_clock()
        self.ends_inside = self._tells_ends()

    def _tells_ends(self) -> bool:
        """Whether an event inside a graph counts as not yet happened from the moment at which its graph is launched
        again.

        If not, it seems to have happened at the time of the launch before. CUDA's documents say that each launch
        records the event anew, but not from when on that can be seen.
        """
        self.ends_inside = True
        program = self._program(_nothing, _PROBE_NS, None, True)
        told = True
        for _ in range(2):
            program.run()
            told = not program.end.query()
            torch.cuda.synchronize(self.torch_device)
        return told

    def describe(self) -> Mapping[str, Any]:
        found = torch.cuda.get_device_properties(self.torch_device)
        return {
            "name": found.name,
            "memory_bytes": found.total_memory,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "platform": platform.system(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "copies_by": self.copies_by,
            "ends_inside_graphs": self.ends_inside,
        }

    def _event(self) -> Any:
        return self._pool.pop() if self._pool else _timing_event()

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call `call` and raise its errors as `explained` gives them."""
        try:
            return call(*arguments)
        except RuntimeError as error:
            self._explain(error)

    # -- the clock -------------------------------------------------------------------------------------------

    def _use_clock(self, clock: CudaClock) -> None:
        # The host asks both for each chunk: bound here, they cost no call more than the clock's own.
        self._clock, self._time_ns = clock, clock.time_ns
        self.now_ns = clock.now_ns  # type: ignore[method-assign]

    def restart_clock(self) -> None:
        self._guarded(self._restart_clock)

    def _restart_clock(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        self._clock.restart(partial(self._wait, 0))

    def begin_forward(self) -> None:
        self._guarded(self._clock.begin_forward)

    def time_ns(self, event: Any) -> int:
        try:
            return self._time_ns(event)
        except RuntimeError as error:
            self._explain(error)

    def now_ns(self) -> int:
        return self._clock.now_ns()

    # -- programs --------------------------------------------------------------------------------------------

    def program(
        self,
        work: Work,
        pad_ns: int = 0,
        words: Words | None = None,
        captured: bool = True,
        row: Row | None = None,
    ) -> Program:
        made: Program = self._guarded(self._program, work, pad_ns, words, captured, row)
        return made

    def _program(self, work: Work, pad_ns: int, words: Words | None, captured: bool, row: Row | None = None) -> Program:
        start, end = (torch.cuda.Event(enable_timing=True, external=captured) for _ in range(2))
        cycles, stream = self._clock.cycles(pad_ns), self._compute
        gate = None if words is None else self._gate(*words)
        staged = None if row is None else self._stage(row)

        inside = self.ends_inside or not captured

        def launch() -> None:
            if cycles > 0:
                torch.cuda._sleep(cycles)
            if staged is not None:
                staged()
            start.record(stream)
            work()
            if inside:
                end.record(stream)
            if gate is not None:
                gate()

        if not captured:
            return Program(start, end, launch if row is None else partial(tell_and_run, row, launch), row)
        # Libraries load, and kernels are compiled, on first use, which must not fall into a capture.
        if row is not None and staged is not None:
            row.tell()
            staged()
        work()
        if gate is not None:
            gate()
        torch.cuda.synchronize(self.torch_device)
        replay = self._capture(launch).replay
        run = replay if inside else partial(_replay_and_record, replay, end, stream)
        return (
            Program(start, end, run) if row is None else Program(start, end, partial(tell_and_run, row, run), row, run)
        )

    def _capture(self, launch: Work) -> Any:
        """A graph of what `launch` enqueues. torch.cuda.graph would collect garbage and empty caches at every one."""
        graph = torch.cuda.CUDAGraph()
        # To collect a graph of before would end the capture (pytorch issue 161037).
        enabled = gc.isenabled()
        gc.disable()
        try:
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                launch()
            except BaseException:
                # It has to end, which may fail for what went wrong in it: that is what deserves to be told.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        finally:
            if enabled:
                gc.enable()
        return graph

    def _gate(self, source: torch.Tensor, target: torch.Tensor) -> Work:
        """Copies the words and raises the number, in this order as the host sees it."""
        return gate(source, target, self._counter, self._flag)

    def _stage(self, row: Row) -> Work:
        """Waits for the host's word, then brings the row to the device."""
        return stage(row)

    def _explain(self, error: RuntimeError) -> NoReturn:
        """Raise what `error` means. Most CUDA errors are sticky: nothing that follows on this device would work."""
        meaning = explained(error)
        self._lost = self._lost or isinstance(meaning, DeviceLostError)
        told_if_lost(meaning)
        if meaning is error:
            raise error
        raise meaning from error

    # -- the streams -----------------------------------------------------------------------------------------

    def launch(self, program: Program) -> None:
        try:
            program.run()
        except RuntimeError as error:
            self._explain(error)

    def copy(self, target: int, source: int, num_bytes: int, after: Any) -> Any:
        stream = self._link
        try:
            if after is not None:
                # Of `after` as it was last recorded: it may be recorded again while this stream waits.
                stream.wait_event(after)
            self._raw_copy(target, source, num_bytes, stream)
            end = self._pool.pop() if self._pool else self._event()
            end.record(stream)
        except RuntimeError as error:
            self._explain(error)
        return end

    def disturb(self, target: int, source: int, num_bytes: int) -> None:
        self._guarded(self._raw_copy, target, source, num_bytes, self._compute)

    def happened(self, event: Any) -> bool:
        try:
            return bool(event.query())
        except RuntimeError as error:
            self._explain(error)

    def wait(self, number: int, event: Any = None, idle: Callable[[], object] | None = None) -> None:
        try:
            self._wait(number, event, idle)
        except RuntimeError as error:
            self._explain(error)

    def _wait(self, number: int, event: Any, idle: Callable[[], object] | None = None) -> None:
        # Polled: a blocking synchronisation sleeps for longer than a chunk takes, and knows only one event.
        numbers: Sequence[int] = self.numbers
        if number <= 0:
            number, numbers = 1, (0,)
        query = _never if event is None else event.query
        began_ns = asked_ns = now_ns = time.perf_counter_ns()
        while now_ns - began_ns < _PATIENCE_NS:
            if idle is not None:
                idle()
            for _ in range(_POLLS):
                if numbers[0] >= number or query():
                    return
            now_ns = time.perf_counter_ns()
            if now_ns - asked_ns > _ASK_NS:
                # A lost device raises no number; whatever it is asked, it answers with its error.
                asked_ns = now_ns
                self._clock.ask()
        raise DeviceLostError(f"the GPU has not answered for {_PATIENCE_NS // 10**9} s")

    def wait_until(self, there: Callable[[], bool], idle: Callable[[], object] | None, limit_ns: int) -> bool:
        try:
            return self._wait_until(there, idle, limit_ns)
        except RuntimeError as error:
            self._explain(error)

    def _wait_until(self, there: Callable[[], bool], idle: Callable[[], object] | None, limit_ns: int) -> bool:
        began_ns = asked_ns = now_ns = time.perf_counter_ns()
        while now_ns - began_ns < limit_ns:
            if idle is not None:
                idle()
            for _ in range(_POLLS):
                if there():
                    return True
            now_ns = time.perf_counter_ns()
            if now_ns - asked_ns > _ASK_NS:
                asked_ns = now_ns
                self._clock.ask()
        return False

    def way(self, memory: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> Way:
        copies = raw_copy_back(), self._raw_copy
        num_threads = max((os.cpu_count() or 2) - 1, 1)
        made: Way = self._guarded(CudaWay, self.torch_device, self._compute, self._guarded, copies, memory, num_threads)
        return made

    def tell(self) -> None:
        """Nothing: the host polls."""

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
            # On a lost device these would raise in their turn.
            torch.cuda.set_stream(self._before)
            torch.cuda.empty_cache()


def _timing_event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def _ignore(value: object) -> None:
    """Drop the result of a call, since a work returns nothing."""


def _nothing() -> None:
    """The work of a program that only lets time pass."""


def _replay_and_record(replay: Callable[[], None], end: Any, stream: Any) -> None:
    """Replay a graph, then record its end outside of it: the end stands behind the gate, and the host makes one more
    call."""
    replay()
    end.record(stream)


def tell_and_run(row: Row, run: Work) -> None:
    """Launch what reads `row`, which is written."""
    row.tell()
    run()


def _never() -> bool:
    """Answer for no event that it has not happened."""
    return False
