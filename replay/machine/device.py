"""What a real machine needs of the thing that computes and copies: two streams, programs, events on one clock.

`replay.machine.cuda` and `replay.machine.cpu` implement it; `replay.machine.real` is written against it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from replay.machine.launch_row import Row

Event = Any
"""A point in one of the device's streams, opaque to everyone else."""

Work = Callable[[], None]
"""Launches kernels: called when a program is prepared, or each time that it is launched."""

RawCopy = Callable[[int, int, int, Any], None]
"""(target address, source address, bytes, stream): enqueue a copy between host and device."""

Words = tuple[torch.Tensor, torch.Tensor]
"""int64 words that a program's kernels leave on the device, and where the host reads them."""


class Program:
    """A group of kernels that is prepared once and launched many times, on the compute stream.

    In order: `pad_ns` of nothing, `start`, the kernels, `end`, and where it is gated its words are copied to the host
    and the device's number rises by one. start, end: the events of its last launch, overwritten by the next one: they
    must be read before. mark: that of its last launch while that is unread, else 0. row: what the host writes before a
    launch and the kernels read during it (see `replay.machine.rows`), if they read anything; on a GPU it is copied to
    the device before `start`. run: what `Device.launch` calls. ahead: the same program launched before its row is
    written: its kernels begin once the host has told the row (`Row.tell`), and until then nothing else may be launched.
    None where the device cannot.
    """

    __slots__ = ("ahead", "end", "mark", "row", "run", "start")

    def __init__(self, start: Event, end: Event, run: Work, row: Row | None = None, ahead: Work | None = None) -> None:
        self.start = start
        self.end = end
        self.run = run
        self.mark = 0
        self.row: Any = row
        self.ahead: Program | None = None if ahead is None else Program(start, end, ahead, row)


class Way(Protocol):
    """Between the device and a thread that computes on its host (`replay.machine.ways`)."""

    def begin_thread(self) -> None:
        """Called once by that thread before anything else."""

    def fetch(self, num_bytes: int) -> None:
        """Enqueue the copy of the first bytes of the activations to the host; called by the runtime's thread."""

    def await_fetched(self) -> None:
        """Block the worker's thread until they are there."""

    def send(self, num_bytes: int) -> Event:
        """Enqueue the copy of the first bytes of the results; the event at its end, None where it has ended. Called by
        the worker's thread."""

    def follow(self) -> None:
        """Let what is launched from now on begin no earlier, on the device, than the last `send` has ended."""


class Device(Protocol):
    """One compute and one copy stream, each first in, first out, and the host that feeds them."""

    world: str
    """`cuda` or `cpu`, as in metrics.json."""
    torch_device: torch.device
    dtype: torch.dtype
    """What the kernels compute in."""
    captures: bool
    """Whether programs are captured: then each shape that is to be launched in a run is prepared before it."""
    launches_ahead: bool
    """Whether programs with a row can be launched before it is written (`Program.ahead`)."""
    ends_inside: bool
    """Whether the events of a launch under way have not happened yet: else they seem to have, at the last launch's
    times, until the streams get there."""
    numbers: Sequence[int]
    """[1] how many launches of gated programs the host can see the end of, since the device was opened."""

    def describe(self) -> Mapping[str, Any]:
        """Name, memory in bytes and versions of what was measured, for provenance."""

    def program(
        self,
        work: Work,
        pad_ns: int = 0,
        words: Words | None = None,
        captured: bool = True,
        row: Row | None = None,
    ) -> Program:
        """Prepare `work`, to run after `pad_ns` of nothing. With `words` the program is gated; they may be empty.

        captured: False launches the kernels one by one. row: what `work` reads, which must be written before each
        launch. Both streams must be empty; `work` may run once, with what the row holds.
        """

    def launch(self, program: Program) -> None:
        """Enqueue `program` on the compute stream. The times of its last launch can no longer be asked for."""

    def copy(self, target: int, source: int, num_bytes: int, after: Event | None) -> Event:
        """Enqueue a host-to-device copy between two addresses on the copy stream; the event at its end.

        It starts no earlier, on the device, than `after` as it was last recorded.
        """

    def disturb(self, target: int, source: int, num_bytes: int) -> None:
        """Enqueue a host-to-device copy on the compute stream, where none belongs: to inject a fault."""

    def happened(self, event: Event) -> bool:
        """Whether the stream has passed `event`. Raises DeviceLostError if it never will."""

    def wait(self, number: int, event: Event | None = None, idle: Callable[[], object] | None = None) -> None:
        """Block the host until `numbers[0]` is at least `number`, or `event`, if there is one, has happened.

        number: 0 and less wait for the event alone. idle: called now and then while there is nothing to do.
        """

    def wait_until(self, there: Callable[[], bool], idle: Callable[[], object] | None, limit_ns: int) -> bool:
        """Block the host until `there()`, as `wait` does; False if that takes longer than `limit_ns`. What makes it
        true puts something into the streams' news, or is an event."""

    def way(self, memory: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> Way:
        """Streams of their own for activations and results. memory: activations on the device and on the host, results
        on the host and on the device, [rows, hidden] each."""

    def tell(self) -> None:
        """Called by any thread: what the host waits for may have happened."""

    def time_ns(self, event: Event) -> int:
        """When `event`, which has happened, did so, on the machine's clock."""

    def now_ns(self) -> int:
        """The host's present on the same clock; never before an event whose time was asked for."""

    def recycle(self, event: Event) -> None:
        """Take back `event`, the end of a copy, whose time nobody will ask for again."""

    def begin_forward(self) -> None:
        """Called when nothing runs on the compute stream, which is a good moment to renew the clock's base."""

    def restart_clock(self) -> None:
        """Count times from now on. Both streams must be empty."""

    def free_bytes(self) -> int | None:
        """Memory of the device that can be taken now; None if it is the host's."""

    def synchronize(self) -> None:
        """Block until both streams are empty."""

    def close(self) -> None:
        """Give everything back."""
