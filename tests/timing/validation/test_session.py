"""What a validation checks beside its rows, as far as the time goes, and what it says of it: on a clock of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from replay.run import Integrity
from replay.validation import session
from replay.validation.plan import Asked, Case
from replay.validation.session import Validation
from replay.validation.workbench import Workbench
from tests.timing.validation.test_folder import DEVICE, arguments

POLICIES = ["a", "b", "c", "d", "e", "f", "g", "h"]


class Clock:
    """Each run with stamps takes ten seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: Integrity) -> None:
        self.now_s, self._found = 0.0, found
        monkeypatch.setattr(session.Findings, "elapsed_s", lambda _: self.now_s)

    def stamped(self, *given: Any) -> Integrity:
        self.now_s += 10
        return self._found


def validation(out: Path, monkeypatch: pytest.MonkeyPatch, found: Integrity) -> tuple[Validation, Clock]:
    """One of which only stamps and logs are made, and these by a stand-in."""

    class Reader:
        def __init__(self, path: Path) -> None:
            self.path = path

        def __enter__(self) -> Reader:
            return self

        def __exit__(self, *given: object) -> None:
            """Nothing is open."""

    clock = Clock(monkeypatch, found)
    made = Validation(arguments(out, log_tokens=4), Asked(POLICIES, [0.5], [1], ["found"]), DEVICE, out)
    cfg: dict[str, Any] = {"policy": {}, "seed": 0}
    made._bench = cast(Workbench, SimpleNamespace(stamped=clock.stamped, workload=lambda *given: (cfg, None)))
    result = SimpleNamespace(num_decisions=7, num_forwards=4, difference=None)
    monkeypatch.setattr(session, "LogReader", Reader)
    monkeypatch.setattr(session, "check_log", lambda *given: result)
    monkeypatch.setattr(session, "make_policy", lambda *given: (None, None))
    made._found.unlogged = list(POLICIES)
    return made, clock


SOUND = Integrity(10, 80, 0, None)


def test_logs_are_made_as_long_as_breadth_still_fits_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four rows of ten seconds have to end after 100: the sixth log begins after 50."""
    made, clock = validation(tmp_path, monkeypatch, SOUND)
    made._check_decisions("gpt-oss-20b", 100.0, 4)
    assert [one["policy"] for one in made._found.lockstep] == list("abcdef")
    assert made._found.unlogged == ["g", "h"]
    assert clock.now_s == 60
    assert "no time now for the lockstep of g, h: raise --minutes, or give a --calibration" in capsys.readouterr().out
    # What is left is made when the rows are done.
    made._check_decisions("gpt-oss-20b", 70.0)
    assert [one["policy"] for one in made._found.lockstep] == list("abcdefg")
    assert made._found.unlogged == ["h"]


def test_no_log_is_begun_where_calibrating_took_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, clock = validation(tmp_path, monkeypatch, SOUND)
    clock.now_s = 101.0
    made._check_decisions("gpt-oss-20b", 100.0, 4)
    assert (made._found.lockstep, made._found.unlogged) == ([], POLICIES)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("found", "told"),
    [(SOUND, "0 wrong stamps in 10"), (Integrity(10, 80, 1, None, 2), "1 wrong stamps and 2 wrong launches in 10")],
)
def test_progress_tells_of_wrong_stamps_and_of_wrong_launches(
    found: Integrity, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = validation(tmp_path, monkeypatch, found)
    made._stamp(Case("gpt-oss-20b", "found", 0.5, 1, "lru"), 4, None)
    assert f"gpt-oss-20b found 50 % batch 1 lru: {told} executions" in capsys.readouterr().out
    assert made._found.integrity[0]["wrong"] == found.num_wrong + found.num_mislaunched
