"""Measuring in peace: no garbage collection while a clock runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Run the body without the garbage collector, which would stop the host for milliseconds; collect before."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keep_loaded() -> None:
    """Take all objects that exist now out of the collector's view.

    They live to the end, and each look at them takes 0.1 s.
    """
    gc.collect()
    gc.freeze()
