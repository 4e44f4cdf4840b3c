"""What a real machine needs of the thing that computes and copies: two streams, events on one clock.

`replay.cuda` and `replay.cpu` implement it; `replay.machine` is written against it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Event = Any
"""A point in one of the device's streams, opaque to everyone else."""

Span = tuple[Event, Event]
"""Start and end of what was enqueued."""


class DeviceLostError(RuntimeError):
    """The device stopped answering midway: what was measured so far is kept, the run is not finished."""


class Device(Protocol):
    """One compute and one copy stream, each first in, first out, and the host that feeds them."""

    world: str
    """`cuda` or `cpu`, as in metrics.json."""
    torch_device: torch.device
    dtype: torch.dtype
    """What the kernels compute in."""

    def describe(self) -> Mapping[str, Any]:
        """Name, memory in bytes and versions of what was measured, for provenance."""

    def launch(self, work: Callable[[], None], pad_ns: int) -> Span:
        """Enqueue the kernels that `work` launches on the compute stream, after `pad_ns` of nothing."""

    def read_back(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        """Enqueue a small device-to-host copy on the compute stream; the event at its end."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Span:
        """Enqueue a host-to-device copy on the copy stream, on the device no earlier than `after`."""

    def happened(self, event: Event) -> bool:
        """Whether the stream has passed `event`. Raises DeviceLostError if it never will."""

    def wait(self, events: Sequence[Event]) -> None:
        """Block the host until one of `events` has happened."""

    def time_ns(self, event: Event) -> int:
        """When `event` happened, on the machine's clock."""

    def now_ns(self) -> int:
        """The host's present on the same clock; never before an event whose time was asked for."""

    def recycle(self, event: Event) -> None:
        """Nobody will ask for `event` again."""

    def begin_forward(self) -> None:
        """Nothing runs on the compute stream: a good moment to renew the clock's base."""

    def restart_clock(self) -> None:
        """Both streams are empty: from here on times count from now."""

    def free_bytes(self) -> int | None:
        """Memory of the device that can be taken now; None if it is the host's."""

    def synchronize(self) -> None:
        """Block until both streams are empty."""

    def close(self) -> None:
        """Give everything back."""
