"""Hostile parts of a policy, each simulated, replayed and in lockstep."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.attack.kinds import MIB, SEEDS_PER_ROUND, SeedKind
from tests.attack.outcome import ACCEPTED, MESSAGE, REFUSED, WRONG_ACCEPTED, Outcome, fault_of_message


class HostileParts(SeedKind):
    """One after the other, each in three ways; a silent one is a failure."""

    # The first of some compile what they need.
    name, target, most_bytes, batch, hang_s = "parts", "parts", 4096 * MIB, 30, 60.0

    def prepare(self, folder: Path) -> None:
        from tests.attack import hostile_table, parts

        self.kinds = parts.KINDS
        self.ways: tuple[Any, ...] = (hostile_table.simulated, hostile_table.replayed, hostile_table.in_lockstep)
        self.stack = ExitStack()
        self.world = self.stack.enter_context(hostile_table.world(folder))

    def _case(self, seed: int) -> tuple[Any, Any]:
        index = seed % SEEDS_PER_ROUND
        return self.kinds[index // len(self.ways) % len(self.kinds)], self.ways[index % len(self.ways)]

    def told(self, seed: int) -> str:
        kind, way = self._case(seed)
        return f"{kind.name} ({kind.told}), {way.__name__}"

    def attempt(self, seed: int, left_out: Collection[int] = ()) -> Outcome:
        from tests.attack import hostile_table, parts

        kind, way = self._case(seed)
        found = way(kind, self.world)
        if found.how == hostile_table.SILENT:
            return Outcome(WRONG_ACCEPTED, True, f"{kind.name}, {way.__name__}: silent")
        if found.how != parts.REFUSED:
            # It differs from an honest log, is marked as a reference, or has gained nothing.
            return Outcome(ACCEPTED, True)
        problem = fault_of_message(found.message, ())
        return (
            Outcome(MESSAGE, text=f"{problem}: {found.message}") if problem else Outcome(REFUSED, True, found.message)
        )


def kinds() -> list[SeedKind]:
    """Those of parts."""
    return [HostileParts()]
