"""What a long command shows meanwhile: one line on a terminal after two seconds, gone at the end; elsewhere nothing."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import ROOT
from traces.processes.progress import _Task, shown, text_of

PROGRAM = """
import sys, time
from traces.processes import progress
from traces.processes.streams import prepare_streams
prepare_streams()
progress.AFTER_S, progress._TICK_S = {after}, 0.05
done = 0
{before}
with progress.shown("counting sheep", lambda: done, 10):
    for done in range(10):
        time.sleep(0.1)
        if done == 5:
            print("half of them")
print("all of them")
"""


def on_terminal(tmp_path: Path, after: float = 0.2, before: str = "", **env: str) -> str:
    """What a terminal is sent by PROGRAM."""
    reader, writer = pty.openpty()
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(after=after, before=before), encoding="utf-8")
    told = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", **env}
    with subprocess.Popen([sys.executable, str(path)], stdout=writer, stderr=writer, env=told) as process:
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
        assert process.wait(30) == 0
    os.close(reader)
    return found.decode()


def screen(sent: str) -> list[str]:
    """The lines that are left to be read."""
    lines = []
    for line in sent.replace("\r\n", "\n").split("\n"):
        shown_now = ""
        for piece in line.split("\r"):
            text, is_erased, rest = piece.partition("\x1b[K")
            shown_now = text + rest if is_erased else text + shown_now[len(text) :]
        lines.append(shown_now)
    return lines


@pytest.mark.slow
def test_on_a_terminal_a_line_comes_counts_and_goes(tmp_path: Path) -> None:
    sent = on_terminal(tmp_path)
    assert "counting sheep: 40 %, 0 s, about " in sent
    assert [line for line in screen(sent) if line] == ["half of them", "all of them"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "before", "env"),
    [(9.0, "", {}), (0.2, "progress.never_here()", {}), (0.2, "", {"TERM": "dumb"})],
    ids=["short", "worker", "dumb"],
)
def test_there_is_no_line_for_what_is_short_or_shares_its_terminal(
    after: float, before: str, env: dict[str, str], tmp_path: Path
) -> None:
    assert "sheep" not in on_terminal(tmp_path, after, before, **env)


@pytest.mark.slow
def test_without_a_terminal_nothing_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(after=0.1, before=""), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=env, timeout=60)
    assert (found.stdout, found.stderr) == ("half of them\nall of them\n", "")


def test_the_line_says_what_how_far_and_how_long_still() -> None:
    outer = _Task("running lru", None, 0, 100.0)
    assert text_of([outer], now=107.0) == "running lru: 7 s"
    # 7 s for a quarter: 21 more.
    inner = _Task("", lambda: 25, 100, 101.0)
    assert text_of([outer, inner], now=107.0) == "running lru: 25 %, 7 s, about 21 s left"
    assert text_of([outer, _Task("", lambda: 1 / 0, 100, 101.0)], now=107.0) == "running lru: 0 %, 7 s"
    assert text_of([inner], now=107.0) == ""


def test_what_is_raised_within_passes_and_nothing_stays() -> None:
    from traces.processes import progress

    with pytest.raises(KeyError), shown("one"), shown("two"):
        raise KeyError
    assert progress._line.tasks == []
    start = time.monotonic()
    with shown("three"):
        pass
    assert time.monotonic() - start < 0.5
