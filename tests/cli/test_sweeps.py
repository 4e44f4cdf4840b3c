"""`python -m sim -m`: what is wrong in any run is said before the first, what fails is told with how to go on, and a
terminal shows how many runs have ended."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from sim import SweepError, sweep
from sim.job.run_count import Count
from tests.support.commands import ROOT, command, run_here, run_there, small_trace

PARTS = """from expertflow.evictions.lru import LRU


class Bad(LRU):
    def __init__(self, boom=1, scope="global"):
        super().__init__(scope)
        self.boom = boom

    def start(self, view, future):
        super().start(view, future)
        if self.boom == 2:
            raise KeyError("it is two")
"""
A100 = ("+hardware=a100", "compare=none")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("sweeps") / "t.safetensors")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["+policy=adaptive,lru", "policy.horizon.max_distance=3"],
            "error: policy=lru: policy.horizon.max_distance is no key of FixedHorizon, which has depth, distances; it "
            "is a key of policy/horizon=adaptive, adaptive_patient: choose one that has it, or leave the key out\n",
        ),
        (["+policy=lru", "residency=0.2,3"], "error: residency=3 is outside (0, 1]\n"),
        (["+policy=lru", "hardware.tflops=300,fast"], "error: hardware.tflops='fast' must be a number in "),
        (
            ["+policy=lru,clairvoyant", "policy.eviction.scope=layer"],
            "error: policy=clairvoyant: policy.eviction: Clairvoyant is a whole policy, which is not composed of parts",
        ),
    ],
)
def test_what_is_wrong_in_any_run_is_said_before_the_first(
    words: list[str], said: str, trace: Path, tmp_path: Path
) -> None:
    found = run_here(["-m", *A100, *words, f"trace.path={trace}", f"hydra.sweep.dir={tmp_path / 's'}"], tmp_path)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(said)
    assert found.err.count("\n") == 1
    assert not list(tmp_path.rglob("metrics.json"))


def test_from_python_too(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policy\.horizon\.max_distance is no key of FixedHorizon") as found:
        sweep(
            hardware="a100",
            policy=["adaptive", "lru"],
            trace=str(trace),
            out=tmp_path / "s",
            **{"policy.horizon.max_distance": 3},
        )
    assert not isinstance(found.value, SweepError)
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_runs_that_fail_are_named_and_what_is_kept_and_how_to_go_on_is_said(
    launcher: str, trace: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(PARTS, encoding="utf-8")
    words = ["-m", *A100, "+policy=lru", "policy.eviction._target_=mine.Bad", "policy.eviction.boom=1,2,3"]
    words += [f"trace.path={trace}", f"hydra/launcher={launcher}", "hydra.sweep.dir=s"]
    for skip in ("false", "true"):
        found = run_there([*words, f"skip_done={skip}"], tmp_path, tmp_path)
        first, last = found.err.splitlines()
        assert first.startswith("error: policy.eviction.boom=2: Bad.start raised KeyError: 'it is two' at ")
        assert last == (
            "error: 1 of 3 runs failed: the other 2 are kept in s; mend that, then the same command with "
            "hydra.sweep.dir=s skip_done=true goes on"
        )
        assert found.code == 2
    assert found.out.count("done before: ") == len(list(tmp_path.rglob("DONE"))) == 2


def sent_to_terminal(words: list[str], cwd: Path) -> str:
    """What a terminal is sent by a command."""
    reader, writer = pty.openpty()
    told = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    with subprocess.Popen(command(*words), stdout=writer, stderr=writer, env=told, cwd=cwd) as process:
        os.close(writer)
        found = b""
        while True:
            try:
                some = os.read(reader, 4096)
            except OSError:
                break
            if not some:
                break
            found += some
        assert process.wait(60) == 0
    os.close(reader)
    return found.decode()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_terminal_shows_how_many_runs_have_ended_and_no_pipe_does(launcher: str, trace: Path, tmp_path: Path) -> None:
    words = ["-m", *A100, "+policy=lru", "residency=0.25,0.5,0.75", f"trace.path={trace}"]
    words += [f"hydra/launcher={launcher}", "hydra.sweep.dir=s"]
    sent = sent_to_terminal(words, tmp_path)
    for number in range(4):
        assert f"\r{number}/3 runs done" in sent
    # Each line of a run begins where the count has been taken away.
    assert sent.count("\x1b[Klru on a100") == 3
    assert "runs done" not in sent.replace("\r\n", "\n").splitlines()[-1].rpartition("\x1b[K")[2]
    found = run_there(words, tmp_path, tmp_path)
    assert (found.code, found.err, found.out.count("\n")) == (0, "", 4)
    assert "runs done" not in found.out


def test_the_count_says_how_long_it_may_still_take() -> None:
    count = Count(4)
    assert count.text(9.0) == "0/4 runs done"
    count.done = 3
    assert count.text(9.0) == "3/4 runs done, about 3 s left"
