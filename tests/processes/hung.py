"""An order that hangs, in each way in which a part may."""

from __future__ import annotations

import time
from collections.abc import Sequence

from expertflow.parts import Order


class Hung(Order):
    """Answers `after` times, then never again. how: never, loop, sleep or stubborn (it catches everything)."""

    def __init__(self, how: str, after: int = 3) -> None:
        self.how, self.after = how, after

    def arrange(self, keys: Sequence[int]) -> Sequence[int]:
        self.after -= 1
        if self.after < 0 and self.how != "never":
            self._hang()
        return keys

    def _hang(self) -> None:
        while True:
            if self.how == "sleep":
                time.sleep(1e6)
            elif self.how == "stubborn":
                try:
                    time.sleep(1e6)
                except BaseException:
                    continue
