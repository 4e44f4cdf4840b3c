"""Those who watch a run: timeline and event table. A run without observers pays nothing for them."""

from __future__ import annotations

from collections.abc import Sequence

from expertflow.forward import Forward


class Observer:
    """Override what is of interest. All times in ns on the machine's clock."""

    def computed(self, kind: str, layer: int, keys: Sequence[int], start_ns: int, end_ns: int) -> None:
        """A group of kernels ran: `kind` is attention, experts or head."""

    def stalled(self, start_ns: int, end_ns: int, key: int, is_miss: bool) -> None:
        """The compute stream waited for the copy of `key`; late if not `is_miss`."""

    def copied(self, key: int, chunk: int, cause: int, start_ns: int, end_ns: int) -> None:
        """One chunk was copied for `cause` (DEMAND or PREFETCH)."""

    def demanded(self, forward: Forward, layer: int, now_ns: int, hits: Sequence[int], late: Sequence[int],
                 missing: Sequence[int]) -> None:  # fmt: skip
        """The routing of a layer became known and was classified."""

    def horizon(self, now_ns: int, distances: Sequence[int]) -> None:
        """The distances that the policy looks ahead, when they change."""

    def end_forward(self, forward: Forward, now_ns: int) -> None:
        """The tokens of `forward` were read back."""
