"""Those who watch a run: timeline and event table. A run without observers pays nothing for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expertflow.copy_queue import Load
from expertflow.forward import Forward
from expertflow.hints import mypyc_attr
from expertflow.machine import Chunk, Mark, Read

# What a stall waited for.
LATE = 0  # an expert on its way when the routing became known
MISS = 1  # one that nobody had asked for
HOST_STALL = 2  # the host's results
STORAGE_STALL = 3  # an expert whose last bytes had not come from storage yet


@mypyc_attr(allow_interpreted_subclasses=True)
class Observer:
    """Override what is of interest. All times in ns on the machine's clock."""

    def computed(self, kind: str, layer: int, keys: Sequence[int], start_ns: int, end_ns: int) -> None:
        """A group of kernels ran: `kind` is attention, experts or head."""

    def stalled(self, start_ns: int, end_ns: int, key: int, kind: int) -> None:
        """The compute stream waited for `key`: for its copy (LATE, MISS), for its last bytes to come from storage
        (STORAGE_STALL), or for the host's results, of which that of `key` was the last (HOST_STALL)."""

    def copied(self, key: int, chunk: int, cause: int, start_ns: int, end_ns: int) -> None:
        """One chunk was copied for `cause` (DEMAND or PREFETCH)."""

    def demanded(
        self,
        forward: Forward,
        layer: int,
        now_ns: int,
        hits: Sequence[int],
        late: Sequence[int],
        missing: Sequence[int],
    ) -> None:
        """The routing of a layer became known and was classified. What the forward demands beside these is computed on
        the host."""

    def computed_on_host(self, key: int, start_ns: int, end_ns: int) -> None:
        """The host has computed an expert (`expertflow.machine.HostResult`)."""

    def was_read(self, key: int, chunk: int, start_ns: int, end_ns: int) -> None:
        """One chunk was read from storage into host memory."""

    def horizon(self, now_ns: int, distances: Sequence[int]) -> None:
        """The distances that the policy looks ahead, when they change."""

    def end_forward(self, forward: Forward, now_ns: int) -> None:
        """The tokens of `forward` were read back."""


def sees_events(observer: Observer) -> bool:
    """Whether `observer` looks at anything within a forward: only then must the runtime tell."""
    hooks = ("computed", "computed_on_host", "stalled", "copied", "was_read", "demanded", "horizon")
    return any(getattr(type(observer), hook) is not getattr(Observer, hook) for hook in hooks)


class Watch:
    """Tells every observer; knows which kernels a mark stands for."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = list(observers)
        self._kinds: dict[int, tuple[str, int, tuple[int, ...]]] = {}
        self._distances: tuple[int, ...] | None = None

    def launched(self, mark: int, kind: str, layer: int, keys: tuple[int, ...]) -> None:
        """What `mark` will have been when it ends."""
        self._kinds[mark] = (kind, layer, keys)

    def computed(self, marks: Iterable[Mark]) -> None:
        """Marks have ended."""
        for mark, start_ns, end_ns in marks:
            kind, layer, keys = self._kinds.pop(mark)
            for observer in self.observers:
                observer.computed(kind, layer, keys, start_ns, end_ns)

    def copied(self, chunks: Iterable[Chunk], flight: Iterable[Load]) -> None:
        """Chunks have ended; `flight` begins with their loads."""
        for (_, chunk, start_ns, end_ns), load in zip(chunks, flight, strict=False):
            for observer in self.observers:
                observer.copied(load.key, chunk, load.cause, start_ns, end_ns)

    def computed_on_host(self, key: int, start_ns: int, end_ns: int) -> None:
        """The host has computed `key`."""
        for observer in self.observers:
            observer.computed_on_host(key, start_ns, end_ns)

    def was_read(self, reads: Iterable[Read]) -> None:
        """Reads have ended."""
        for key, chunk, start_ns, end_ns in reads:
            for observer in self.observers:
                observer.was_read(key, chunk, start_ns, end_ns)

    def stalled(self, start_ns: int, end_ns: int, key: int, kind: int) -> None:
        """The compute stream waited for `key`."""
        for observer in self.observers:
            observer.stalled(start_ns, end_ns, key, kind)

    def demanded(
        self,
        forward: Forward,
        layer: int,
        now_ns: int,
        hits: Sequence[int],
        late: Sequence[int],
        missing: Sequence[int],
    ) -> None:
        """A layer was classified."""
        for observer in self.observers:
            observer.demanded(forward, layer, now_ns, hits, late, missing)

    def horizon(self, now_ns: int, distances: Sequence[int]) -> None:
        """Passed on when it has changed."""
        if tuple(distances) != self._distances:
            self._distances = tuple(distances)
            for observer in self.observers:
                observer.horizon(now_ns, self._distances)
