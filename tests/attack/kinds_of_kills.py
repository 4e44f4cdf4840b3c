"""Long commands that are killed: what is counted are kills."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

from tests.attack.kinds import SeedKind
from tests.attack.outcome import ACCEPTED, LOST, Outcome


class Kills(SeedKind):
    """A command is killed some times in one folder and then let through: whatever is missing, half or different is
    lost. The commands take turns."""

    # No bound on memory: the commands would inherit it.
    name, target, most_bytes, batch, hang_s = "kills", "kills", 0, 1, 900.0

    def prepare(self, folder: Path) -> None:
        from tests.attack.kills import Attack

        self.attack = Attack(folder, 0)
        self.commands = sorted(self.attack.commands)

    def _command(self, seed: int) -> str:
        return self.commands[seed % len(self.commands)]

    def told(self, seed: int) -> str:
        return self._command(seed)

    def attempt(self, seed: int, left_out: Collection[int] = ()) -> Outcome:
        self.attack.rng.seed(seed)
        before = self.attack.counts["kills"]
        try:
            self.attack.chain(self.attack.commands[self._command(seed)], time.monotonic() + self.hang_s / 2)
        except Exception as error:
            return Outcome(LOST, text=f"{self._command(seed)}: {error!r}"[:3000])
        return Outcome(ACCEPTED, True, weight=self.attack.counts["kills"] - before)


def kinds() -> list[SeedKind]:
    """Those of kills."""
    return [Kills()]
