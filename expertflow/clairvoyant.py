"""Schedules that know the future, as references. Reachable, but not a bound: Belady minimises loads, not stall.

Each follows the four rules of Cao, Felten, Karlin and Li (1995): fetch what is missed soonest; evict what is
needed latest; never displace what is needed sooner; act at the first opportunity. They differ in how far they
look ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from expertflow.evictions.belady import Belady
from expertflow.future import NEVER, Future
from expertflow.horizons.fixed import FixedHorizon
from expertflow.keys import Rule
from expertflow.orders.resident_first import ResidentFirst
from expertflow.parts import Horizon, Place
from expertflow.places.gpu import Gpu
from expertflow.policy import Policy
from expertflow.predictors.none import NoPredictor
from expertflow.predictors.oracle import OraclePredictor
from expertflow.selections.top_k import TopK
from expertflow.view import View


class WatchedBelady(Belady):
    """Remembers the soonest need that an eviction has disturbed: only a demand for want of slots does."""

    disturbed = NEVER

    def evicted(self, key: int, unused: bool) -> None:
        super().evicted(key, unused)
        if self.next_use[key] < self.disturbed:
            self.disturbed = self.next_use[key]


class Unused(Horizon):
    """`Clairvoyant` looks ahead by itself."""

    def distances(self) -> Sequence[int]:
        return ()


class Clairvoyant(Policy):
    """Wants the next experts that the trace will demand and that are not there, up to `max_wanted`, within
    `lookahead` layer events (None: as far as `max_events`, twice around a deep model)."""

    def __init__(
        self,
        future: Future,
        lookahead: Annotated[
            int | None, Rule(1, 1_000_000, unit="layers", null="all", about="that are looked ahead")
        ] = None,
        max_wanted: Annotated[int, Rule(1, 65_535, unit="experts", about="wanted at once")] = 8,
        max_events: Annotated[int, Rule(1, 1_000_000, unit="layers", about="searched for the next use")] = 256,
        place: Place | None = None,
    ) -> None:
        self._watched = WatchedBelady()
        super().__init__(OraclePredictor(), Unused(), TopK(), self._watched, ResidentFirst(), future, place=place)
        if lookahead is not None and lookahead < 1:
            raise ValueError(f"Clairvoyant lookahead={lookahead} must be at least 1, or null for all")
        self.window = lookahead if lookahead is not None else max_events
        self.max_wanted = max_wanted

    def start(self, view: View, shown: View | None = None) -> None:
        super().start(view, shown)
        self._spend(0)
        self._clean = -1
        """Every event up to here lacks nothing, so that a look ahead need not begin anew at each layer."""

    def decide(self, layer: int) -> list[int]:
        view, future, eviction = self.view, self.future, self._watched
        assert future is not None
        residency, event = view.residency, view.event
        wants: dict[int, None] = {}
        clean = max(event, min(self._clean, eviction.disturbed - 1))
        eviction.disturbed = NEVER
        last = min(event + self.window, future.num_events - 1)
        stop = last
        for ahead in range(clean + 1, last + 1):
            for key in future.demand(ahead):
                if not residency[key]:
                    wants[key] = None
            if not wants:
                clean = ahead
                continue
            # What is missed soonest is fetched first, so that a look once around the model is enough.
            stop = min(stop, ahead + view.num_layers)
            if len(wants) >= self.max_wanted or ahead >= stop:
                break
        self._clean = clean
        return list(wants)


def portfolio(future: Future, place: Callable[[], Place] = Gpu) -> dict[str, Policy]:
    """The named schedules of which `clairvoyant` is the best: no prefetch, and lookahead 1, 2, 4 and all. place: makes
    the place of each."""
    schedules: dict[str, Policy] = {
        "belady": Policy(NoPredictor(), FixedHorizon(1), TopK(), Belady(), ResidentFirst(), future, place=place())
    }
    for lookahead in (1, 2, 4, None):
        name = f"clairvoyant_{'all' if lookahead is None else lookahead}"
        schedules[name] = Clairvoyant(future, lookahead, place=place())
    return schedules
