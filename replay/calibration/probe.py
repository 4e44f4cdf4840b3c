"""Where the host's time goes in a real run: wraps a machine and takes the time around every call.

What a simulation charges the host with is measured in place, with the same policy, not guessed from parts. What
the timing itself costs is measured right after and subtracted. Means leave out the slowest thousandth, which on a
shared host is its neighbours' doing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from expertflow.forward import Forward
from expertflow.machine import GATE, HOST, LOAD, TOKEN, Costs, HostResult, Record, Wait
from replay.machine.hosted import HostedMachine
from replay.machine.real import RealMachine

HostRun = tuple[float, Mapping[str, Any]]
"""(ms a forward, what `profile.summary` makes of the samples) of a short replay in place."""

_CALL, _WAKE = 0, 1
_ROUNDS = 100


def steady_mean(values: Sequence[float]) -> float:
    """Mean of all but the slowest thousandth; 0 of none."""
    kept = sorted(values)[: max(1, len(values) - len(values) // 1000)]
    return sum(kept) / len(kept) if values else 0.0


class HostProbe:
    """A machine like the one inside it. `samples`: host times in ns by what they were spent on.

    attention, head, experts: one launch. ahead: one of experts that are not known yet; release: telling those to begin.
    release_start: from the end of that to the kernels' start, on an idle stream, as kernel_start. issue, issue_gap: one
    copy, and what passes from it to the next call or wait. classify: from the routing known to the next call. observe:
    from any other wake to the next call or wait. decide: from the launch before the decision to its end. forward: from
    the forward's begin to its first launch. gate_sync, token_sync: from the device's end of the kernel, or from when
    the host began to wait if that is later, to the host's knowing. load_sync: the same of a chunk that was waited for.
    kernel_start: from the end of a launch on an idle stream to the kernel's start, without the stack's pad; negative
    where it starts before the call returns. run attention, run head, run experts[n], run experts_shared[n]: how long
    the kernels of such a launch ran. lone_copy: from the issue of a copy of the largest size on an idle link to its
    end; chunk: the time of one that follows another at once.
    """

    def __init__(self, machine: RealMachine) -> None:
        self._machine = machine
        self.device = machine.device
        self.samples: dict[str, list[float]] = defaultdict(list)
        self._last = (_CALL, "", 0)
        self._launched: dict[int, tuple[str, str, int, int]] = {}
        """By mark: (kind, sample of its start, when its launch returned on the device's clock, or -1 if the stream was
        not known to be idle, pad before its kernels), ns."""
        self._issued_at: deque[tuple[int, int]] = deque()
        """Of each copy under way: (when it was issued, bytes)."""
        self._largest = 0
        self._link_end_ns = 0
        self._ahead_ns = 0
        """Of this call, spent on a launch ahead."""
        if machine.launches_ahead:
            machine.around_ahead = self._timed_ahead

    def _enter(self, name: str) -> int:
        now = time.perf_counter_ns()
        kind, what, at = self._last
        if kind == _WAKE:
            self.samples["classify" if what == "gate" else "observe"].append(now - at)
        elif what == "copy":
            self.samples["issue_gap"].append(now - at)
        elif name == "decided" and what in ("experts", "attention", "head"):
            self.samples["decide"].append(now - at)
        elif what == "begin_forward":
            self.samples["forward"].append(now - at)
        else:
            self.samples[f"from {what} to {name}"].append(now - at)
        return now

    def _leave(self, name: str, entered: int, sample: str | None = None, without_ns: int = 0) -> None:
        now = time.perf_counter_ns()
        if sample is not None:
            self.samples[sample].append(now - entered - without_ns)
        self._last = (_CALL, name, now)

    def begin_forward(self, forward: Forward) -> None:
        """As the machine's."""
        entered = self._enter("begin_forward")
        self._machine.begin_forward(forward)
        self._leave("begin_forward", entered)

    def _timed_ahead(self, shared: bool) -> None:
        """The machine's launch ahead, which is a part of another call of it."""
        began = time.perf_counter_ns()
        self._machine.launch_ahead(shared)
        taken = time.perf_counter_ns() - began
        self.samples["ahead"].append(taken)
        self._ahead_ns += taken

    def _launch(self, name: str, kind: str, pad_ns: int, launch: Callable[[], int]) -> int:
        told = name == "experts" and self._machine.is_waiting
        entered, idle = self._enter(name), not self._launched
        mark = launch()
        # What is launched ahead delays what the host does next, not this launch.
        ahead_ns, self._ahead_ns = self._ahead_ns, 0
        self._leave(name, entered, "release" if told else name, ahead_ns)
        at = self.device.now_ns() - ahead_ns if idle else -1
        self._launched[mark] = f"run {kind}", "release_start" if told else "kernel_start", at, pad_ns
        return mark

    def attention(self, layer: int) -> int:
        """As the machine's."""
        machine = self._machine
        return self._launch("attention", "attention", machine.layer_pad_ns, lambda: machine.attention(layer))

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        """As the machine's."""
        kind = f"experts{'_shared' if shared else ''}[{len(keys)}]"
        return self._launch("experts", kind, 0, lambda: self._machine.experts(layer, keys, counts, shared))

    def head(self) -> int:
        """As the machine's."""
        return self._launch("head", "head", self._machine.head_pad_ns, self._machine.head)

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        """As the machine's."""
        entered = self._enter("copy")
        self._machine.copy(load, chunk, key, slot, num_bytes, after)
        self._leave("copy", entered, "issue")
        # One that waits for a kernel says nothing of the link.
        self._issued_at.append((1 << 62 if after else self.device.now_ns(), num_bytes))
        self._largest = max(self._largest, num_bytes)

    def decided(self, wants: Sequence[int], effort: float) -> None:
        """As the machine's."""
        self._enter("decided")
        self._machine.decided(wants, effort)
        self._leave("decided", 0)

    def wait(self, wait: Wait) -> Record:
        """As the machine's."""
        self._enter("wait")
        waiting_ns = self.device.now_ns()
        record = self._machine.wait(wait)
        known_ns = self.device.now_ns()
        marks = record[2]
        for _, _, start_ns, end_ns in record[1]:
            issued, num_bytes = self._issued_at.popleft()
            if num_bytes == self._largest:
                if start_ns == self._link_end_ns:
                    self.samples["chunk"].append(end_ns - start_ns)
                elif issued < 1 << 62 and issued >= self._link_end_ns:
                    self.samples["lone_copy"].append(end_ns - issued)
            self._link_end_ns = end_ns
        if record[1] and not marks:
            self.samples["load_sync"].append(known_ns - max(record[1][-1][3], waiting_ns))
        for mark, start_ns, end_ns in marks:
            kind, start, at, pad_ns = self._launched.pop(mark)
            self.samples[kind].append(end_ns - start_ns)
            if at >= 0:
                self.samples[start].append(start_ns - at - pad_ns)
        known = bool(marks) and marks[-1][0] == wait[1] and wait[0] not in (LOAD, HOST)
        if known:
            # The host learns of it through the machine's clock; when it came back is what counts.
            name = {GATE: "gate_sync", TOKEN: "token_sync"}[wait[0]]
            self.samples[name].append(known_ns - max(marks[-1][2], waiting_ns))
        self._last = (_WAKE, "gate" if known and wait[0] == GATE else "load", time.perf_counter_ns())
        return record


