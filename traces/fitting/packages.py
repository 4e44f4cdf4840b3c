"""What fitting needs and a plain installation lacks: a missing package is one line with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from traces.container import TraceError


@contextmanager
def asked_for_by(name: str) -> Iterator[None]:
    """TraceError where the body does not find a module: `name` needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise TraceError(f"{name} needs {error.name}; install it: pip install 'expertflow[fit]'") from None
