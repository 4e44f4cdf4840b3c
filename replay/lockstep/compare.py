"""`python -m replay.lockstep RUN_FOLDER_OR_LOG [key=value ...]`: does a fresh policy decide as the logged one did?

Everything a policy learns of time comes from records. Fed with the records of a log it must make the same calls,
yield the same waits and want the same experts, one by one: all of them, in order. And every layer launches the experts
that it demands, each once: a log in which one is missing is equal to nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from expertflow.boundary import PartError
from expertflow.forward import Forward
from expertflow.launches import Launches
from expertflow.machine import Costs, HostResult, Read, Record, Wait
from expertflow.policy import Policy
from expertflow.runtime import Runtime
from replay.lockstep.log_format import (
    LOG_NAME,
    Attention,
    Copy,
    Decided,
    Estimated,
    Event,
    Experts,
    Head,
    HostEnded,
    LogError,
    LoggedForward,
    OnHost,
    Reading,
    ReadsTold,
    Told,
    Waited,
)
from replay.lockstep.log_reader import LogReader
from replay.lockstep.rebuild import rebuild
from replay.lockstep.telling import tell
from sim.job.run_cli import run_cli
from sim.job.setup import Workload
from traces.processes.progress import shown

HostTold = TypeVar("HostTold", Estimated, HostEnded)
_USAGE = "usage: python -m replay.lockstep RUN_FOLDER_OR_LOG [key=value ...]"
_HELP = f"""{_USAGE}

Feed the log of a replay (log=true) to a fresh policy and compare every decision. Exit code 0: all are
equal; 1: one differs, and is printed; 2: the log cannot be used.

  RUN_FOLDER_OR_LOG  the folder of the run, or its {LOG_NAME}
  key=value          where a file that the run read lies now, as in the run: trace.path=FILE