class HostedProbe(HostProbe):
    """A probe of a machine whose host computes experts. on_host: giving a task to the worker. load_sync: of the results
    of a task that was waited for, as of a chunk. What a place is told of costs is a part of `classify`."""

    def __init__(self, machine: HostedMachine) -> None:
        super().__init__(machine)
        self._hosted = machine
        self._waiting = (-1, 0)
        """The host task that was waited for last, and since when."""

    def estimate(self, tokens: Sequence[int]) -> Costs:
        """As the machine's."""
        return self._hosted.estimate(tokens)

    def on_host(self, keys: Sequence[int], tokens: Sequence[int]) -> int:
        """As the machine's."""
        entered = self._enter("on_host")
        task = self._hosted.on_host(keys, tokens)
        self._leave("on_host", entered, "on_host")
        return task

    def wait(self, wait: Wait) -> Record:
        """As the machine's."""
        self._waiting = (wait[1] if wait[0] == HOST else -1, self.device.now_ns())
        return super().wait(wait)

    def host_ended(self) -> Sequence[HostResult]:
        """As the machine's."""
        known_ns = self.device.now_ns()
        ended = self._hosted.host_ended()
        task, waiting_ns = self._waiting
        if ended and ended[-1][0] == task:
            self.samples["load_sync"].append(known_ns - max(ended[-1][3], waiting_ns))
        return ended


