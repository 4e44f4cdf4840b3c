"""Lint and types, as pyproject.toml configures them; and README's commands are those that are run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CI = ROOT / ".ci" / "run"
PACKAGES = ("expertflow", "sim", "replay", "traces")


def tool(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m NAME WORDS` in the project's folder; skips the test where the tool is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'expertflow[test]'")
    command = [sys.executable, "-m", name, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_ruff_finds_nothing(folder: str) -> None:
    found = tool("ruff", "check", "--no-cache", folder)
    assert found.returncode == 0, found.stdout + found.stderr


def test_ruff_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("import os\n")
    found = tool("ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), str(tmp_path))
    assert (found.returncode, "F401" in found.stdout) == (1, True), found.stdout + found.stderr


@pytest.mark.slow
def test_mypy_finds_nothing() -> None:
    found = tool("mypy")
    assert found.returncode == 0, found.stdout + found.stderr


def test_mypy_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def one() -> int:\n    return 'one'\n")
    found = tool("mypy", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "wrong.py"))
    assert (found.returncode, "return-value" in found.stdout) == (1, True), found.stdout + found.stderr


# -- commands ------------------------------------------------------------------------------------------------


def commands(heading: str) -> list[str]:
    """The shell lines of a section of README; one that goes on after a backslash is one."""
    section = README.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


def steps(command: str) -> list[str]:
    """What is run one after the other."""
    return [step.strip() for step in command.split("&&")]


def test_readme_gives_two_commands_and_the_second_is_what_ci_runs() -> None:
    run, test = commands("Two commands")
    assert CI.read_text(encoding="utf-8").rstrip("\n").splitlines()[-1] == test
    assert steps(test) == [
        "python3 -m venv .venv-test",
        ".venv-test/bin/pip install -q -c constraints.txt -e '.[test]'",
        ".venv-test/bin/python -m pytest -n auto --dist loadfile",
    ]
    assert steps(run) == [
        "python3 -m venv .venv",
        ".venv/bin/pip install -q .",
        ".venv/bin/python -m sim +hardware=a100 +policy=adaptive",
    ]
    assert (ROOT / "constraints.txt").is_file()


def test_ci_stops_at_the_first_failure_and_runs_from_the_project_folder() -> None:
    lines = CI.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert 'cd "$(dirname "$0")/.."' in lines
    assert CI.stat().st_mode & 0o111


def test_the_text_below_the_commands_says_what_is_written() -> None:
    """`outputs/…/metrics.json`, `provenance.json`, and `DONE`: the names that the code writes."""
    section = README.read_text(encoding="utf-8").split("## Two commands\n", 1)[1].split("\n## ", 1)[0]
    source = (ROOT / "sim" / "app.py").read_text(encoding="utf-8")
    for name in ("metrics.json", "provenance.json", "DONE"):
        assert f"{name}`" in section
        assert f'"{name}"' in source


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the tables in a section of a page of docs/."""
    section = (ROOT / "docs" / page).read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]


def test_every_choice_that_the_docs_list_exists_and_none_is_left_out() -> None:
    rows = rows_of("running.md", "Choosing")
    hardware = next(row for row in rows if row[0] == "`+hardware=`")[2]
    named = set(re.findall(r"[a-z0-9_]+", hardware.split("(")[0].replace("`", "")))
    assert named | {"ideal_link"} == {path.stem for path in (ROOT / "conf" / "hardware").glob("*.yaml")}
    named = {name for row in rows_of("policies.md", "What there is") for name in re.findall(r"`([a-z0-9_]+)`", row[0])}
    assert named == {path.stem for path in (ROOT / "conf" / "policy").glob("*.yaml")}


@pytest.mark.parametrize("part", ["predictor", "horizon", "selection", "eviction", "order"])
def test_every_part_that_the_docs_list_exists_and_none_is_left_out(part: str) -> None:
    row = next(row for row in rows_of("policies.md", "Parts") if row[0] == part)
    named = set(re.findall(r"`([a-z0-9_]+)`", row[1]))
    assert named == {path.stem for path in (ROOT / "conf" / "policy" / part).glob("*.yaml")}
