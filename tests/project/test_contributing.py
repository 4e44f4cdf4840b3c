"""The worked example of CONTRIBUTING.md, followed to the letter in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLE = TEXT.split("## Add a policy part\n", 1)[1].split("\n## ", 1)[0]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
COPIED = ("conf", "expertflow", "replay", "sim", "tests", "traces", "pyproject.toml", "README.md")


def files() -> dict[str, str]:
    """Path and content of each file of the example: the last path named before the block."""
    found = {}
    for block in BLOCK.finditer(EXAMPLE):
        if block[1] != "sh":
            paths = re.findall(r"`([\w/]+\.(?:py|yaml))`", EXAMPLE[: block.start()])
            found[paths[-1]] = block[2]
    return found


def commands() -> list[str]:
    """The shell lines of the example."""
    return [line for block in BLOCK.finditer(EXAMPLE) if block[1] == "sh" for line in block[2].splitlines()]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the example needs."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A shell line in `folder`, whose packages come before those installed; `python` is this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    env = kept | {"PATH": path, "PYTHONPATH": str(folder)}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_example_is_a_part_its_choice_and_its_test() -> None:
    part, choice, test = files()
    assert (part, choice) == ("expertflow/evictions/fifo.py", "conf/policy/eviction/fifo.yaml")
    assert re.fullmatch(r"tests/\w+/test_fifo\.py", test)
    assert f"python -m pytest -q {test}" in commands()
    assert not any((ROOT / path).exists() for path in files())


@pytest.mark.slow
def test_who_follows_the_example_has_a_part_that_passes(copy: Path) -> None:
    for path, content in files().items():
        (copy / path).write_text(content, encoding="utf-8")
    for command in commands():
        found = run(command, copy)
        assert found.returncode == 0, f"{command}\n{found.stdout}{found.stderr}"
        if "pytest" in command:
            assert re.search(r"^[1-9]\d* passed", found.stdout, flags=re.MULTILINE), found.stdout
            assert "skipped" not in found.stdout


@pytest.mark.slow
def test_the_examples_test_fails_for_another_part(copy: Path) -> None:
    for path, content in files().items():
        (copy / path).write_text(content, encoding="utf-8")
    part, _, test = files()
    last_first = files()[part].replace("self.arrivals[key] = None", "self.arrivals = {key: None, **self.arrivals}")
    assert last_first != files()[part]
    (copy / part).write_text(last_first, encoding="utf-8")
    found = run(f"python -m pytest -q {test}", copy)
    assert found.returncode == 1, found.stdout
    assert "1 failed" in found.stdout
