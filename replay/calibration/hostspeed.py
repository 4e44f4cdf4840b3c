"""How fast Python runs on this host, now: a fixed loop, timed again and again, so that a drift of the host shows.

A shared host has been seen to run the same code 2.5 times slower for minutes; what was calibrated before says nothing
of what is measured then.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

_ROUNDS = 20_000
_TICK_ROUNDS = 100
_TRIES = 5


def python_loop_ns() -> int:
    """ns that the fixed loop takes: the median of a few tries, some 10 ms in all."""
    times = []
    for _ in range(_TRIES):
        began = time.perf_counter_ns()
        _loop(_ROUNDS)
        times.append(time.perf_counter_ns() - began)
    return round(statistics.median(times))


def tick_ns() -> int:
    """ns that a 200th of the fixed loop takes. It is short enough to fit into a moment in which a host waits anyway."""
    began = time.perf_counter_ns()
    _loop(_TICK_ROUNDS)
    return time.perf_counter_ns() - began


def _loop(rounds: int) -> int:
    """The fixed loop. It does what a policy's bookkeeping consists of: integers, a list, a dictionary."""
    seen: dict[int, int] = {}
    ring = [0] * 64
    for number in range(rounds):
        key = number * 7 % 64
        ring[key] = number
        seen[key] = seen.get(key, 0) + ring[key - 1]
    return len(seen)


def drift(times_ns: Sequence[int]) -> dict[str, Any]:
    """Summary of loops timed before, between and after: the slowest against the fastest is `drift`."""
    if not times_ns:
        return {"first_ns": None, "last_ns": None, "median_ns": None, "drift": None, "times_ns": []}
    return {
        "first_ns": times_ns[0],
        "last_ns": times_ns[-1],
        "median_ns": round(statistics.median(times_ns)),
        "drift": max(times_ns) / min(times_ns) - 1,
        "times_ns": list(times_ns),
    }
