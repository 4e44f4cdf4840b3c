"""A command's work stands wherever its lines go: closed, full, without a reader, or in a poor encoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = """
import sys
from traces.processes.ending import begin
begin()
print("10 µs → done")
print("warned: é", file=sys.stderr)
open(sys.argv[1], "w").write("result")
print("written")
"""
FULL = "error: stdout: what is printed is lost (the disk is full), files that are written stand; free space"


def ended(tail: str, path: Path, **env: str) -> tuple[int, str, str]:
    """Exit code and lines of the command above in a shell. tail: where its lines go, in the shell's words."""
    words = ["bash", "-c", f'"$@" {tail}; exit ${{PIPESTATUS[0]}}', "bash", sys.executable, "-c", COMMAND, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **env}
    found = subprocess.run(words, env=environment, capture_output=True, timeout=60)
    assert path.read_text() == "result"
    return found.returncode, found.stdout.decode(), found.stderr.decode("utf-8", "replace")


@pytest.mark.parametrize("tail", [">&-", "| true", "<&- >&-"])
def test_lines_that_nobody_reads_are_no_error(tail: str, tmp_path: Path) -> None:
    assert ended(tail, tmp_path / "file") == (0, "", "warned: é\n")


@pytest.mark.parametrize("tail", [">&- 2>&-", "> /dev/null 2> /dev/full"])
def test_nor_is_a_lost_warning(tail: str, tmp_path: Path) -> None:
    assert ended(tail, tmp_path / "file") == (0, "", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_said_once_and_in_the_exit_code(unbuffered: str, tmp_path: Path) -> None:
    code, _, said = ended("> /dev/full", tmp_path / "file", PYTHONUNBUFFERED=unbuffered)
    assert (code, said.count("error: "), said.count("\n")) == (1, 1, 2)
    assert FULL in said


@pytest.mark.parametrize(("encoding", "line"), [("ascii", b"10 ?s ? done"), ("cp1252", b"10 \xb5s ? done")])
def test_what_an_encoding_lacks_is_a_question_mark(encoding: str, line: bytes, tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    code, _, _ = ended(f"> {shown}", tmp_path / "file", PYTHONIOENCODING=encoding)
    assert (code, shown.read_bytes()) == (0, line + b"\nwritten\n")


@pytest.mark.slow
@pytest.mark.parametrize(("tail", "code"), [(">&-", 0), ("| true", 0), ("> /dev/full", 1)])
def test_a_run_is_done_whatever_becomes_of_its_report(tail: str, code: int, tmp_path: Path) -> None:
    words = ["+hardware=h100", "+policy=lru", "trace.num_tokens=8", "trace.num_requests=2", "compare=none"]
    line = f'"$@" {tail}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", line, "bash", sys.executable, "-m", "sim", *words, f"hydra.run.dir={tmp_path}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr.count("\n")) == (code, code)
    assert (tmp_path / "DONE").exists()