class _Clock:
    """A device whose clock is the host's."""

    now_ns = staticmethod(time.perf_counter_ns)


class _NoMachine:
    """A machine that does nothing and returns at once. What a probe measures on it is the cost of the probe itself."""

    layer_pad_ns = head_pad_ns = 0
    launches_ahead = is_waiting = False
    device = _Clock()

    def __init__(self) -> None:
        self._num_marks = 0

    def begin_forward(self, forward: object) -> None: ...

    def attention(self, layer: int) -> int:
        self._num_marks += 1
        return self._num_marks

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        self._num_marks += 1
        return self._num_marks

    def head(self) -> int:
        self._num_marks += 1
        return self._num_marks

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        """Nothing to copy."""

    def decided(self, wants: Sequence[int], effort: float) -> None: ...

    def wait(self, wait: Wait) -> Record:
        mark, kind = self._num_marks, wait[0]
        # What is waited for has ended just now: what the probe does until it looks at the clock is its own.
        now_ns = time.perf_counter_ns()
        if kind == LOAD:
            return now_ns, [(0, 0, now_ns, now_ns)], []
        return now_ns, [], [(mark, now_ns, now_ns)]


def own_costs() -> dict[str, float]:
    """What the probe adds to each kind of sample, ns: medians of what it finds on a machine that does nothing."""
    probe = HostProbe(cast(RealMachine, _NoMachine()))
    keys = [1, 2, 3, 4]
    for number in range(_ROUNDS):
        probe.begin_forward(cast(Forward, None))
        probe.wait((GATE, probe.attention(0), False))
        probe.experts(0, keys, None, False)
        mark = probe.attention(1)
        probe.decided((), 0.0)
        probe.wait((GATE, mark, False))
        probe.copy(number, 0, 1, 1, 1, 0)
        probe.copy(number, 1, 1, 1, 1, 0)
        probe.wait((LOAD, number, False))
        probe.experts(0, keys, None, False)
        probe.wait((TOKEN, probe.head(), False))
    own = {
        name: statistics.median(values)
        for name, values in probe.samples.items()
        if name not in ("lone_copy", "kernel_start", "release_start") and not name.startswith(("run ", "from "))
    }
    # The call that is wrapped costs time without the probe as well.
    bare_ns = _bare_call_ns()
    own |= {name: max(own[name] - bare_ns, 0.0) for name in ("attention", "experts", "head", "issue")}
    # From the return of the launch to the look at the clock the probe notes down the launch.
    return own | {"release": own["experts"], **dict.fromkeys(("kernel_start", "release_start"), -own["forward"])}


def _bare_call_ns() -> float:
    """What a launch of the machine that does nothing takes without a probe, ns."""
    launch, clock = _NoMachine().head, time.perf_counter_ns
    with_call, without = [], []
    for _ in range(_ROUNDS):
        first = clock()
        launch()
        second = clock()
        with_call.append(second - first)
        without.append(clock() - second)
    return max(statistics.median(with_call) - statistics.median(without), 0.0)


def without_own_costs(samples: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """`samples` less the cost of the probe itself, measured now, while the host still has the speed of the samples."""
    own = own_costs()
    least = dict.fromkeys(("kernel_start", "release_start"), -math.inf)
    return {
        name: [max(value - own[name], least.get(name, 0.0)) for value in values] if name in own else values
        for name, values in samples.items()
    }
