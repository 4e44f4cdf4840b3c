"""What holds for every test of the replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from unittest.mock import patch

import pytest


@pytest.fixture(scope="package", autouse=True)
def _collecting() -> Iterator[None]:
    """A whole garbage collection before each of hundreds of runs would take longer than they do."""
    with patch("replay.run.gc_paused", nullcontext):
        yield
