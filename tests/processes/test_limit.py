"""`timeout_s`: a part that hangs is named, and the run ends without a result."""

from __future__ import annotations

import math
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertflow.keys import declared
from sim.job.keys import RunKeys
from sim.job.limit import RunTimeoutError, limited
from tests.processes.hung import Hung
from tests.support.commands import ROOT, Outcome, command, run_here, small_trace

MEND = "no result was written; mend the part, or raise timeout_s"
RUN = ("+policy=lru", "compare=none", "policy.order._target_=tests.processes.hung.Hung")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"trace.path={small_trace(tmp_path_factory.mktemp('traces') / 'small.safetensors', 8)}"


def in_thread(run: Callable[[], None]) -> None:
    """Run it in a thread; its error is raised here."""
    found: list[BaseException] = []

    def inner() -> None:
        try:
            run()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=inner)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    for error in found:
        raise error


def here(run: Callable[[], None]) -> None:
    run()


@pytest.mark.parametrize(("where", "how"), [(here, "loop"), (here, "sleep"), (in_thread, "loop")])
def test_class_and_hook_are_named_and_not_the_helper_that_hangs(where: Callable[..., None], how: str) -> None:
    def run() -> None:
        with limited(0.1):
            Hung(how, 0).arrange([1])

    began = time.monotonic()
    with pytest.raises(RunTimeoutError, match=rf"^timeout_s=0\.1: Hung\.arrange was running when .*; {MEND}$"):
        where(run)
    assert time.monotonic() - began < 2


def test_of_two_parts_the_inner_one_is_named() -> None:
    class Outer(Hung):
        def arrange(self, keys: Any) -> Any:
            return Hung("loop", 0).arrange(keys)

    with pytest.raises(RunTimeoutError, match=r"Hung\.arrange"), limited(0.05):
        Outer("never").arrange([1])


def test_a_run_that_is_slow_by_itself_blames_no_part() -> None:
    with pytest.raises(RunTimeoutError, match=r"no part was running .* raise timeout_s, or run less"), limited(0.05):
        time.sleep(5)


def test_a_part_that_catches_it_is_interrupted_again_and_what_tidies_up_is_not() -> None:
    tidied = []

    def run() -> None:
        try:
            _Twice("never").arrange([1])
        finally:
            time.sleep(0.7)
            tidied.append(True)

    with pytest.raises(RunTimeoutError, match=r"Twice\.arrange"), limited(0.05):
        run()
    assert tidied


class _Twice(Hung):
    def arrange(self, keys: Any) -> Any:
        try:
            time.sleep(5)
        except BaseException:
            time.sleep(5)


def test_in_time_nothing_happens_and_no_timer_is_left() -> None:
    threads = set(threading.enumerate())
    for limit in (None, 0.2):
        with limited(limit):
            pass
    time.sleep(0.3)
    # Of earlier tests one may have ended meanwhile.
    assert set(threading.enumerate()) <= threads
    with pytest.raises(ValueError, match="own"), limited(0.2):
        raise ValueError("own")


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1e8, True, "5", [5]])
def test_it_is_seconds_above_zero(value: object) -> None:
    key = declared(RunKeys)["timeout_s"]
    with pytest.raises(ValueError, match=r"^timeout_s=.* (is outside|must be a number in) \(0, 1e\+07\] s"):
        key.check(value)
    key.check(None)
    key.check(5)


def hung_run(trace: str, folder: Path, how: str, *words: str) -> Outcome:
    told = ["+hardware=a100", *RUN, f"+policy.order.how={how}", trace, "events=true", "timeline=true", *words]
    return run_here(told, folder)


@pytest.mark.slow
def test_a_run_ends_with_one_line_and_without_a_result(trace: str, tmp_path: Path) -> None:
    found = hung_run(trace, tmp_path / "run", "loop", "timeout_s=1.5")
    line = f"error: timeout_s=1.5: Hung.arrange was running when the time was up; {MEND}\n"
    assert (found.code, found.err) == (2, line)
    assert [path.name for path in found.folder.iterdir()] == [".hydra"]


@pytest.mark.slow
def test_the_limit_is_no_part_of_the_result(trace: str, tmp_path: Path) -> None:
    assert hung_run(trace, tmp_path / "run", "never").code == 0
    again = hung_run(trace, tmp_path / "run", "never", "skip_done=true", "timeout_s=100")
    assert "done before" in again.out


@pytest.mark.slow
def test_a_part_that_catches_everything_ends_its_process(trace: str, tmp_path: Path) -> None:
    words = ["+hardware=a100", *RUN, "+policy.order.how=stubborn", trace, "timeout_s=4", "events=true"]
    found = subprocess.run(
        command(*words, "hydra.run.dir=run"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    line = f"error: timeout_s=4: Hung.arrange was running when the time was up; {MEND}\n"
    assert (found.returncode, found.stderr) == (2, line)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".hydra", ".lock"}


@pytest.mark.slow
def test_in_a_sweep_the_others_finish(trace: str, tmp_path: Path) -> None:
    words = ["-m", "+hardware=a100", *RUN, "+policy.order.how=never,loop,sleep", trace, "timeout_s=4"]
    found = subprocess.run(
        command(*words, "residency=0.3,0.5", "hydra.sweep.dir=sweep"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 2
    *runs, last = found.stderr.splitlines()
    assert len([line for line in runs if "timeout_s=4: Hung.arrange was running" in line]) == 4
    assert last.startswith("error: 4 of 6 runs failed: the other 2 are kept in sweep; mend that, then the same command")
    assert "Traceback" not in found.stderr
    done = sorted(path.parent.name for path in (tmp_path / "sweep").rglob("DONE"))
    assert len(done) == 2
    assert all("how=never" in name for name in done)


@pytest.mark.slow
def test_in_a_replay_no_thread_is_left(trace: str, tmp_path: Path) -> None:
    from tests.support.replays import replay_here

    before = set(threading.enumerate())
    words = ["+hardware=local", *RUN, "+policy.order.how=loop", trace, "machine=cpu", "scale=64", "timeout_s=3"]
    found = replay_here([*words, "log=true"], tmp_path / "run")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert "Hung.arrange was running" in found.err
    assert set(threading.enumerate()) <= before
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".hydra"]
