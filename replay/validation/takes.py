"""One replay of a case with how fast its host was meanwhile, and which of several replays count.

A shared host may change its speed from one second to the next: that of an H200 in a virtual machine ran the same Python
loop in 2.3 or in 4.2 ms (results/validation-h200). Replays at different speeds measure different machines. So a fixed
loop is timed around each, and a short one in every forward of it while the host waits anyway; of a case only those
replays count during which the host kept one speed, the same in all of them. The rule looks at the loops alone, never at
what was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from replay.calibration.probe import HostRun
from replay.validation.fidelity import Ran

SAME_SPEED = 1.2
"""Loop times that differ by at most this factor count as one speed of the host; those of that H200 differ by 1.7."""
TAKES_A_REPLAY = 3
"""At most so many replays are made for each one that is to count, where the host keeps changing its speed."""


@dataclass(frozen=True)
class Take:
    """One replay. loops_ns: the fixed loop before, between and after what was measured. host: what the short replay
    beside it said of the host; None where nobody asked."""

    ran: Ran
    loops_ns: tuple[int, ...]
    host: HostRun | None = None

    @property
    def speed_ns(self) -> float:
        """How fast the host was during the replay: the median tick in it, or loop around it where there is none."""
        return statistics.median(self.ran.ticks_ns or self.loops_ns)

    @property
    def drift(self) -> float:
        """The slowest loop against the fastest, or the upper quartile of the ticks against the lower; 1 = equal."""
        ticks = sorted(self.ran.ticks_ns) or [1]
        inside = ticks[len(ticks) * 3 // 4] / ticks[len(ticks) // 4]
        return max(max(self.loops_ns) / min(self.loops_ns), inside)


def counted(takes: Sequence[Take]) -> list[Take]:
    """Those of `takes` that count, in their order: at least two at one speed of the host, the fastest that has two.

    Where no two are: the one during which the speed changed least, the fastest of several during which it did not.
    """
    kept = sorted((take for take in takes if take.drift <= SAME_SPEED), key=lambda take: take.speed_ns)
    for place, fastest in enumerate(kept[:-1]):
        alike = [take for take in kept[place:] if _is_alike(take, fastest)]
        if len(alike) > 1:
            return [take for take in takes if take in alike]
    return kept[:1] or sorted(takes, key=lambda take: take.drift)[:1]


def _is_alike(take: Take, other: Take) -> bool:
    """Whether both ticks and loops say that the host had one speed: costs are measured beside the loops alone."""
    pairs = ((take.speed_ns, other.speed_ns), (statistics.median(take.loops_ns), statistics.median(other.loops_ns)))
    return all(max(pair) <= SAME_SPEED * min(pair) for pair in pairs)
