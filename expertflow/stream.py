"""The books of the compute stream: its every nanosecond is compute, stall or overhead, each booked once.

A kernel running is compute. A gap before a kernel that waited for a copy, or for the host's results, is stall from the
moment the routing is known up to the device end of that copy or of these results, and overhead for the rest; any other
gap is overhead. Of a stall, the part before the last bytes of its expert had come from storage is storage stall.
"""

from __future__ import annotations

from collections.abc import Sequence

from expertflow.counters import Counters
from expertflow.machine import Mark
from expertflow.observer import LATE, MISS, STORAGE_STALL, Watch


class StreamBooks:
    """cursor_ns: up to where the stream is booked. last_mark: the last launch that was seen to have ended."""

    def __init__(self, counters: Counters, watch: Watch | None) -> None:
        self.counters = counters
        self.watch = watch
        self.cursor_ns = 0
        self.last_mark = 0
        self._known_ns = 0
        self._layer_stall_ns = self._layer_storage_ns = 0
        self._blame: dict[int, tuple[int, int, int, int]] = {}

    def begin_layer(self, known_ns: int) -> int:
        """The routing of a layer is known from `known_ns` on; returns the stall in ns booked since the layer before."""
        self._known_ns = known_ns
        stall_ns, self._layer_stall_ns = self._layer_stall_ns, 0
        return stall_ns

    def storage_stall_ns(self) -> int:
        """What of the stall that `begin_layer` has just returned was storage's."""
        storage_ns, self._layer_storage_ns = self._layer_storage_ns, 0
        return storage_ns

    def blame(self, mark: int, landed_ns: int, key: int, kind: int, read_ns: int = 0) -> None:
        """The launch `mark` waited for `key`, which was there at `landed_ns`; kind: as of `Observer.stalled`. read_ns:
        when its last bytes had come from storage; 0 = they were in host memory all along."""
        self._blame[mark] = (landed_ns, key, kind, read_ns)

    def book(self, marks: Sequence[Mark]) -> None:
        """Launches have ended, in stream order; there is at least one."""
        counters, blame, cursor = self.counters, self._blame, self.cursor_ns
        compute = overhead = 0
        for mark, start_ns, end_ns in marks:
            gap = start_ns - cursor
            if blame and mark in blame:
                landed_ns, key, kind, read_ns = blame.pop(mark)
                # Up to the moment the routing is known the stream waits for the router, not for an expert.
                stall = landed_ns - (cursor if cursor > self._known_ns else self._known_ns)
                if stall < 0:
                    stall = 0
                elif stall > gap:
                    stall = gap
                self._layer_stall_ns += stall
                gap -= stall
                if read_ns > landed_ns - stall:
                    stall -= self._book_storage(landed_ns - stall, read_ns, key)
                if kind == MISS:
                    counters.miss_stall_ns += stall
                elif kind == LATE:
                    counters.late_stall_ns += stall
                else:
                    counters.host_stall_ns += stall
                if stall and self.watch is not None:
                    self.watch.stalled(landed_ns - stall, landed_ns, key, kind)
            overhead += gap
            compute += end_ns - start_ns
            cursor = end_ns
        counters.compute_ns += compute
        counters.overhead_ns += overhead
        if self.watch is not None:
            self.watch.computed(marks)
        self.cursor_ns = cursor
        self.last_mark = mark

    def _book_storage(self, since_ns: int, read_ns: int, key: int) -> int:
        """The ns of a stall that begins at `since_ns` which are storage's: until `read_ns`."""
        self.counters.storage_stall_ns += read_ns - since_ns
        self._layer_storage_ns += read_ns - since_ns
        if self.watch is not None:
            self.watch.stalled(since_ns, read_ns, key, STORAGE_STALL)
        return read_ns - since_ns

    def close(self, now_ns: int) -> None:
        """A forward is over: what is left up to now is overhead."""
        self.counters.overhead_ns += now_ns - self.cursor_ns
        self.cursor_ns = now_ns
