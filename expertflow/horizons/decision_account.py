"""Whether decisions pay for their host time: what they cost and save, from records alone; how far they may look."""

from __future__ import annotations

from operator import sub
from typing import ClassVar

from expertflow.pace import running_mean
from expertflow.view import Feedback, View


class DecisionAccount:
    """The account of an adaptive step: `cap` is how far it may look ahead, 0 = nothing is decided.

    cost of a forward: how late the host was at what it waited for (`view.late_ns`), less the mean of forwards in which
    nothing was decided: the first is one, and another follows every `retry_forwards`. It holds both ways in which a
    decision delays the device: the next routing is read late, and an expert that has landed is launched late.
    gain: what the prefetched experts that were demanded (`view.num_used`) and the misses would have waited for their
    copies, less the stall there was but for storage; prefetches that held up a miss are in it, as a loss. `share` of
    its running mean may be spent (`SHARE_OF_ONE` for a step of one: less is only nothing at all), and besides `FREE` of
    the whole time. Two forwards in a row that spend more: the step is halved, from one to none, and a longer one is not
    tried again for `retry_forwards`. Else it may double. Within a forward decisions end once they have cost all that
    this forward has gained and `SLACK` of the whole time of one, so that a trial is cheap on the slowest host.
    """

    SHARE_OF_ONE: ClassVar[float] = 0.7
    FREE: ClassVar[float] = 0.005
    SLACK: ClassVar[float] = 0.05
    TRIAL: ClassVar[int] = 2

    def __init__(self, view: View, limit: int, share: float, retry_forwards: int, memory: float) -> None:
        self.view, self.limit, self.share = view, limit, share
        self.retry_forwards, self.memory = retry_forwards, memory
        self.cap = min(1, limit)
        self.usual_ns = self.gain_ns = self.whole_ns = self.copy_ns = 0.0
        """Running means: lateness without decisions, gain, and time of a forward; what a copy takes now."""
        self.num_dear = 0
        """How many forwards in a row have spent too much."""
        self.size = 0
        """How far this forward looks ahead; 0: it decides nothing."""
        self.bare_at = self.retry_at = 0
        self._stalled_ns = self._num_missed = 0
        self._seen = (0, 0, 0)
        self._until_ns = self._each_ns = 0

    def heard(self, feedback: Feedback) -> None:
        """A layer has stalled."""
        # What storage takes it takes with prefetches as without: they save copies.
        self._stalled_ns += feedback.stall_ns - feedback.storage_ns
        self._num_missed += feedback.num_misses

    def spent(self) -> bool:
        """Whether this forward is to decide no more."""
        view = self.view
        return not self.size or view.late_ns > self._until_ns + self._each_ns * view.num_used

    def judge(self, index: int, copy_ns: float) -> bool:
        """The forward before `index` is over, a copy takes copy_ns: bring `cap` up to date. True if it was raised."""
        view = self.view
        now = (view.late_ns, view.num_used, view.now_ns)
        late_ns, num_used, whole_ns = map(sub, now, self._seen)
        gain_ns = copy_ns * (num_used + self._num_missed) - self._stalled_ns
        self._seen, self._stalled_ns, self._num_missed, self.copy_ns = now, 0, 0, copy_ns
        self.whole_ns = running_mean(self.whole_ns, whole_ns, self.memory)
        if not self.size:
            self.usual_ns = running_mean(self.usual_ns, late_ns, self.memory)
            return self.cap == 0 and self._raise(index)
        self.gain_ns = running_mean(self.gain_ns, gain_ns, self.memory)
        share = max(self.SHARE_OF_ONE, self.share) if self.size == 1 else self.share
        if late_ns - self.usual_ns <= self.FREE * self.whole_ns + share * self.gain_ns:
            self.num_dear = 0
            return self.size >= self.cap and self._raise(index)
        self.num_dear += 1
        if self.num_dear >= self.TRIAL:
            self.num_dear, self.cap, self.retry_at = 0, self.size // 2, index + self.retry_forwards
            if self.cap == 0:
                # What is saved then, another trial finds out.
                self.gain_ns = 0.0
        return False

    def _raise(self, index: int) -> bool:
        if self.cap == self.limit or index < self.retry_at:
            return False
        self.cap = min(max(2 * self.cap, 1), self.limit)
        return True

    def begin(self, index: int, size: int) -> None:
        """Forward `index` begins, and is to look `size` layers ahead."""
        view = self.view
        if index >= self.bare_at:
            self.bare_at, size = index + self.retry_forwards, 0
        self.size = size
        self._each_ns = int(self.copy_ns)
        allowed_ns = int(self.usual_ns + self.SLACK * self.whole_ns)
        self._until_ns = view.late_ns + allowed_ns - self._each_ns * view.num_used
