"""Here the answers of this package's own parts are checked as those of any other."""

from __future__ import annotations

import pytest

from expertflow.boundary import CHECKING


@pytest.fixture(autouse=True)
def every_part_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHECKING, "own", True)
