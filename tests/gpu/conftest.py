"""A GPU that tests lose is a stand-in: their own process must end as ever."""

from __future__ import annotations

import pytest

from replay.machine import cuda_errors


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """What `replay.lost` would have been told of."""
    errors: list[BaseException] = []
    monkeypatch.setattr(cuda_errors, "found_lost", errors.append)
    return errors
