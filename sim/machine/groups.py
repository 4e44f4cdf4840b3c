"""How long routed experts take that are launched at once, and the least that any split into launches takes.

Knows nothing of streams, copies or shared experts.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property, lru_cache

from sim.specs.kernel_table import GroupPoints

_SLACK_NS = 1e-6
"""More than what sums of floats lose here; a bound is rounded up after it is taken off."""


class GroupTimes:
    """Time of one launch by its number of experts and its mean tokens per expert.

    Linear in both between the points of a full grid. Below the first number of tokens its time holds; beyond the
    last the line of the last two goes on, but never falls. Beyond the last number of experts the line of the last two
    goes on. No group takes less than fewer experts with as many tokens each: a point below one of fewer experts
    counts as that one, a slope beyond the last tokens likewise.
    """

    def __init__(self, points: GroupPoints) -> None:
        self.experts = sorted({num_experts for num_experts, _, _ in points})
        self.tokens = sorted({tokens for _, tokens, _ in points})
        self._rows: list[list[float]] = []
        self._slopes: list[float] = []
        width = len(self.tokens)
        below, slope = [0.0] * width, 0.0
        for start in range(0, len(points), width):
            measured = [ns for _, _, ns in points[start : start + width]]
            below = [max(pair) for pair in zip(below, measured, strict=True)]
            if width > 1:
                slope = max(slope, (below[-1] - below[-2]) / (self.tokens[-1] - self.tokens[-2]))
            self._rows.append(below)
            self._slopes.append(slope)
        # Bounded, so that memory does not grow with the trace.
        self._whole_ns = lru_cache(maxsize=8192)(self._round_ns)

    @property
    def shortest_ns(self) -> int:
        """No launch of a routed expert takes less, over any number of tokens."""
        return round(min(self._rows[0]))

    def ns(self, num_experts: int, num_tokens: int) -> int:
        """Whole ns of `num_experts` experts over `num_tokens` tokens in all; 0 for none."""
        return self._whole_ns(num_experts, num_tokens) if num_experts else 0

    def _round_ns(self, num_experts: int, num_tokens: int) -> int:
        if num_tokens < num_experts:
            raise AssertionError(f"{num_experts} experts over {num_tokens} tokens")
        return round(self.at(num_experts, num_tokens / num_experts))

    def at(self, num_experts: int, tokens: float) -> float:
        """ns of `num_experts` >= 1 experts of `tokens` each, not rounded."""
        experts = self.experts
        right = min(bisect_right(experts, num_experts), len(experts) - 1)
        low, high = self._along(right - 1, tokens), self._along(right, tokens)
        return low + (high - low) * ((num_experts - experts[right - 1]) / (experts[right] - experts[right - 1]))

    def _along(self, row: int, tokens: float) -> float:
        """One row of the grid at any number of tokens."""
        known, times = self.tokens, self._rows[row]
        right = bisect_right(known, tokens)
        if right == 0:
            return times[0]
        if right == len(known):
            return times[-1] + self._slopes[row] * (tokens - known[-1])
        share = (tokens - known[right - 1]) / (known[right] - known[right - 1])
        return times[right - 1] + (times[right] - times[right - 1]) * share


class CheapestGroups:
    """A lower bound on what the routed experts of one layer take, however a schedule groups them into launches.

    launch_ns: what each launch takes on the stream beside its kernels. num_experts: the most that a layer has.
    """

    def __init__(self, times: GroupTimes, num_experts: int, launch_ns: int) -> None:
        self._times, self._num_experts, self._launch_ns = times, num_experts, launch_ns
        self._even = lru_cache(maxsize=64)(self._even_list)

    def ns(self, tokens: Sequence[int]) -> int:
        """tokens: of each expert. Where all have as many it is the cheapest partition itself, else at most that.

        A partition into groups costs the sum of what the machine charges for each by its size and mean. With as many
        tokens each that depends on the sizes alone, and all sizes are tried. Else let each token have any price p >= 0:
        a group of k experts over s tokens is charged at least p * s + min over m of (time(k, m) - p * k * m) - 1/2 (the
        half for rounding), the prices add up to p times all tokens whatever the groups, and the rest depends on sizes
        alone again. Every price gives a bound; the largest counts.
        """
        count, total = len(tokens), sum(tokens)
        if not count:
            return 0
        if min(tokens) == max(tokens):
            return int(self._even(tokens[0])[count])
        return max(math.ceil(price * total + least[count] - _SLACK_NS) for price, least in self._priced)

    def _even_list(self, each: int) -> list[float]:
        """Cheapest partition of 0, 1, 2 … experts of `each` tokens; exact, since whole numbers are added."""
        sizes = range(1, self._num_experts + 1)
        return _partitions([self._times.ns(size, size * each) + self._launch_ns for size in sizes])

    @cached_property
    def _priced(self) -> list[tuple[float, list[float]]]:
        """(price of a token, cheapest partition of 0, 1, 2 … experts of what the price leaves)."""
        times, sizes = self._times, range(1, self._num_experts + 1)
        # Time is linear in the tokens between those of the grid: what a price leaves is least at one of them.
        grid = [[times.at(size, tokens) for tokens in times.tokens] for size in sizes]
        last = times.tokens[-1]
        # A price above the slope of the last line would leave less and less: minus infinity.
        most = min((times.at(size, last + 1) - times.at(size, last)) / size for size in sizes)
        steps = [
            min((row[place + 1] - row[place]) / (after - before) / size for size, row in zip(sizes, grid, strict=True))
            for place, (before, after) in enumerate(zip(times.tokens, times.tokens[1:], strict=False))
        ]
        found = []
        for price in sorted({min(max(step, 0.0), max(most, 0.0)) for step in steps} | {0.0}):
            left = [
                min(ns - price * size * tokens for ns, tokens in zip(row, times.tokens, strict=True))
                for size, row in zip(sizes, grid, strict=True)
            ]
            found.append((price, _partitions([ns - 0.5 + self._launch_ns for ns in left])))
        return found


def _partitions(costs: Sequence[float]) -> list[float]:
    """Least sum of `costs[size - 1]` over all ways to write 0, 1, 2 … as a sum of sizes."""
    least = [0.0]
    for count in range(1, len(costs) + 1):
        least.append(min(costs[size - 1] + least[count - size] for size in range(1, count + 1)))
    return least
