"""Every reader of `tests.attack.readers`, its files mutated by the format that the suffix names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.attack import formats
from tests.attack.kinds import FileKind
from tests.attack.readers import READERS, Reader

SLOW = ("hardware-yaml", "stack-yaml", "model-yaml")
"""Readers that take long for each file, since Hydra composes a whole configuration with it."""


class ReaderKind(FileKind):
    """A reader of one sound file."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.folder = reader, Path()
        super().__init__(reader.name, formats.JSON, self._make, reader.read)
        if reader.name in SLOW:
            self.target, self.batch = "slow", 20

    def names(self, path: Path) -> tuple[str, ...]:
        """A file of a folder with a meaning may be called by the folder, a configuration by its key."""
        folder = [] if path.parent == self.folder else [path.parent.name]
        group = self.name.removesuffix("-yaml")
        return (path.name, *folder, *([group] if group != self.name else []))

    def _make(self, folder: Path) -> Sequence[Path]:
        self.folder, path = folder, self.reader.make(folder)
        self.form = formats.of(path)
        return [path]


def kinds() -> list[FileKind]:
    """One a reader; traces have kinds of their own (`tests.attack.kinds_of_traces`)."""
    return [ReaderKind(reader) for reader in READERS if reader.name != "trace"]
