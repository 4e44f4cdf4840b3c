"""What the parts of a policy may see: read-only facts derived from records, and the feedback of a layer."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ABSENT = 0
LOADING = 1
RESIDENT = 2


class View:
    """State of the run as the policy may know it. Written by the runtime, read by the parts.

    residency: memoryview [num_layers * num_experts], ABSENT, LOADING or RESIDENT by expert key.
    pinned: keys demanded by the current layer.
    outlook: chances [num_layers * num_experts] in 2^-16 of each expert's use in the next forwards, nearer ones
    weighing more, as the predictor saw it at the end of the last forward; None where it says nothing of the kind.
    chances: chances [num_layers * num_experts] in 2^-16 that each expert is used when its layer runs next, as last
    predicted; None where the predictor gives scores alone. Both are written by the predictor.
    link_bytes, link_busy_ns, layer_time_ns, num_layers_timed, late_ns, num_used: running sums over the run; a part
    takes differences. Layer time excludes stall, head and sampling. late_ns: how much later than its device end the
    host knew of what it waited for: each routing, each forward's tokens, and the last expert of each group that was
    launched behind its copy. num_used: prefetched experts that were demanded before they were evicted, in time or not.
    """

    __slots__ = (
        "chances", "event", "expert_bytes", "forward", "late_ns", "layer", "layer_time_ns", "link_busy_ns",
        "link_bytes", "now_ns", "num_experts", "num_layers", "num_layers_timed", "num_slots", "num_used", "outlook",
        "pinned", "residency", "slots_by_layer", "top_k",
    )  # fmt: skip

    def __init__(self, num_layers: int, num_experts: int, top_k: int, expert_bytes: int, num_slots: int,
                 slots_by_layer: list[int], residency: memoryview) -> None:  # fmt: skip
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.top_k = top_k
        self.expert_bytes = expert_bytes
        self.num_slots = num_slots
        self.slots_by_layer = slots_by_layer
        self.residency = residency
        self.pinned: Collection[int] = ()
        self.outlook: npt.NDArray[np.int64] | None = None
        self.chances: npt.NDArray[np.int64] | None = None
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


class Feedback:
    """What is known of a layer that stalled, once the next routing is read: how long, and for what."""

    __slots__ = ("layer", "num_late", "num_misses", "stall_ns")

    def __init__(self) -> None:
        self.layer = 0
        self.stall_ns = 0
        self.num_late = 0
        self.num_misses = 0
