"""ExpertFlow's two-level LRU (arXiv 2510.26730): what the window needs is kept above what has been used up.

High level: just loaded, or predicted for the window of the next S layers. Low level: the rest, which leaves
first. The window moves with S, so a far prefetch cannot push out what the next layers need.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import PREFETCH, Eviction, Prediction
from expertflow.view import RESIDENT, View


class TwoLevelLRU(Eviction):
    """One pool, or one per layer. After its layer has run an expert goes to the low level's young end, unless
    this was its second use within the last `frequent_forwards` forwards. A prefetched expert that is not used
    when its layer ends becomes the first victim; one that was resident anyway keeps its place (taking every
    wrongly predicted resident for a victim throws out what LRU would have kept: see results/LOG.md). The high
    level holds at most `high_share` of the slots.
    """

    def __init__(
        self,
        scope: Annotated[
            str, Rule(choices=("global", "layer"), about="one cache for all layers, or one for each")
        ] = "global",
        high_share: Annotated[
            float, Rule(0, 1, above=True, about="share of the slots that the high level holds at most")
        ] = 0.75,
        frequent_forwards: Annotated[
            int,
            Rule(0, 1_000_000, unit="forwards", about="within which a second use keeps an expert in the high level"),
        ] = 16,
    ) -> None:
        if not 0 < high_share <= 1:
            raise ValueError(f"TwoLevelLRU high_share={high_share} must be in (0, 1]")
        if frequent_forwards < 0:
            raise ValueError(f"TwoLevelLRU frequent_forwards={frequent_forwards} must be 0 or more")
        self.scope = scope
        self.high_share = high_share
        self.frequent_forwards = frequent_forwards

    def start(self, view: View, future: Future | None) -> None:
        self.view = view
        self.residency = view.residency
        by_layer = self.scope == "layer"
        num_pools = view.num_layers if by_layer else 1
        num_keys = view.num_layers * view.num_experts
        self.span = num_keys // num_pools
        capacities = view.slots_by_layer if by_layer else [view.num_slots]
        self.limits = [max(1, int(self.high_share * capacity)) for capacity in capacities]
        self.high: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_pools)]
        self.low: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_pools)]
        self.last_use = [-(1 << 40)] * num_keys
        self.fresh: list[set[int]] = [set() for _ in range(view.num_layers)]
        """Prefetched and not yet used, by layer."""

    def _raise(self, keys: Sequence[int]) -> None:
        """To the young end of the high level; its oldest overflow into the low level."""
        pool = keys[0] // self.span
        high, low = self.high[pool], self.low[pool]
        for key in keys:
            if key in high:
                high.move_to_end(key)
            else:
                low.pop(key, None)
                high[key] = None
        while len(high) > self.limits[pool]:
            low[high.popitem(last=False)[0]] = None

    def touched(self, keys: Sequence[int]) -> None:
        """Nothing yet: the demanded are pinned until their layer has run, then `layer_end` files them."""

    def admitted(self, key: int, cause: int) -> None:
        if cause == PREFETCH:
            self.fresh[key // self.view.num_experts].add(key)
        if key not in self.view.pinned:
            self._raise((key,))

    def predicted(self, keys: Sequence[int], layer: int, prediction: Prediction) -> None:
        if not keys:
            return
        low = self.low[keys[0] // self.span]
        for key in keys:
            if key in low:
                self._raise([key for key in keys if key in low])
                break

    def layer_end(self, layer: int, keys: Sequence[int]) -> None:
        pool = layer * self.view.num_experts // self.span
        high, low, last_use, residency = self.high[pool], self.low[pool], self.last_use, self.residency
        forward = self.view.forward
        since = forward - self.frequent_forwards
        for key in keys:
            into = high if last_use[key] > since else low
            last_use[key] = forward
            if key in into:
                into.move_to_end(key)
            elif residency[key]:
                into[key] = None
                other = low if into is high else high
                if key in other:
                    del other[key]
        while len(high) > self.limits[pool]:
            low[high.popitem(last=False)[0]] = None
        if self.fresh[layer]:
            for key in self.fresh[layer].difference(keys):
                high.pop(key, None)
                low[key] = None
                low.move_to_end(key, last=False)
            self.fresh[layer] = set()

    def victim(self, key: int, cause: int) -> int | None:
        residency, pinned = self.residency, self.view.pinned
        pool = key // self.span
        for level in (self.low[pool], self.high[pool]):
            for candidate in level:
                if residency[candidate] == RESIDENT and candidate not in pinned:
                    return candidate
        # More demand than slots: what this layer loaded and has launched is not filed yet.
        for candidate in range(pool * self.span, (pool + 1) * self.span):
            if residency[candidate] == RESIDENT and candidate not in pinned:
                return candidate
        return None

    def evicted(self, key: int, unused: bool) -> None:
        pool = key // self.span
        self.low[pool].pop(key, None)
        self.high[pool].pop(key, None)
        self.fresh[key // self.view.num_experts].discard(key)
