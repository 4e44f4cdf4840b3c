"""A file of a user's own that is composed at once: to the same as by Hydra, or by Hydra itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.job.setup import make_workload
from sim.paths import CONF
from tests.attack import composing
from tests.attack.composing import composed

GROUP = "stack"
SOUND = (CONF / GROUP / "graph.yaml").read_text(encoding="utf-8").replace("name: graph", "name: mine")


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def in_full(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Groups of which Hydra itself was asked."""
    asked: list[str] = []
    full = composing._in_full

    def ask(group: str) -> dict[str, object]:
        asked.append(group)
        return full(group)

    monkeypatch.setattr(composing, "_in_full", ask)
    return asked


def test_a_sound_file_is_composed_at_once_and_by_hydra_to_the_same(
    tmp_path: Path, in_full: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, SOUND)
    monkeypatch.setattr(composing, "_ONE_IN", 2**40)
    at_once = composed(GROUP, path)
    assert in_full == []
    monkeypatch.setattr(composing, "_ONE_IN", 1)
    assert composed(GROUP, path) == at_once
    assert in_full == [GROUP]
    assert make_workload(at_once).stack.name == "mine"


@pytest.mark.parametrize("text", [f"# @package _global_\n{SOUND}", f"defaults:\n  - graph\n{SOUND}"])
def test_what_asks_more_of_hydra_is_for_hydra(
    text: str, tmp_path: Path, in_full: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composing, "_ONE_IN", 2**40)
    path = written(tmp_path, text)
    composing._told(lambda: composed(GROUP, path))
    assert in_full == [GROUP]


def test_two_ways_that_differ_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composing, "_ONE_IN", 1)
    monkeypatch.setattr(composing, "_in_full", lambda group: {})
    with pytest.raises(AssertionError, match=r"stack: .* without Hydra, \{\} with it"):
        composed(GROUP, written(tmp_path, SOUND))
