"""What the lockstep tests share: logged runs on a simulated machine that blocks, and logs written event by event."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from expertflow.forward import Forward
from expertflow.machine import HOST, LOAD, Costs, HostResult, Record, Wait
from expertflow.runtime import RunConfig, Runtime
from replay.drive import drive
from replay.lockstep.compare import LockstepResult, check_log
from replay.lockstep.host_log import HostLoggingMachine, logging_machine
from replay.lockstep.log import LoggingMachine, LogWriter
from replay.lockstep.log_format import (
    FORMAT,
    VALUES_PER_GROUP,
    Attention,
    Copy,
    Decided,
    Estimated,
    Event,
    Experts,
    Head,
    HostEnded,
    LoggedForward,
    LogHeader,
    OnHost,
    Told,
    Waited,
)
from replay.lockstep.log_reader import LogReader
from sim.job.configure import configure
from sim.job.setup import Workload, load_chunks, make_policy, make_workload, run_config
from sim.machine.host_compute import CpuTimes, HostComputeMachine
from sim.machine.kernels import KernelTimes
from sim.machine.link import Link
from sim.machine.simulated import HostCosts, SimMachine


class LostError(RuntimeError):
    """The machine has gone away in the middle of a run."""


class BlockingSim(SimMachine):
    """A simulated machine that is waited for; `noise` makes its times as uneven as a real one's.

    lost_at: the wait, counted from 0, in which it goes away.
    """

    noise: random.Random | None = None
    lost_at = -1
    num_waits = 0

    def _enqueue(self, duration_ns: int, gap_ns: int) -> int:
        extra = self.noise.randrange(20_000) if self.noise else 0
        return super()._enqueue(duration_ns + extra, gap_ns)

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        if self.noise:
            self._link_free_ns += self.noise.randrange(20_000)
        super().copy(load, chunk, key, slot, num_bytes, after)

    def wait(self, wait: Wait) -> Record:
        if self.num_waits == self.lost_at:
            raise LostError("the device is gone")
        self.num_waits += 1
        return self.record(self.wake_ns(wait) + (self.noise.randrange(20_000) if self.noise else 0))


class BlockingHost(BlockingSim, HostComputeMachine):
    """The same of a machine whose host computes experts."""


@dataclass
class Job:
    """A configuration, what it makes, and how a fresh policy of it is made."""

    overrides: list[str]
    config: dict[str, Any]
    work: Workload

    @classmethod
    def of(cls, *overrides: str) -> Job:
        """Of the words of a command line."""
        config = configure(list(overrides))
        return cls(list(overrides), config, make_workload(config))

    def runtime(
        self, writer: LogWriter | None = None, *, noisy: bool = False, lost_at: int = -1
    ) -> tuple[Runtime, BlockingSim | LoggingMachine]:
        """A runtime with a fresh policy and its machine, which logs to `writer`."""
        work = self.work
        policy, transfer = make_policy(self.config["policy"], work, self.config["seed"])
        chunks = load_chunks(work)
        link = Link(work.hardware, memory=transfer.memory)
        kernels = KernelTimes(work.model, work.hardware, work.stack)
        parts = kernels, link, HostCosts.of(work.hardware, work.stack), chunks
        machine = BlockingHost(*parts, CpuTimes(work.model, work.hardware)) if policy.places else BlockingSim(*parts)
        machine.noise = random.Random(5) if noisy else None
        machine.lost_at = lost_at
        shown = machine if writer is None else logging_machine(machine, writer)
        return Runtime(run_config(work, transfer, chunks), shown, policy, work.batches), shown

    def log(
        self,
        path: Path,
        *,
        noisy: bool = False,
        lost_at: int = -1,
        more: Mapping[str, Any] | None = None,
        values_per_group: int = VALUES_PER_GROUP,
    ) -> Path:
        """Run and log to `path`; with `lost_at` the machine goes away midway and the log is kept. more: config keys."""
        config = {**self.config, **(more or {})}
        run = self.runtime()[0].config
        header = LogHeader("sim", config, self.overrides, run, self.work.trace_sha256)
        with LogWriter(path, header, values_per_group) as writer:
            runtime, machine = self.runtime(writer, noisy=noisy, lost_at=lost_at)
            assert isinstance(machine, LoggingMachine)
            try:
                drive(runtime, machine)
            except LostError:
                if lost_at < 0:
                    raise
            finally:
                machine.flush()
        return path

    def check(self, path: Path) -> LockstepResult:
        """Lockstep with a fresh policy over the same workload."""
        policy, _ = make_policy(self.config["policy"], self.work, self.config["seed"])
        with LogReader(path) as reader:
            return check_log(reader, self.work, policy)


# -- logs without a run --------------------------------------------------------------------------------------


SMALL_RUN = RunConfig(num_layers=3, num_experts=8, top_k=2, num_slots=6, chunk_bytes=(40, 20), num_staging=1)


def small_header(**given: Any) -> LogHeader:
    """A header of `SMALL_RUN` with an empty configuration."""
    return LogHeader(
        **{"world": "sim", "config": {}, "overrides": [], "run": SMALL_RUN, "trace_sha256": "0" * 64, **given}
    )


class _Silent:
    """Answers every launch with the mark it is told, and of its host what it is told."""

    mark = 0
    costs: Costs
    task = 0
    results: Sequence[HostResult] = ()

    def estimate(self, tokens: Sequence[int]) -> Costs:
        return self.costs

    def on_host(self, keys: Sequence[int], tokens: Sequence[int]) -> int:
        return self.task

    def host_ended(self) -> Sequence[HostResult]:
        return self.results

    def begin_forward(self, forward: Forward) -> None:
        pass

    def attention(self, layer: int) -> int:
        return self.mark

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        return self.mark

    def head(self) -> int:
        return self.mark

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        pass

    def decided(self, wants: Sequence[int], effort: float) -> None:
        pass

    def wait(self, wait: Wait) -> Record:
        raise NotImplementedError


def write_events(
    path: Path, header: LogHeader, forwards: Iterable[LoggedForward], values_per_group: int = VALUES_PER_GROUP
) -> Path:
    """A log in which exactly these events crossed, by the calls that a run would make."""
    machine = _Silent()
    with LogWriter(path, header, values_per_group) as writer:
        logging = HostLoggingMachine(machine, writer)
        for forward in forwards:
            logging.begin_forward(cast(Forward, SimpleNamespace(index=forward.index)))
            for event in forward.events:
                if isinstance(event, Attention | Experts | Head):
                    machine.mark = event.mark
                if isinstance(event, Attention):
                    logging.attention(event.layer)
                elif isinstance(event, Experts):
                    counts = None if event.counts is None else dict(zip(event.keys, event.counts, strict=True))
                    logging.experts(event.layer, event.keys, counts, event.shared)
                elif isinstance(event, Head):
                    logging.head()
                elif isinstance(event, Copy):
                    logging.copy(*event)
                elif isinstance(event, Decided):
                    logging.decided(event.wants, 1.0)
                elif isinstance(event, Estimated):
                    machine.costs = event.costs
                    logging.estimate(event.tokens)
                elif isinstance(event, OnHost):
                    machine.task = event.task
                    logging.on_host(event.keys, event.tokens)
                elif isinstance(event, HostEnded):
                    machine.results = event.results
                    logging.host_ended()
                elif isinstance(event, Waited):
                    logging.waited((event.kind, event.ident, event.drain))
                else:
                    logging.answered((event.now_ns, event.chunks, event.marks))
        logging.flush()
    return path


def read_events(path: Path) -> list[LoggedForward]:
    """The whole log."""
    with LogReader(path) as reader:
        return list(reader)


def rewritten(path: Path, target: Path, change: Callable[[list[LoggedForward]], None]) -> Path:
    """The log with events changed in place by `change`, sealed anew: as a forger with the writer would do."""
    with LogReader(path) as reader:
        header, forwards = reader.header, list(reader)
    change(forwards)
    return write_events(target, header, forwards)


def edited(
    path: Path, target: Path, change: Callable[[dict[str, list[Any]]], None], *, header: bytes | None = None
) -> Path:
    """The file with columns (lists by name) changed in place by `change`, its checksums left as they are."""
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    schema = table.schema if header is None else table.schema.with_metadata({FORMAT: header})
    pq.write_table(pa.table(columns, schema=schema), target)
    return target


def some_forwards() -> list[LoggedForward]:
    """Two forwards that hold every kind of event."""
    events: list[Event] = [
        Attention(0, 1),
        Waited(0, 1, True),
        Told(500, ((1, 0, 100, 200),), ((1, 0, 490),)),
        Copy(2, 1, 7, 3, 20, 1),
        Experts(0, (5, 7), (2, 1), True, 2),
        Experts(0, (6,), None, False, 3),
        Decided((9, 8)),
        Waited(LOAD, 2, False),
        Told(900, (), ((2, 500, 600), (3, 600, 700))),
        Head(4),
        Waited(1, 4, False),
        Told(1000, (), ((4, 900, 990),)),
    ]
    later: list[Event] = [
        Attention(0, 5),
        Waited(0, 5, False),
        Told(1500, (), ((5, 1000, 1400),)),
        Estimated((2, 1), Costs(70, 5, [3, 2], [40, 30], 9, 1.25)),
        OnHost((4, 6), (2, 1), 3),
        Decided(()),
        Waited(HOST, 3, True),
        Told(1600, (), ()),
        HostEnded(((3, 4, 1505, 1550), (3, 6, 1550, 1590))),
    ]
    return [LoggedForward(0, events), LoggedForward(1, later)]
