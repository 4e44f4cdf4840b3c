"""Belady's MIN: the expert whose next demand is farthest leaves. Needs the future: a reference, not a policy.

Least loads for a cache that must admit what is demanded (forced admission). With staging buffers a demanded
expert may pass through without displacing a better one: MIN with bypass. Fewest loads is not least stall, and where
experts have unlike sizes it does not give the fewest loads or bytes either: a reference, and no bound.
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
        self._num_seen = 0

    def _look_ahead(self) -> None:
        """Learn when what was demanded up to now is demanded next: of a layer on the host nothing is touched."""
        for event in range(self._num_seen, self.view.event + 1):
            for key, after in zip(self.future.demand(event), self.future.next_uses(event), strict=True):
                self.next_use[key] = after
        self._num_seen = self.view.event + 1

    def touched(self, keys: Sequence[int]) -> None:
        self._look_ahead()
        super().touched(keys)

    def victim(self, key: int, cause: int) -> int | None:
        self._look_ahead()
        found = super().victim(key, cause)
        if found is not None and cause == PREFETCH and self.do_no_harm and self.next_use[found] <= self.next_use[key]:
            return None
        return found

    def _rank(self, key: int) -> int:
        return -self.next_use[key]
