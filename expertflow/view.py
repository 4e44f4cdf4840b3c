"""What the parts of a policy may see of a run: read-only facts derived from records, and the feedback of a layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, NoReturn

ABSENT = 0
LOADING = 1
RESIDENT = 2


class Progress:
    """How far a run is. Written by the runtime and the copy queue; the parts see it through their `View`."""

    __slots__ = (
        "event",
        "forward",
        "late_ns",
        "layer",
        "layer_time_ns",
        "link_busy_ns",
        "link_bytes",
        "now_ns",
        "num_layers_timed",
        "num_used",
        "pinned",
    )

    def __init__(self) -> None:
        self.pinned: Collection[int] = ()
        self.forward = -1
        self.layer = 0
        self.event = -1
        self.now_ns = 0
        self.link_bytes = 0
        self.link_busy_ns = 0
        self.layer_time_ns = 0
        self.num_layers_timed = 0
        self.late_ns = 0
        self.num_used = 0


class View:
    """A run as its policy may know it. Nobody writes to it: AttributeError for who tries.

    num_layers, num_experts, top_k: of the model. expert_bytes: of one routed expert. num_slots, slots_by_layer: room
    for experts in all, and by layer where the cache is split (else empty).
    residency: memoryview [num_layers * num_experts], read-only: ABSENT, LOADING or RESIDENT by expert key.
    The rest are properties, and change while the run goes on; running sums are over the whole run, and a part takes
    differences (`expertflow.pace`).
    """

    __slots__ = (
        "_progress",
        "expert_bytes",
        "num_experts",
        "num_layers",
        "num_slots",
        "residency",
        "slots_by_layer",
        "top_k",
    )

    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: int
    num_slots: int
    slots_by_layer: Sequence[int]
    residency: memoryview
    _progress: Progress

    def __init__(
        self,
        progress: Progress,
        residency: memoryview,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        expert_bytes: int,
        num_slots: int,
        slots_by_layer: Sequence[int] = (),
    ) -> None:
        facts = {
            "_progress": progress,
            "residency": residency.toreadonly(),
            "num_layers": num_layers,
            "num_experts": num_experts,
            "top_k": top_k,
            "expert_bytes": expert_bytes,
            "num_slots": num_slots,
            "slots_by_layer": tuple(slots_by_layer),
        }
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"view.{name} cannot be set: a part reads its view and keeps what it finds out to itself")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"view.{name} cannot be deleted")

    @property
    def pinned(self) -> Collection[int]:
        """Keys that the current layer demands and that must not leave."""
        return self._progress.pinned

    @property
    def forward(self) -> int:
        """Number of the forward; -1 before the first."""
        return self._progress.forward

    @property
    def layer(self) -> int:
        """The layer whose routing was read last."""
        return self._progress.layer

    @property
    def event(self) -> int:
        """Number of the last (forward, layer) whose routing was read: forward * num_layers + layer; -1 before."""
        return self._progress.event

    @property
    def now_ns(self) -> int:
        """When the host last learned anything."""
        return self._progress.now_ns

    @property
    def link_bytes(self) -> int:
        """Bytes that the link has copied."""
        return self._progress.link_bytes

    @property
    def link_busy_ns(self) -> int:
        """Time that these copies took, one after the other."""
        return self._progress.link_busy_ns

    @property
    def layer_time_ns(self) -> int:
        """Time of `num_layers_timed` layers, without stall, head and sampling."""
        return self._progress.layer_time_ns

    @property
    def num_layers_timed(self) -> int:
        """How many layers `layer_time_ns` is of."""
        return self._progress.num_layers_timed

    @property
    def late_ns(self) -> int:
        """How much later than its device end the host knew of what it waited for: each routing, each forward's tokens,
        and the last expert of each group that was launched behind its copy."""
        return self._progress.late_ns

    @property
    def num_used(self) -> int:
        """Prefetched experts that were demanded before they were evicted, in time or not."""
        return self._progress.num_used


class Feedback(NamedTuple):
    """What is known of a layer that stalled, once the next routing is read: how long, for how many experts that were in
    flight (late) or not even that (misses), beside how many that the host computed, and how much of it was waiting for
    storage."""

    layer: int
    stall_ns: int
    num_late: int
    num_misses: int
    num_host: int = 0
    storage_ns: int = 0
