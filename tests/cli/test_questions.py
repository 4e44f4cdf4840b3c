"""What the page of questions shows is what its commands print, in a folder that holds what the page says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import gguf_models

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "questions.md"
FILES = {"json": "config.json", "yaml": "mine/hardware/mycard.yaml"}
"""Where the blocks of a language stand, as the page says."""


def questions() -> list[tuple[str, str]]:
    """Heading and text of each question."""
    _, *parts = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [(part.partition("\n")[0], part) for part in parts]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def prepared(folder: Path, text: str) -> None:
    """Put the files that a question speaks of into `folder`."""
    for language, name in FILES.items():
        for content in blocks(text, language):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
    for code in blocks(text, "python"):
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=60)
    if "Qwen3-30B-A3B-Q4_K_M.gguf" in text:
        # The header of the published file, made by the recipe of its quantisation.
        gguf_models.write(folder / "Qwen3-30B-A3B-Q4_K_M.gguf", *gguf_models.qwen3_30b_a3b())


def printed(folder: Path, command: str) -> list[str]:
    """The lines of a command's result, without those that say where it was written."""
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    return [line.rstrip() for line in done.stdout.splitlines() if "written to " not in line and " → " not in line]


@pytest.mark.slow
@pytest.mark.parametrize(("heading", "text"), questions(), ids=[heading for heading, _ in questions()])
def test_a_question_is_answered_as_the_page_shows(heading: str, text: str, tmp_path: Path) -> None:
    prepared(tmp_path, text)
    (block,) = blocks(text, "sh")
    lines = [
        line.replace(f"in place of '{tmp_path.name.lower()}'", "in place of 'DIRECTORY'")
        for command in re.sub(r"\\\n\s*", "", block).splitlines()
        for line in printed(tmp_path, command)
    ]
    (shown,) = blocks(text, "text")
    assert [line for line in lines if not re.match(r"\d+ runs: ", line)] == shown.splitlines()


def test_each_question_takes_two_commands_at_most() -> None:
    assert len(questions()) == 4
    for _, text in questions():
        (block,) = blocks(text, "sh")
        assert 1 <= len(re.sub(r"\\\n\s*", "", block).splitlines()) <= 2
