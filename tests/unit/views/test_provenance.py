"""What a result says of the code that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sim.job import output


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one commit with code and a result."""
    for name in ("sim/code.py", "results/mine/table.csv"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1\n")
    who = ["-c", "user.name=n", "-c", "user.email=e@e"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(output, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "dirty"),
    [(None, False), ("sim/code.py", True), ("results/mine/table.csv", False), ("sim/new.py", False)],
)
def test_code_that_is_not_committed_is_told_and_a_result_that_is_made_again_is_none(
    changed: str | None, dirty: bool, checkout: Path
) -> None:
    if changed is not None:
        (checkout / changed).write_text("2\n")
    commit, found = output._git_state()
    assert commit is not None
    assert len(commit) == 40
    assert found is dirty
