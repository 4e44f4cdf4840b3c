"""Host time of a replay's layers on a driver that does nothing: what `python -m replay.bench_host` measures."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch

from expertflow.policy import Policy
from expertflow.runtime import Runtime
from replay.drive import drive
from replay.gc_pause import gc_paused
from replay.host_figures import figures_for
from replay.machine.cuda import CudaDevice, tell_and_run
from replay.machine.cuda_clock import CudaClock
from replay.machine.device import Program, Words, Work
from replay.machine.host_worker import PATIENCE_NS, Computed, HostTask, HostWorker
from replay.machine.hosted import HostedMachine
from replay.machine.launch_row import Row, words_of
from replay.machine.rig import Rig
from replay.run import needs_of, scaled_workload
from replay.stopwatch import Stopwatch, measure_overhead
from sim.job.configure import configure
from sim.job.setup import Transfer, Workload, load_chunks, make_policy, make_workload, run_config

SCALE = 64
"""What the model's widths are divided by. No byte of the model is computed or copied here."""


class _Event:
    """An event of a device on which all has happened. at_ns: when it was recorded."""

    __slots__ = ("at_ns",)

    def __init__(self) -> None:
        self.at_ns = 0

    def record(self, stream: object) -> None:
        self.at_ns = time.perf_counter_ns()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return (other.at_ns - self.at_ns) / 1e6


class _Stream:
    """A stream that accepts what is enqueued and runs nothing."""

    def wait_event(self, event: object) -> None:
        """Nothing is left to wait for."""


class EmptyDriver(CudaDevice):
    """`CudaDevice` on a driver that does nothing. calls: how often it was called, by name, where they are counted."""

    world = "cpu"
    ends_inside = True

    def __init__(self, counting: bool = False) -> None:
        self._lost = False
        self._pool: list[Any] = []
        self.torch_device = torch.device("cpu")
        self._compute: Any = _Stream()
        self._link: Any = self._compute
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._number = words_of(self._flag)
        self.numbers: Sequence[int] = self._number
        self._raw_copy = _nothing
        self.seen_ns: list[int] = []
        self.calls: Counter[str] = Counter()
        if counting:
            self._count()
        self._use_clock(CudaClock(None, self._pool, self._event, time.perf_counter_ns))
        self._clock.count_from_now(_nothing)

    def _event(self) -> Any:
        return self._pool.pop() if self._pool else _Event()

    def _count(self) -> None:
        counted = type(
            "_Counted",
            (_Event,),
            {name: self._counted(name, getattr(_Event, name)) for name in ("record", "query", "elapsed_time")},
        )
        self._event = lambda: self._pool.pop() if self._pool else counted()  # type: ignore[method-assign]
        self._raw_copy = self._counted("copy", _nothing)

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        calls = self.calls

        def counting(*given: Any) -> Any:
            calls[name] += 1
            return call(*given)

        return counting

    def program(
        self,
        work: Work,
        pad_ns: int = 0,
        words: Words | None = None,
        captured: bool = True,
        row: Row | None = None,
    ) -> Program:
        start, end, number, gated = self._event(), self._event(), self._number, words is not None
        clock, calls = time.perf_counter_ns, self.calls

        def run() -> None:
            calls["launch"] += 1
            start.at_ns = end.at_ns = clock()
            if gated:
                number[0] += 1

        if row is None:
            return Program(start, end, run)
        return Program(start, end, partial(tell_and_run, row, run), row, run)

    def restart_clock(self) -> None:
        """Nothing has run."""

    def synchronize(self) -> None:
        """Nothing runs."""

    def free_bytes(self) -> int | None:
        return None

    def wait(self, number: int, event: Any = None, idle: Callable[[], object] | None = None) -> None:
        super().wait(number, event, idle)
        self.seen_ns.append(time.perf_counter_ns())


