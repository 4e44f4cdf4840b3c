"""Belady's MIN: the expert whose next demand is farthest leaves. Needs the future: a reference, not a policy.

Least loads for a cache that must admit what is demanded (forced admission). With staging buffers a demanded
expert may pass through without displacing a better one: MIN with bypass. Fewest loads is not least stall.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from expertflow.evictions.ranked import RankedEviction
from expertflow.future import Future
from expertflow.keys import Rule
from expertflow.parts import PREFETCH
from expertflow.view import View


class Belady(RankedEviction):
    """Rank is minus the next use. A prefetch never displaces what is needed no later than itself (Cao et al.
    1995, "do no harm"), unless `do_no_harm` is off."""

    uses_future = True

    def __init__(
        self,
        scope: Annotated[
            str, Rule(choices=("global", "layer"), about="one cache for all layers, or one for each")
        ] = "global",
        do_no_harm: Annotated[bool, Rule(about="refuse a prefetch that displaces what is needed sooner")] = True,
    ) -> None:
        super().__init__(scope)
        self.do_no_harm = do_no_harm

    def start(self, view: View, future: Future | None) -> None:
        assert future is not None
        super().start(view, future)
        self.future = future
        self.next_use = future.first_uses()

    def touched(self, keys: Sequence[int]) -> None:
        for key, event in zip(keys, self.future.next_uses(self.view.event), strict=True):
            self.next_use[key] = event
        super().touched(keys)

    def victim(self, key: int, cause: int) -> int | None:
        found = super().victim(key, cause)
        if found is not None and cause == PREFETCH and self.do_no_harm and self.next_use[found] <= self.next_use[key]:
            return None
        return found

    def _rank(self, key: int) -> int:
        return -self.next_use[key]
