"""What a real machine needs and a plain installation lacks: a missing package is one line with the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from traces.extras import install


@contextmanager
def asked_for_by(command: str) -> Iterator[None]:
    """ValueError where the body does not find another distribution's module: `command` needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "replay", "sim", "traces", "expertflow"):
            raise
        raise ValueError(f"{command} needs {name}; {install(name, 'replay')}") from None


def copies_note(machine: Mapping[str, Any]) -> str:
    """What to say of a machine whose copies go by torch's call, since the package with NVIDIA's is missing; else ""."""
    by = str(machine.get("copies_by", ""))
    return f"copies by {by}" if by.startswith("torch") else ""
