"""Which files a run reads beside its trace: fitted predictors, shipped or the user's own.

What reads one says so with `note`; what runs a job collects with `record_into`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from traces.shipped import shipped

SHIPPED = "shipped: "
"""Prefix of the name of a shipped file, wherever it lies."""

_recorder: list[dict[str, str | None]] = []
"""Where reads are recorded: one entry at most."""


def record_into(files: dict[str, str | None] | None) -> None:
    """From here on put name and hash of every file that is read into `files`; None: no longer."""
    _recorder.clear()
    if files is not None:
        _recorder.append(files)


def note(name: str) -> None:
    """The file was read, or looked for in vain. name: its path as given, or `SHIPPED` and its name."""
    for files in _recorder:
        files[name] = hash_now(name)


def hash_now(name: str) -> str | None:
    """SHA-256 of the file of that name as it is now; None where there is none."""
    if not name.startswith(SHIPPED):
        return sha256_of(Path(name))
    try:
        path = shipped(name.removeprefix(SHIPPED))
    except ValueError:
        return None
    return None if path is None else sha256_of(path)


def sha256_of(path: Path) -> str | None:
    """SHA-256 of a file's bytes, in hex; None where there is no regular file that can be read."""
    try:
        if not path.is_file():
            return None  # what a DONE file names may be a device, which never ends
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None
