"""Times that a GPU is to reach, from replays whose times and hosts are known; and the script that asks for all lines,
in a small form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from expertflow.core import SWITCH
from replay import calibrate
from replay.validation import goals
from replay.validation.fidelity import ForwardTimes, Ran
from replay.validation.goals import GOALS, Goal, judge, verdict
from replay.validation.takes import Take

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "results" / "validation-h200" / "confirm.sh"
GOAL = Goal("everything resident", (), 2.4)


def takes(*times_ms: float, loop_ns: int = 1000) -> list[Take]:
    """Replays that took so many ms a token, all at one speed of the host."""
    return [Take(Ran({"tpot_ms": {"mean": time}}, ForwardTimes()), (loop_ns, loop_ns)) for time in times_ms]


def test_the_goals() -> None:
    assert [(goal.name, goal.most_ms) for goal in GOALS] == [("everything resident", 2.4), ("LRU at 50 %", 6.2)]
    assert (goals.SPREAD, goals.WARMUP, goals.parser().parse_args(["--out", "x"]).repeat) == (0.01, 8, 10)


@pytest.mark.parametrize(
    ("times", "fast", "alike"),
    [
        ((2.4, 2.4, 2.4), True, True),
        ((2.390, 2.395, 2.413), True, True),
        ((2.401, 2.401, 2.401), False, True),
        ((2.390, 2.395, 2.415), True, False),
        ((2.0, 2.0), True, False),
    ],
)
def test_a_goal_is_reached_by_enough_replays_that_are_alike(times: tuple[float, ...], fast: bool, alike: bool) -> None:
    found = judge(GOAL, takes(*times), 3)
    assert (found["fast"], found["alike"], found["reached"]) == (fast, alike, fast and alike)
    words = {True: "reached", False: "MISSED"}
    line = verdict(found, 3)
    assert f"at most 2.4 asked: {words[fast]};" in line
    assert line.endswith(f"at most 1.0 % asked: {words[alike]}")


def test_replays_at_another_speed_of_the_host_do_not_count() -> None:
    found = judge(GOAL, [*takes(2.3, 2.3, 2.31), *takes(9.9, loop_ns=2000)], 3)
    assert (found["replays"], found["count"], found["reached"]) == (4, 3, True)
    assert "3 replays of 3 wanted count (4 made) and differ by 0.4 %" in verdict(found, 3)


def test_nothing_replayed_is_no_goal_reached() -> None:
    found = judge(GOAL, [], 3)
    assert not found["reached"]
    assert verdict(found, 3) == "everything resident: MISSED, no replay in the time that was given"


def script(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it from another folder, on the code that is tested."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [str(SCRIPT), *words],
        cwd=folder,
        # Words for the tests that run here are not for those that the script runs.
        env={
            **os.environ,
            "PYTHONPATH": path,
            "PYTHON": sys.executable,
            "PYTEST_ADDOPTS": "",
            SWITCH: "0",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_the_script_wants_a_folder_and_knows_its_parts(tmp_path: Path) -> None:
    done = script(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no folder for the results" in done.stderr
    done = script(tmp_path, "out", "cpu", "batch-9")
    assert done.returncode == 1
    assert "PART=batch-9 is unknown; choose from: tests, goals, batch-1, batch-8, deepseek" in done.stdout


@pytest.mark.parametrize(("switch", "compiled"), [("", True), ("1", True), ("0", False)])
def test_the_script_compiles_the_core_where_it_is_not(tmp_path: Path, switch: str, compiled: bool) -> None:
    """By a Python that says so of nothing, and only notes what it is asked."""
    asked, python = tmp_path / "asked.txt", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$1" >>{asked}\nexit 1\n')
    python.chmod(0o755)
    script(tmp_path, "out", "cpu", "tests", PYTHON=str(python), **{SWITCH: switch})
    assert asked.read_text().split() == ["-c", *(["build_backend.py"] if compiled else []), "-m"]


@pytest.mark.slow
def test_the_script_runs_every_part_and_keeps_what_each_found(tmp_path: Path) -> None:
    """On a CPU machine, small: what it asks of a GPU cannot rot."""
    models = "gpt-oss-20b,deepseek-v2-lite"
    calibrated = ["c", "--machine", "cpu", "--quick", "--policies", "lru", "--models", models]
    assert calibrate.main([*calibrated, "--config-dir", str(tmp_path)]) == 0
    words = (
        f"--calibration {tmp_path / 'hardware' / 'c.calibration.json'} --policies lru --residency 0.5 --stacks found"
    )
    small = f"{words} --tokens 2 --log-tokens 2 --repeat 2"
    done = script(tmp_path, "out", "cpu", MINUTES="0.8", WORDS=small)
    out = tmp_path / "out"
    told = dict(line.split(": exit code ") for line in (out / "parts.txt").read_text().splitlines())
    assert list(told) == ["tests", "goals", "batch-1", "batch-8", "deepseek"]
    # All GPU tests skip; what a CPU machine takes is no GPU's time; and a row may be noisy.
    assert told["tests"] == "0"
    assert set(told.values()) <= {"0", "1"}, done.stdout
    assert done.returncode == 1
    assert " skipped" in (out / "tests" / "output.txt").read_text()
    rows = {"batch-1": {("gpt-oss-20b", 1)}, "batch-8": {("gpt-oss-20b", 8)}}
    rows["deepseek"] = {("deepseek-v2-lite", 1), ("deepseek-v2-lite", 8)}
    for part, expected in rows.items():
        table = pd.read_csv(out / part / "table.csv")
        assert set(zip(table["model"], table["batch_size"], strict=True)) == expected
        summary = json.loads((out / part / "summary.json").read_text())
        assert summary["stamps"]["wrong"] == 0
        assert [one["difference"] for one in summary["lockstep"]] == [None]
    found = json.loads((out / "goals" / "goals.json").read_text())
    assert (found["finished"], found["reached"], len(found["verdicts"])) == (True, False, 2)
    assert set(pd.read_csv(out / "goals" / "goals.csv")["goal"]) == {goal.name for goal in GOALS}
