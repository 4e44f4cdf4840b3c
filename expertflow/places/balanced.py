"""The misses of a layer split so that copies and host end together.

HybriMoE (arXiv 2504.05897) and FreeToken (arXiv 2608.16157).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from expertflow.forward import KnownForward
from expertflow.parts import Place, Placing
from expertflow.places.cheaper import KEEP


class Balanced(Place):
    """Copies the experts with the most tokens, which are dearest on the host, and leaves the rest to it; how many is
    what makes the later of the two ends earliest.

    Copies end when the link has done what it was given and they have gone over it, one after the other; the GPU's
    products of the last one follow. The host ends after the round trip and its products. While both are busy each takes
    `stretch` times as long. With experts of one cost each and an idle link it is FreeToken's split, q* = m * B_P / B_H.
    Ties copy more.
    """

    def __init__(self, keep_prefetch: Annotated[bool, KEEP] = False) -> None:
        self.keep_prefetch = keep_prefetch

    def on_host(self, placing: Placing, forward: KnownForward) -> Sequence[int]:
        costs, tokens = placing.costs, placing.tokens
        num = len(placing.missing)
        # The dearest on the host first; of as many tokens in the order of issue.
        order = sorted(range(num), key=lambda place: -tokens[place])
        host_ns, best, num_copied = 0, -1.0, num
        for copied in range(num, -1, -1):
            if copied < num:
                host_ns += costs.host_ns[order[copied]]
            copies_ns = costs.link_wait_ns + copied * costs.copy_ns if copied else 0
            shared_ns = min(copies_ns, host_ns)
            longer = (costs.stretch - 1.0) * shared_ns
            gpu_ends = copies_ns + longer + costs.gpu_ns[order[copied - 1]] if copied else 0.0
            host_ends = host_ns + longer + costs.round_trip_ns if copied < num else 0.0
            ends = max(gpu_ends, host_ends)
            if best < 0 or ends < best:
                best, num_copied = ends, copied
        copied_places = set(order[:num_copied])
        return [key for place, key in enumerate(placing.missing) if place not in copied_places]

    def for_later(self, keys: Sequence[int], queued: Sequence[int]) -> Sequence[int]:
        return queued if self.keep_prefetch else ()
