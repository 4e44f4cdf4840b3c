"""The one list of what is attacked: a new reader, key or command joins by being named here.

`FileKind` is for whatever reads a file; any other class with `name`, `attempt`, `prepare` and `save` may stand beside
it (`Kind`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, Protocol
from zlib import crc32

from tests.attack import formats
from tests.attack.formats import Format, Mutant
from tests.attack.outcome import ACCEPTED, HANG_S, REFUSED, WRONG_ACCEPTED, WRONG_REFUSED, Outcome, of_error

MIB = 1 << 20
SEEDS_PER_ROUND = 1_000_000_000
"""What is not drawn but listed goes by the seed's place in its round."""


class Kind(Protocol):
    """What can be attacked, one seed after the other.

    most_bytes: memory that one input may take beyond what the process had. hang_s: seconds that it may take. target:
    the option of the command that says how many are wanted. batch: how many to hand to a worker at a time, at most.
    """

    name: str
    target: str
    most_bytes: int
    hang_s: float
    batch: int

    def prepare(self, folder: Path) -> None:
        """Load what is needed; `folder` is empty and this worker's own."""

    def attempt(self, seed: int, left_out: Collection[int] = ()) -> Outcome:
        """Try the input of one seed."""

    def describe(self, seed: int, left_out: Collection[int] = ()) -> tuple[bytes, tuple[str, ...]]:
        """The input itself, and the steps that made it."""

    def retry(self, content: bytes) -> Outcome:
        """Try an input that was saved."""


Recheck = Callable[[bytes, Any], str]
"""What a second opinion has against an accepted input, of its bytes and what was read; "" if nothing."""


@dataclass
class FileKind:
    """A reader of files of one format.

    make: writes sound files into a folder; their paths, each attacked in its place. read: as users' runs read it.
    recheck: see `Recheck`. sound: True if a second opinion finds nothing wrong with the bytes of a refused file.
    """

    name: str
    form: Format
    make: Callable[[Path], Sequence[Path]]
    read: Callable[[Path], Any]
    recheck: Recheck | None = None
    sound: Callable[[bytes], bool] | None = None
    target: str = "each"
    most_bytes: int = 512 * MIB
    hang_s: float = HANG_S
    batch: int = 200
    paths: list[Path] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    documents: list[Any] = field(default_factory=list)

    def prepare(self, folder: Path) -> None:
        """Write and read the sound files: they must be accepted."""
        self.paths = list(self.make(folder))
        self.contents = [path.read_bytes() for path in self.paths]
        self.documents = [self.form.parse(content) for content in self.contents]
        for index, content in enumerate(self.contents):
            if self.read(self.paths[index]) is None:
                raise AssertionError(f"{self.name}: the sound file {self.paths[index].name} is not read")
            outcome = self._judge(index, content)
            if outcome.verdict != ACCEPTED:
                raise AssertionError(f"{self.name}: the sound file {self.paths[index].name} is not accepted: {outcome}")

    def _mutant(self, seed: int, left_out: Collection[int]) -> tuple[int, Mutant]:
        rng = Random(seed * 0x1_0000_0000 + crc32(self.name.encode()))
        index = rng.randrange(len(self.documents))
        return index, formats.build(self.form, self.documents[index], rng, left_out)

    def describe(self, seed: int, left_out: Collection[int] = ()) -> tuple[bytes, tuple[str, ...]]:
        index, mutant = self._mutant(seed, left_out)
        return index.to_bytes(1, "big") + mutant.content, mutant.steps

    def attempt(self, seed: int, left_out: Collection[int] = ()) -> Outcome:
        index, mutant = self._mutant(seed, left_out)
        return self._judge(index, mutant.content)

    def names(self, path: Path) -> tuple[str, ...]:
        """One of these must be in a message."""
        return (path.name,)

    def retry(self, content: bytes) -> Outcome:
        return self._judge(content[0], content[1:])

    def _judge(self, index: int, content: bytes) -> Outcome:
        path = self.paths[index]
        # A new file each time: what is still mapped of the last one keeps its bytes.
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        try:
            found = self.read(path)
        except (Exception, SystemExit) as error:
            outcome = of_error(error, self.names(path))
            if outcome.failed or self.sound is None:
                return outcome
            return Outcome(WRONG_REFUSED if self.sound(content) else REFUSED, True, outcome.text)
        if self.recheck is None:
            return Outcome(ACCEPTED)
        problem = self.recheck(content, found)
        return Outcome(WRONG_ACCEPTED if problem else ACCEPTED, True, problem)


class SeedKind:
    """A kind whose inputs are told by their seed alone: no bytes are kept of a failure."""

    name = ""
    target = "each"
    most_bytes = 512 * MIB
    hang_s = HANG_S
    batch = 200

    def told(self, seed: int) -> str:
        """What the input of that seed is."""
        raise NotImplementedError

    def prepare(self, folder: Path) -> None:
        """See `Kind`."""
        raise NotImplementedError

    def attempt(self, seed: int, left_out: Collection[int] = ()) -> Outcome:
        """See `Kind`."""
        raise NotImplementedError

    def describe(self, seed: int, left_out: Collection[int] = ()) -> tuple[bytes, tuple[str, ...]]:
        return str(seed).encode(), (self.told(seed)[:1000],)

    def retry(self, content: bytes) -> Outcome:
        return self.attempt(int(content))


MODULES = ("kinds_of_traces", "kinds_of_files", "kinds_of_configurations", "kinds_of_parts", "kinds_of_kills")
"""Each has a function `kinds()`. A new reader is one line in `tests.attack.readers`, which the second takes."""


def registry(modules: Sequence[str] = MODULES) -> dict[str, Kind]:
    """All kinds by name, made anew; nothing is loaded that they need."""
    kinds = [kind for name in modules for kind in import_module(f"tests.attack.{name}").kinds()]
    return {kind.name: kind for kind in kinds}
