"""What must never be called: it would be, by whoever calls what a configuration names."""

from __future__ import annotations

CALLS: list[str] = []


def trap(*_: object, **__: object) -> None:
    """Remember that it was called."""
    CALLS.append("trap")


class Trap:
    """A class that is no part of a policy."""

    def __init__(self, *_: object, **__: object) -> None:
        CALLS.append("Trap")


TRAP = "no class"
