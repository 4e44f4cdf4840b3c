"""Every reader of `tests.attack.readers`, its files mutated by the format that the suffix names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.attack import formats, gguf_oracle, import_oracles, model_oracle
from tests.attack.kinds import FileKind
from tests.attack.readers import READERS, Reader

SLOW = ("hardware-composed", "link-composed", "host-composed", "stack-composed", "storage-composed", "model-composed")
"""Readers that take longer for each file: a whole configuration is composed with it (`tests.attack.composing`)."""


class ReaderKind(FileKind):
    """A reader of one sound file."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.others: tuple[str, ...] = ()
        super().__init__(reader.name, formats.JSON, self._make, reader.read)
        rechecks = import_oracles.RECHECKS | model_oracle.RECHECKS | gguf_oracle.RECHECKS
        self.recheck = rechecks.get(reader.name)
        if reader.name in SLOW:
            self.target = "slow"

    def names(self, path: Path) -> tuple[str, ...]:
        """Files that belong together may be called by another of them or their folder, a configuration by its key."""
        group, _, kind = self.name.rpartition("-")
        # A file of the group host sets keys of the hardware.
        keys = [group, "hardware"] if group == "host" else [group]
        return (path.name, *self.others, *(keys if kind in ("composed", "yaml") else []))

    def _make(self, folder: Path) -> Sequence[Path]:
        path = self.reader.make(folder)
        self.form = formats.of(path)
        self.others = tuple(other.name for other in folder.rglob("*"))
        return [path]


def kinds() -> list[FileKind]:
    """One a reader; traces have kinds of their own (`tests.attack.kinds_of_traces`)."""
    return [ReaderKind(reader) for reader in READERS if reader.name != "trace"]
