"""Bandwidth by size: of copies over a link, of requests to a disk."""

from __future__ import annotations

import math
from bisect import bisect_right

from sim.specs.hardware import Curve


def bandwidth_at(curve: Curve, num_bytes: int) -> float:
    """GB/s at a copy size: linear in log(bytes) between the points of `curve`, constant beyond its ends."""
    right = bisect_right(curve, num_bytes, key=lambda point: point[0])
    if right == 0 or right == len(curve):
        return curve[max(0, right - 1)][1]
    (low_bytes, low), (high_bytes, high) = curve[right - 1], curve[right]
    share = math.log(num_bytes / low_bytes) / math.log(high_bytes / low_bytes)
    return low + (high - low) * share