class _IdleWorker:
    """A host's worker that has computed at once what it is given: what is left is what the runtime's thread does."""

    failure = None
    patience_ns = PATIENCE_NS

    def __init__(self, clock: Callable[[], int]) -> None:
        self.done: deque[Computed] = deque()
        self.way = self
        self.num_tasks = 0
        self._clock = clock

    def put(self, task: HostTask) -> None:
        self.num_tasks += 1
        now_ns, last = self._clock(), len(task.keys) - 1
        for place, key in enumerate(task.keys):
            self.done.append(Computed(task.number, key, now_ns, now_ns, place == last, None))

    def follow(self) -> None:
        """Nothing was sent."""

    def close(self) -> None:
        """Nothing runs."""


def _machine_on(rig: Rig, device: EmptyDriver, full: Workload, work: Workload, made: tuple[Policy, Transfer]) -> Any:
    """The machine of one run, and its worker if the policy has a place."""
    figures = figures_for(full, *made, device)
    chunk_bytes = load_chunks(work)
    if figures is None:
        return rig.machine(chunk_bytes, work.stack), None
    worker, results = _IdleWorker(device.now_ns), torch.zeros_like(rig.kernels.activations)
    parts = device, rig.kernels, rig.host(True), rig.slots, chunk_bytes, work.stack, None
    return HostedMachine(*parts, figures=figures, worker=cast(HostWorker, worker), results=results), worker


class _Launches:
    """A machine, of which it is noted when each launch of experts has returned."""

    def __init__(self, machine: Any) -> None:
        # Its own methods, bound: no call takes longer for what stands between.
        for name in dir(machine):
            if not name.startswith("_") and name != "experts" and callable(getattr(machine, name)):
                setattr(self, name, getattr(machine, name))
        self._launch = machine.experts
        self.launched_ns: list[int] = []

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        mark: int = self._launch(layer, keys, counts, shared)
        self.launched_ns.append(time.perf_counter_ns())
        return mark


def _nothing(*given: Any) -> None:
    """Stand in for a call of the driver, and do nothing."""


class HostTimes:
    """Python time of the layer-steps of one run in ns, and how often the driver was called.

    launched_ns: by layer-step, from the moment at which the gate's number was seen to the first launch of experts.
    total_ns: the whole run. policy_ns: the part of it that was spent in the policy's own code. num_tasks: of the host,
    whose worker has done at once what it is given.
    """

    def __init__(self, words: Sequence[str], counting: bool = False, timed_policy: bool = False) -> None:
        cfg = configure(["+hardware=a100", "stack=found", "compare=none", *words])
        full = make_workload(cfg)
        work = scaled_workload(full, SCALE)
        policy, transfer = make_policy(cfg["policy"], full, 0)
        watch = Stopwatch(overhead=measure_overhead())
        if timed_policy:
            watch.attach(policy)
        device = EmptyDriver(counting)
        rig = Rig(device, work.model, needs_of(work, policy, transfer))
        chunk_bytes = load_chunks(work)
        machine, worker = _machine_on(rig, device, full, work, (policy, transfer))
        timed: Any = _Launches(machine)
        runtime = Runtime(run_config(work, transfer, chunk_bytes), timed, policy, list(work.batches))
        watch.event_of = lambda: runtime.view.event
        machine.prepare(work.batches)
        machine.preload(runtime.slots.slot_of)
        device.seen_ns.clear()
        device.calls.clear()
        with gc_paused():
            started = time.perf_counter_ns()
            drive(runtime, timed)
            self.total_ns = time.perf_counter_ns() - started
        machine.close()
        self.num_tasks = 0 if worker is None else worker.num_tasks
        self.num_layers = work.model.num_layers * runtime.counters.num_forwards
        self.num_chunks = runtime.counters.num_misses * len(chunk_bytes)
        self.calls = device.calls
        self.policy_ns = sum(step.total_ns for step in watch.steps)
        self.launched_ns = _first_after(device.seen_ns, timed.launched_ns)


def _first_after(seen: Sequence[int], launched: Sequence[int]) -> list[int]:
    """The time in ns from the last entry of `seen` before each launch to that launch."""
    found, place = [], 0
    for at in launched:
        while place + 1 < len(seen) and seen[place + 1] <= at:
            place += 1
        found.append(at - seen[place])
    return found
