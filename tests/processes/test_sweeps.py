"""Sweeps and studies of several processes: two at once into one folder, and workers whose parent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from joblib import Parallel, delayed

from sim.job.pool import Workers
from tests.attack.kills import kill_round, living
from tests.support.commands import ROOT, command, small_trace
from tests.support.studies import write_study

pytestmark = pytest.mark.slow

SWEEP = (
    "-m",
    "+hardware=a100",
    "+policy=lru,two_level",
    "residency=0.25,0.5",
    "compare=none",
    "events=true",
    "timeline=true",
    "hydra.sweep.dir=two",
)


def start(words: list[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("traces") / "small.safetensors", 80)


@pytest.mark.parametrize("skip", ["true", "false"])
def test_two_sweeps_into_one_folder_end_well(trace: Path, tmp_path: Path, skip: str) -> None:
    words = command(*SWEEP, f"trace.path={trace}", f"skip_done={skip}")
    both = [start(words, tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    out = "".join(text for text, _ in said)
    made, found = out.count(" → "), out.count("done before: ")
    # With skip_done each run is made once, by one of the two.
    assert (made, found) == ((4, 4) if skip == "true" else (8, 0))
    runs = sorted((tmp_path / "two").glob("*/DONE"))
    assert len(runs) == 4
    names = {".hydra", "DONE", "metrics.json", "provenance.json", "events.parquet", "timeline.json"}
    for done in runs:
        assert {path.name for path in done.parent.iterdir()} == names


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(trace: Path, tmp_path: Path, signum: signal.Signals) -> None:
    hung = ("policy.order._target_=tests.processes.hung.Hung", "+policy.order.how=loop", "+policy=lru", "seed=0,1")
    words = [word for word in SWEEP if not word.startswith(("+policy", "residency"))]
    process = start(command(*words, *hung, f"trace.path={trace}"), tmp_path)
    try:
        deadline = time.monotonic() + 100
        # Two workers are at work, for ever.
        while len(list(tmp_path.glob("two/*/.hydra/config.yaml"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(living(process.pid)) >= 3
        process.send_signal(signum)
        _, said = process.communicate(timeout=20)
        deadline = time.monotonic() + 5
        while left := living(process.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        if living(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    if signum == signal.SIGTERM:
        kept = "finished runs are kept: the same command with hydra.sweep.dir=two skip_done=true goes on"
        assert (process.returncode, said) == (143, f"terminated; {kept}\n")
    assert not list(tmp_path.rglob("DONE"))


def test_two_studies_at_once_make_each_cell_once(trace: Path, tmp_path: Path) -> None:
    write_study(tmp_path)
    words = command("tiny", "--config-dir", ".", "--out", "out", "--set", f"recording={trace}", module="sim.study")
    both = [start([*words, "--jobs", "2"], tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(list((tmp_path / "out" / "cells").glob("*.done"))) == 12
    assert (tmp_path / "out" / "DONE").exists()
    assert not list(tmp_path.rglob(".*.tmp"))
    assert not list(tmp_path.rglob("*.lock"))


def test_commands_that_are_killed_and_let_through_leave_what_undisturbed_ones_leave() -> None:
    found = kill_round(0, time.monotonic() + 100, ["generate", "run"], most=4)
    assert found["failures"] == []
    assert found["kills"] >= 4
    assert found["completed"] >= 1


def test_workers_of_an_earlier_folder_are_not_used_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # joblib keeps processes for the next call; what they would find there is not what the caller's folder holds.
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        backend = Workers()
        found += Parallel(n_jobs=2, backend=backend)(delayed(os.getcwd)() for _ in range(2))
    backend.end(at_once=True)
    assert [Path(folder).name for folder in found] == ["first", "first", "second", "second"]
