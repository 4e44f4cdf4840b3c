"""Each missing expert where it takes less time by itself, as Fiddler places them (arXiv 2402.07033)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from expertflow.forward import KnownForward
from expertflow.keys import Rule
from expertflow.parts import Place, Placing

KEEP = Rule(about="a queued prefetch stays queued, for later use, when its expert is computed on the host")


class Cheaper(Place):
    """The host computes what its products over the expert's tokens take less time for than a copy and the GPU's
    (Fiddler, section 3: the lesser of the two latencies, expert by expert, whatever else is to be copied or computed).
    Ties go to the GPU.
    """

    def __init__(self, keep_prefetch: Annotated[bool, KEEP] = False) -> None:
        self.keep_prefetch = keep_prefetch

    def on_host(self, placing: Placing, forward: KnownForward) -> Sequence[int]:
        costs = placing.costs
        return [
            key
            for key, gpu_ns, host_ns in zip(placing.missing, costs.gpu_ns, costs.host_ns, strict=True)
            if costs.round_trip_ns + host_ns < costs.copy_ns + gpu_ns
        ]

    def for_later(self, keys: Sequence[int], queued: Sequence[int]) -> Sequence[int]:
        return queued if self.keep_prefetch else ()
