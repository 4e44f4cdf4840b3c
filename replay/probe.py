"""Where the host's time goes in a real run: wraps a machine and takes the time around every call.

What a simulation charges the host with is measured in place, with the same policy, not guessed from parts. Means
leave out the slowest thousandth, which on a shared host is its neighbours' doing.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

from expertflow.forward import Forward
from expertflow.machine import GATE, LOAD, TOKEN, Record, Wait
from replay.machine import RealMachine

_CALL, _WAKE = 0, 1


def steady_mean(values: Sequence[float]) -> float:
    """Mean of all but the slowest thousandth; 0 of none."""
    kept = sorted(values)[: max(1, len(values) - len(values) // 1000)]
    return sum(kept) / len(kept) if values else 0.0


class HostProbe:
    """A machine like the one inside it. `samples`: host times in ns by what they were spent on.

    attention, head, experts: one launch. issue, issue_gap: one copy, and what passes from it to the next call or wait.
    classify: from the routing known to the next call. observe: from any other wake to the next call or wait. decide:
    from the launch before the decision to its end. forward: from the forward's begin to its first launch. gate_sync,
    token_sync: from the device's end of the kernel to the host's knowing. first_kernel: from the call of a launch on an
    idle stream to the kernel's start. run attention, run head, run experts[n], run experts_shared[n]: how long the
    kernels of such a launch ran. lone_copy: from the issue of a copy on an idle link to its end. load_sync: from the
    end of a chunk that was waited for to the host's knowing.
    """

    def __init__(self, machine: RealMachine) -> None:
        self._machine = machine
        self.device = machine.device
        self.samples: dict[str, list[float]] = defaultdict(list)
        self._last = (_CALL, "", 0)
        self._launched_at: dict[int, int] = {}
        self._kinds: dict[int, str] = {}
        self._issued_at: deque[int] = deque()
        self._stream_end_ns = self._link_end_ns = 0

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

    def _leave(self, name: str, entered: int, sample: str | None = None) -> None:
        now = time.perf_counter_ns()
        if sample is not None:
            self.samples[sample].append(now - entered)
        self._last = (_CALL, name, now)

    def begin_forward(self, forward: Forward) -> None:
        """As the machine's."""
        entered = self._enter("begin_forward")
        self._machine.begin_forward(forward)
        self._leave("begin_forward", entered)

    def _launched(self, name: str, kind: str, launch: Callable[[], int]) -> int:
        entered, at = self._enter(name), self.device.now_ns()
        mark = launch()
        self._launched_at[mark] = at
        self._kinds[mark] = f"run {kind}"
        self._leave(name, entered, name)
        return mark

    def attention(self, layer: int) -> int:
        """As the machine's."""
        return self._launched("attention", "attention", lambda: self._machine.attention(layer))

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        """As the machine's."""
        kind = f"experts{'_shared' if shared else ''}[{len(keys)}]"
        return self._launched("experts", kind, lambda: self._machine.experts(layer, keys, counts, shared))

    def head(self) -> int:
        """As the machine's."""
        return self._launched("head", "head", self._machine.head)

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        """As the machine's."""
        entered = self._enter("copy")
        self._machine.copy(load, chunk, key, slot, num_bytes, after)
        self._leave("copy", entered, "issue")
        # One that waits for a kernel says nothing of the link.
        self._issued_at.append(1 << 62 if after else self.device.now_ns())

    def decided(self, wants: Sequence[int], effort: float) -> None:
        """As the machine's."""
        self._enter("decided")
        self._machine.decided(wants, effort)
        self._leave("decided", 0)

    def wait(self, wait: Wait) -> Record:
        """As the machine's."""
        self._enter("wait")
        record = self._machine.wait(wait)
        marks = record[2]
        for _, _, _, end_ns in record[1]:
            issued = self._issued_at.popleft()
            if issued < 1 << 62 and issued >= self._link_end_ns:
                self.samples["lone_copy"].append(end_ns - issued)
            self._link_end_ns = end_ns
        if record[1] and not marks:
            self.samples["load_sync"].append(self.device.now_ns() - record[1][-1][3])
        for mark, start_ns, end_ns in marks:
            at = self._launched_at.pop(mark, None)
            self.samples[self._kinds.pop(mark)].append(end_ns - start_ns)
            if at is not None and at >= self._stream_end_ns:
                pad = self._machine.layer_pad_ns
                self.samples["first_kernel"].append(start_ns - at - (pad if start_ns - at > pad else 0))
            self._stream_end_ns = end_ns
        known = bool(marks) and marks[-1][0] == wait[1] and wait[0] != LOAD
        if known:
            # The host learns of it through the machine's clock; when it came back is what counts.
            name = {GATE: "gate_sync", TOKEN: "token_sync"}[wait[0]]
            self.samples[name].append(self.device.now_ns() - marks[-1][2])
        self._last = (_WAKE, "gate" if known and wait[0] == GATE else "load", time.perf_counter_ns())
        return record