example: python -m replay +hardware=local +policy=adaptive machine=cpu log=true hydra.run.dir=run
         python -m replay.lockstep run"""


@dataclass(frozen=True)
class LockstepResult:
    """What a check found.

    num_decisions: calls to the machine, waits and lists of wants that were equal. num_forwards: forwards equal from
    begin to end. difference: the first one, None if there is none. partial: where the log ends, if before the workload.
    """

    num_decisions: int
    num_forwards: int
    difference: str | None
    partial: str | None = None

    def line(self) -> str:
        """For a person."""
        if self.difference is not None:
            return f"lockstep: {self.num_decisions} decisions equal, then a difference: {self.difference}"
        equal = f"lockstep: {self.num_decisions} decisions in {self.num_forwards} forwards equal"
        return equal if self.partial is None else f"{equal}; the log is partial: {self.partial}"


class _DifferenceError(Exception):
    """What was logged is not what is decided now."""


class _LogEndsError(Exception):
    """The log has ended before the workload, and everything in it was equal."""


def check_log(reader: LogReader, work: Workload, policy: Policy) -> LockstepResult:
    """Feed the records of `reader` to `policy` over `work`, which must be fresh, and compare all that it decides.

    LogError for a damaged log, ValueError for a workload that is not the log's, PartError for a part of the policy that
    breaks a rule or raises.
    """
    header = reader.header
    if work.trace_sha256 != header.trace_sha256:
        raise ValueError(
            f"{reader.path}: the log is of a trace with SHA-256 {header.trace_sha256[:64]!r}, the trace "
            f"{work.trace.name} has {work.trace_sha256!r}; give the log's own with trace.path=FILE"
        )
    for name in ("num_layers", "num_experts"):
        if getattr(work.model, name) != getattr(header.run, name):
            raise ValueError(
                f"{reader.path}: the log has {name}={getattr(header.run, name)}, the model "
                f"{work.model.name} {getattr(work.model, name)}; give the model of the run"
            )
    forwards = iter(work.batches)
    machine = _LoggedMachine(iter(reader), header.run.num_experts)
    loop = Runtime(header.run, machine, policy, forwards).run()
    difference = partial = None
    try:
        try:
            wait = next(loop)
            while True:
                machine.waited(wait)
                wait = loop.send(machine.record())
        except StopIteration:
            machine.ended()
        except (_DifferenceError, _LogEndsError, LogError, PartError):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {_first_line(error)}"
            logged = machine.peek()
            if logged is None:
                raise _LogEndsError(f"{machine.where()}, where the policy now fails as well: {what}") from error
            raise machine.differs(tell(logged, machine.num_experts), what) from error
    except _DifferenceError as found:
        difference = str(found)
    except _LogEndsError as end:
        partial = str(end)
    return LockstepResult(machine.num_decisions, machine.num_forwards, difference, partial)


class _LoggedMachine:
    """Implements `expertflow.machine.HostMachine` by comparing each call with the log; its marks, tasks and records,
    and what it says of its host, are logged."""

    def __init__(self, forwards: Iterator[LoggedForward], num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_decisions = 0
        self.num_forwards = 0
        self._forwards = forwards
        self._ahead: LoggedForward | None = None
        self._events: Sequence[Event] = ()
        self._place = 0
        self._forward = -1
        self._layer: int | None = None
        self._launches = Launches()

    # -- the log, event by event -------------------------------------------------------------------------------

    def _next_forward(self) -> LoggedForward | None:
        """The forward after this one, not yet taken."""
        if self._ahead is None:
            self._ahead = next(self._forwards, None)
        return self._ahead

    def peek(self) -> Event | LoggedForward | None:
        """What the log has next: of this forward, or the begin of another; None at its end."""
        if self._place < len(self._events):
            return self._events[self._place]
        return self._next_forward()

    def where(self) -> str:
        """Forward and layer, for a person."""
        if self._forward < 0:
            return "before the first forward"
        return f"forward {self._forward}" + ("" if self._layer is None else f", layer {self._layer}")

    def differs(self, logged: str, now: str) -> _DifferenceError:
        """The error to raise where `logged` was logged and `now` is decided."""
        return _DifferenceError(f"{self.where()}: logged {logged}; now {now}")

    def _compare(self, now: Event) -> Event:
        """Take the next event of the log and compare it with `now`; the mark of a launch is taken from the log."""
        logged = self.peek()
        if logged is None:
            raise _LogEndsError(f"it ends in {self.where()}")
        if isinstance(logged, Attention | Experts | Head) and type(logged) is type(now):
            now = now._replace(mark=logged.mark)
        if type(logged) is not type(now) or logged != now:
            same_kind = type(logged) is type(now)
            other = logged if same_kind and not isinstance(logged, LoggedForward) else None
            raise self.differs(
                tell(logged, self.num_experts, now if same_kind else None), tell(now, self.num_experts, other)
            )
        self._place += 1
        self.num_decisions += 1
        return now

    # -- what the runtime does ---------------------------------------------------------------------------------

    def begin_forward(self, forward: Forward) -> None:
        if self._forward >= 0:
            self._end_forward(f"the begin of forward {forward.index}")
        logged = self._next_forward()
        if logged is None:
            raise _LogEndsError(f"it ends after {self.where()}")
        if logged.index != forward.index:
            raise self.differs(tell(logged, self.num_experts), f"the begin of forward {forward.index}")
        self._ahead, self._events, self._place = None, logged.events, 0
        self._forward, self._layer = forward.index, None
        self._launches.begin_forward(forward)

    def _end_forward(self, now: str) -> None:
        if self._place < len(self._events):
            raise self.differs(tell(self._events[self._place], self.num_experts), now)
        self.num_forwards += 1

    def ended(self) -> None:
        """The runtime is through with the workload."""
        if self._forward >= 0:
            self._end_forward("the end of the run")
        logged = self._next_forward()
        if logged is not None:
            raise self.differs(tell(logged, self.num_experts), "the end of the run")

    def attention(self, layer: int) -> int:
        if layer:
            self._end_layer(layer - 1)
        self._layer = layer
        return _mark(self._compare(Attention(layer, 0)))

    def _end_layer(self, layer: int) -> None:
        """What the log and the policy agree on is to be what was demanded."""
        wrong = self._launches.end_layer(layer)
        if wrong is not None:
            keys = [f"{key // self.num_experts}/{key % self.num_experts}" for key in wrong.keys[:8]]
            raise self.differs("launches", f"a demand from which they differ in experts {', '.join(keys)}")

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        tokens = None if counts is None else tuple(counts[key] for key in keys)
        self._launches.launched(keys)
        return _mark(self._compare(Experts(layer, tuple(keys), tokens, shared, 0)))

    def head(self) -> int:
        if self._layer is not None:
            self._end_layer(self._layer)
        self._layer = None
        return _mark(self._compare(Head(0)))

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        self._compare(Copy(load, chunk, key, slot, num_bytes, after))

    def read(self, key: int, chunk: int, room: int, num_bytes: int) -> None:
        self._compare(Reading(key, chunk, room, num_bytes))

    def reads_ended(self) -> Sequence[Read]:
        """Those that were logged beside the record that was just taken."""
        logged = self.peek()
        if not isinstance(logged, ReadsTold):
            return ()
        self._place += 1
        return logged.reads

    def decided(self, wants: Sequence[int], effort: float) -> None:
        self._compare(Decided(tuple(wants)))

    def _told_of_host(self, kind: type[HostTold], now: str) -> HostTold:
        """What the log says that the machine answered here of its host."""
        logged = self.peek()
        if logged is None:
            raise _LogEndsError(f"it ends in {self.where()}")
        if not isinstance(logged, kind):
            raise self.differs(tell(logged, self.num_experts), now)
        return logged

    def estimate(self, tokens: Sequence[int]) -> Costs:
        logged = self._told_of_host(Estimated, "a place that is asked")
        self._compare(Estimated(tuple(tokens), logged.costs))
        return logged.costs

    def on_host(self, keys: Sequence[int], tokens: Sequence[int]) -> int:
        logged = self.peek()
        task = logged.task if isinstance(logged, OnHost) else 0
        self._compare(OnHost(tuple(keys), tuple(tokens), task))
        self._launches.launched(keys)
        return task

    def host_ended(self) -> Sequence[HostResult]:
        logged = self._told_of_host(HostEnded, "a wait for the host's results")
        self._place += 1
        return logged.results

    def waited(self, wait: Wait) -> None:
        """The runtime has yielded `wait`."""
        self._compare(Waited(*wait))

    def record(self) -> Record:
        """The record that was logged for the wait just compared."""
        logged = self.peek()
        if logged is None:
            raise _LogEndsError(f"it ends in {self.where()}")
        if not isinstance(logged, Told):
            raise self.differs(f"{tell(logged, self.num_experts)} without a record", "a wait for one")
        self._place += 1
        return logged


def _mark(event: Event) -> int:
    assert isinstance(event, Attention | Experts | Head)
    return event.mark


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check(path: Path, overrides: Sequence[str] = ()) -> LockstepResult:
    """Check the log at `path`, or the one in the folder `path`, against a policy built anew from its header."""
    with LogReader(path / LOG_NAME if path.is_dir() else path) as reader:
        work, policy = rebuild(reader, overrides)
        with shown(f"checking {path}"):
            return check_log(reader, work, policy)


def main(words: Sequence[str] | None = None) -> int:
    """0: all equal. 1: a difference, printed. 2: an error of the user, one line on stderr."""
    words = sys.argv[1:] if words is None else words
    if words and words[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    if not words or words[0].startswith("-"):
        print(_USAGE, file=sys.stderr)
        return 2

    def run() -> int:
        result = check(Path(words[0]), words[1:])
        print(result.line())
        return 0 if result.difference is None else 1

    return run_cli(run, "the log was not checked to its end")
