"""Measuring in peace: no garbage collection while a clock runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """The collector stops the host for milliseconds: collect before, not during."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keep_loaded() -> None:
    """What is there now stays to the end: the collector need not look at it again, which takes 0.1 s each time."""
    gc.collect()
    gc.freeze()
