"""The Python that README and docs/api.md show runs as it stands there, and prints what stands below it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ROOT

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown(text: str) -> Iterator[tuple[str, str | None]]:
    """Each block of Python with the text that stands directly below it, None where there is none."""
    found = list(BLOCK.finditer(text))
    for place, block in enumerate(found):
        if block[1] != "python":
            continue
        after = found[place + 1] if place + 1 < len(found) else None
        is_below = after is not None and after[1] == "text" and not text[block.end() : after.start()].strip()
        yield block[2], after[2] if after is not None and is_below else None


def run_blocks(text: str) -> list[tuple[str, str | None]]:
    """What each block printed, and what it says it prints; one namespace for all, as in a notebook."""
    space: dict[str, Any] = {"__name__": "__main__"}
    ran = []
    for code, told in shown(text):
        said = io.StringIO()
        with redirect_stdout(said):
            exec(compile(code, "page", "exec"), space)
        ran.append((_trimmed(said.getvalue()), told))
    return ran


def _trimmed(text: str) -> str:
    """Without the blanks at the ends of lines, which no page keeps."""
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def section(heading: str) -> str:
    """Of README."""
    return (ROOT / "README.md").read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.slow
def test_the_page_runs_and_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run_blocks((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert len(ran) == 5
    for said, told in ran:
        assert said == (told or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_readme_runs_and_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ((said, told),) = run_blocks(section("From Python"))
    assert said == told
    assert (tmp_path / "stall.png").stat().st_size > 10_000


def test_readme_shows_it_in_five_lines_on_its_first_screen() -> None:
    ((code, told),) = shown(section("From Python"))
    assert len([line for line in code.splitlines() if line.strip()]) == 5
    assert told
    before = (ROOT / "README.md").read_text(encoding="utf-8").split(code)[0]
    assert len(before.splitlines()) + len(code.splitlines()) <= 40
