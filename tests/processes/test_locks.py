"""One writer at a time, and locks that end with their owners."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from traces.messages import TraceError
from traces.processes import locks, whole
from traces.processes.locks import LOCK, locked, locked_folder

ROOT = Path(__file__).parents[2]
HOLDS = """
import sys, time
from pathlib import Path
from traces.processes.locks import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_threads_take_turns_and_the_file_goes(tmp_path: Path) -> None:
    inside, most, turns = 0, 0, 0

    def turn(_: int) -> None:
        nonlocal inside, most, turns
        with locked_folder(tmp_path, lambda line: None):
            inside += 1
            most = max(most, inside)
            time.sleep(0.001)
            turns += 1
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(turn, range(60)))
    assert (most, turns, list(tmp_path.iterdir())) == (1, 60, [])


def test_who_waits_says_for_whom_and_goes_on_when_that_one_is_killed(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    child = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    said: list[str] = []
    entered = threading.Event()

    def wait() -> None:
        with locked_folder(tmp_path, said.append):
            entered.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not entered.wait(0.1)
    assert said == [f"waiting: process {child.pid} is writing {tmp_path}"]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert entered.wait(10)
    waiting.join()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_killed_owner_left_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(f"{os.getpid()} elsewhere")
    said: list[str] = []
    with locked_folder(tmp_path, said.append):
        assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} ")
    assert (said, list(tmp_path.iterdir())) == ([], [])


def test_an_error_within_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), locked_folder(tmp_path):
        raise ValueError("mine")
    with locked_folder(tmp_path):
        pass


def test_where_there_are_no_locks_the_work_goes_on_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(whole.fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "_warned", [])
    for _ in range(2):
        with locked(tmp_path / "lock", "the table"):
            pass
    line = "warning: the table: no file locks here; do not write into it from two processes at once\n"
    assert capsys.readouterr().err == line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none" / LOCK, "it"):
        raise AssertionError


def test_a_pipe_of_the_locks_name_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(TraceError, match=r"/\.lock: lock: is a pipe or a device.*; remove it"), locked_folder(tmp_path):
        pass
