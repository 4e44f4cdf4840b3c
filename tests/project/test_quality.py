"""The commands of README, of CI and of pre-commit are one set, and what the pages list is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CI = ROOT / ".ci" / "run"
PRE_COMMIT = ROOT / ".pre-commit-config.yaml"
PYTHON = ".venv-test/bin/python"


def commands(heading: str) -> list[str]:
    """The shell lines of a section of README; one that goes on after a backslash is one."""
    section = README.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


def steps(command: str) -> list[str]:
    """What is run one after the other."""
    return [step.strip() for step in command.split("&&")]


def ci_steps() -> list[str]:
    """What CI runs after its preparation."""
    lines = CI.read_text(encoding="utf-8").split("PYTHONUNBUFFERED=1\n")[1].splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_readme_gives_two_commands_and_ci_runs_the_second_with_lint_before_and_types_beside_the_tests() -> None:
    run, test = commands("Two commands")
    *prepare, tests = steps(test)
    *needed, speed = ci_steps()
    lint = [f"{PYTHON} -m ruff check .", f"{PYTHON} -m ruff format --check ."]
    beside = [
        f"{PYTHON} -m mypy >.venv-test/types.txt 2>&1 & types=$!",
        f"{tests} && tests=0 || tests=$?",
        'wait "$types" && types=0 || types=$?',
        "cat .venv-test/types.txt",
        '[ "$tests$types" = 00 ]',
    ]
    assert needed == [*prepare, *lint, *beside]
    # Told behind all that CI may fail of: a shared machine is slow when it likes.
    assert speed.startswith(f"{PYTHON} -m sim.bench --check --repeat 3 || echo ")
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


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("case", range(5))
def test_of_many_cases_a_few_evenly_spaced_stay_fast(case: int, request: pytest.FixtureRequest) -> None:
    assert (request.node.get_closest_marker("slow") is None) is (case in {0, 2})


@pytest.mark.parametrize(("tests", "types"), [(0, 0), (1, 0), (0, 1), (5, 2)])
def test_ci_fails_where_tests_or_types_do_and_tells_both(tests: int, types: int, tmp_path: Path) -> None:
    """With a Python that says of each module what it is told to, in a copy of the script without its preparation."""
    python = tmp_path / PYTHON
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "ran $2"\ncase $2 in pytest) exit {tests};; mypy) exit {types};; esac\n')
    python.chmod(0o755)
    lines = CI.read_text(encoding="utf-8").splitlines()
    script = tmp_path / ".ci" / "run"
    script.parent.mkdir()
    script.write_text("\n".join(line for line in lines if "pip install" not in line and "-m venv" not in line))
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=60)
    passed = tests == types == 0
    assert (done.returncode == 0) is passed
    assert [line for line in done.stdout.splitlines() if line.startswith("ran ")] == [
        "ran ruff",
        "ran ruff",
        "ran pytest",
        "ran mypy",
        *(["ran sim.bench"] if passed else []),
    ]


def test_ci_stops_at_the_first_failure_and_runs_from_the_project_folder() -> None:
    lines = CI.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert 'cd "$(dirname "$0")/.."' in lines
    assert CI.stat().st_mode & 0o111


def test_pre_commit_checks_what_ci_checks() -> None:
    hooks = {hook["id"]: hook for repo in yaml.safe_load(PRE_COMMIT.read_text())["repos"] for hook in repo["hooks"]}
    checks = {"ruff-check": "ruff check .", "ruff-format": "ruff format --check .", "mypy": "mypy"}
    for name, command in checks.items():
        assert "stages" not in hooks[name]
        assert any(step.startswith(f"{PYTHON} -m {command}") for step in ci_steps())
        assert hooks[name]["entry"] == f"python -m {command.removesuffix(' .')}"
    assert "check-added-large-files" in hooks


def test_the_text_below_the_commands_says_what_is_written() -> None:
    """`outputs/…/metrics.json`, `provenance.json`, and `DONE`: the names that the code writes."""
    section = README.read_text(encoding="utf-8").split("## What the command prints\n", 1)[1].split("\n## ", 1)[0]
    source = (ROOT / "sim" / "execute.py").read_text(encoding="utf-8")
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
    models = {
        name
        for row in rows_of("running.md", "Models")[1:]
        for name in re.split(r",\s*", re.sub(r" \(.*?\)", "", row[1]))
    }
    assert models | {"auto"} == {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    named = {name for row in rows_of("policies.md", "What there is") for name in re.findall(r"`([a-z0-9_]+)`", row[0])}
    assert named == {path.stem for path in (ROOT / "conf" / "policy").glob("*.yaml")}


@pytest.mark.parametrize("part", ["predictor", "horizon", "selection", "eviction", "order", "place", "transfer"])
def test_every_part_that_the_docs_list_exists_and_none_is_left_out(part: str) -> None:
    row = next(row for row in rows_of("policies.md", "Parts") if row[0] == part)
    named = set(re.findall(r"`([a-z0-9_]+)`", row[1]))
    assert named == {path.stem for path in (ROOT / "conf" / "policy" / part).glob("*.yaml")}


def test_no_line_is_exempt_from_the_formatter() -> None:
    """`ruff format --check` passes over what such a comment covers."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("expertflow", "sim", "replay", "traces", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"#\s*fmt:\s*(skip|off)", path.read_text(encoding="utf-8"))
    ]
    assert found == []
