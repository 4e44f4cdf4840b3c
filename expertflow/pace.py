"""How fast a run goes, for every part that asks: load of the link and time of a layer, as running means."""

from __future__ import annotations

from operator import sub

from expertflow.view import View


def running_mean(mean: float, value: float, memory: float) -> float:
    """`mean` after one more `value`, of the old kept `memory` (in [0, 1)); 0 = there was no value yet."""
    return value if mean == 0 else memory * mean + (1 - memory) * value


class Pace:
    """What the link and the layers took since the last look, and running means of it (`memory` of the old kept).

    bytes_per_ns: rate of the link while it works; copy_ns: what an expert takes at it, a mean of its own, since the
    mean of an inverse is not the inverse of the mean. layer_ns: time of a layer without stall. busy: share of the time
    in which the link works. 0 = nothing was observed yet.
    """

    def __init__(self, view: View, memory: float) -> None:
        self.view = view
        self.memory = memory
        self.bytes_per_ns = self.copy_ns = self.layer_ns = self.busy = 0.0
        self._seen = (0, 0, 0, 0, 0)

    def look(self) -> None:
        """A forward is over."""
        view, memory = self.view, self.memory
        now = (view.link_bytes, view.link_busy_ns, view.layer_time_ns, view.num_layers_timed, view.now_ns)
        num_bytes, busy_ns, layer_ns, layers, elapsed_ns = map(sub, now, self._seen)
        self._seen = now
        if busy_ns > 0:
            self.bytes_per_ns = running_mean(self.bytes_per_ns, num_bytes / busy_ns, memory)
        if num_bytes > 0:
            self.copy_ns = running_mean(self.copy_ns, busy_ns * view.expert_bytes / num_bytes, memory)
        if layers > 0:
            self.layer_ns = running_mean(self.layer_ns, layer_ns / layers, memory)
        if elapsed_ns > 0:
            self.busy += (1 - memory) * (min(busy_ns / elapsed_ns, 1.0) - self.busy)
