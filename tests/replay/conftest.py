"""What holds for every test of the replay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.replays import uncollected


@pytest.fixture(scope="package", autouse=True)
def _collecting() -> Iterator[None]:
    with uncollected():
        yield
