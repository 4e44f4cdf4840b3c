"""Kinds that go wrong in each way that a round must notice; `tests/attack/test_round.py` tries them."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Collection
from pathlib import Path

from tests.attack.kinds import MIB, SEEDS_PER_ROUND, FileKind, SeedKind
from tests.attack.outcome import ACCEPTED, Outcome


class Broken(SeedKind):
    """Every seventh input goes wrong; the others are accepted."""

    target, most_bytes, hang_s, batch = "each", 64 * MIB, 1.0, 10

    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, folder: Path) -> None:
        self.folder = folder

    def told(self, seed: int) -> str:
        return f"input {seed % SEEDS_PER_ROUND}"

    def attempt(self, seed: int, left_out: Collection[int] = ()) -> Outcome:
        if seed % SEEDS_PER_ROUND % 7 == 3:
            getattr(self, self.name)()
        return Outcome(ACCEPTED)

    def sound(self) -> None:
        """Nothing goes wrong."""

    def sleeps(self) -> None:
        """Interrupted by the watchdog."""
        time.sleep(60)

    def deaf(self) -> None:
        """Ended from outside: the watchdog's signal does not come through."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)

    def dies(self) -> None:
        """The process ends at once."""
        os._exit(7)

    def grows(self) -> None:
        """Wants more address space than it may have."""
        bytearray(1 << 33)

    def swells(self) -> None:
        """Uses memory that it may use, and gives it back."""
        _ = b"x" * (40 * MIB)

    def warns(self) -> None:
        """A line on stderr that nobody asked for."""
        warnings.warn("look out", RuntimeWarning, stacklevel=1)

    def raises(self) -> None:
        """A traceback."""
        raise KeyError("x")


def _file(message: str) -> FileKind:
    """A reader that takes files which begin with {, and says `message` of the others."""

    def make(folder: Path) -> list[Path]:
        path = folder / "a.json"
        path.write_text('{"a": 1}')
        return [path]

    def read(path: Path) -> bytes:
        content = path.read_bytes()
        if not content.startswith(b'{"a"'):
            raise ValueError(message.replace("NAME", path.name))
        return content

    from tests.attack.formats import JSON

    return FileKind(f"says {message[:9]}", JSON, make, read)


WAYS = ("sound", "sleeps", "deaf", "dies", "grows", "swells", "warns", "raises")


def kinds() -> list[SeedKind | FileKind]:
    """One a way to go wrong."""
    files = [_file("NAME is no file; mend it"), _file("two\nlines NAME"), _file("NAME " + "x" * 300), _file("no")]
    return [*map(Broken, WAYS), *files]
