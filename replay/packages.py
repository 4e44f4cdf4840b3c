"""What a real machine needs and a plain installation lacks: a missing package is one line with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
