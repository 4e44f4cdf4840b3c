"""The signs by which an adaptive step learns that it is too short or too long, counted (arXiv 2510.26730)."""

from __future__ import annotations

from expertflow.view import View


class StepFeedback:
    """`stall_threshold` stalls ask for a longer step, `overfetch_threshold` needless prefetches for a shorter one.

    A sign that reaches its threshold starts anew, whether the step follows or not; within `cooldown_forwards` of a
    change it asks for nothing.
    """

    def __init__(self, view: View, stall_threshold: int, overfetch_threshold: int, cooldown_forwards: int) -> None:
        self.view = view
        self.stall_threshold, self.overfetch_threshold = stall_threshold, overfetch_threshold
        self.cooldown_forwards = cooldown_forwards
        self.changed_at = -1 - cooldown_forwards
        """Forward of the last change."""
        self.num_stalls = self.num_overfetched = 0.0

    def clear(self) -> None:
        """The step is another: both counters begin anew."""
        self.num_stalls = self.num_overfetched = 0.0

    def halve(self) -> None:
        """A forward begins: what was counted before counts half."""
        self.num_stalls /= 2
        self.num_overfetched /= 2

    def stalled(self) -> int:
        """A layer has stalled; by how much the step is to change: 0 or 1."""
        self.num_stalls += 1
        if self.num_stalls < self.stall_threshold:
            return 0
        self.num_stalls = 0.0
        return 1 if self._may_change() else 0

    def overfetched(self) -> int:
        """A prefetch was needless; by how much the step is to change: 0 or -1."""
        self.num_overfetched += 1
        if self.num_overfetched < self.overfetch_threshold:
            return 0
        self.num_overfetched = 0.0
        return -1 if self._may_change() else 0

    def changed(self) -> None:
        """The step has followed."""
        self.changed_at = self.view.forward

    def _may_change(self) -> bool:
        return self.view.forward - self.changed_at > self.cooldown_forwards
