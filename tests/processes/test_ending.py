"""What a command says, leaves and returns that is told to stop; each in a process of its own, with no more loaded than
that needs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import simpy

from traces.processes import ending
from traces.processes.ending import Stopped, exit_code, keeping, stopped

ROOT = Path(__file__).parents[2]
HEAD = """
import os, signal, sys, time
from pathlib import Path
from traces.processes import ending
from traces.processes.ending import *
from traces.processes.whole import Unfinished
ending.begin()
def me(signum): os.kill(os.getpid(), signum)
def command(main):
    try:
        with keeping("half is kept: the same command goes on"):
            main()
        return 0
    except KeyboardInterrupt as error:
        return stopped(error)
"""
STOPS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")]


def ran(script: str, *words: str) -> tuple[int, str]:
    """Exit code and standard error."""
    found = subprocess.run(
        [sys.executable, "-c", HEAD + script, *words], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert found.stdout == ""
    return found.returncode, found.stderr


@pytest.mark.parametrize(("signum", "code", "word"), STOPS)
def test_one_line_says_what_is_kept(signum: int, code: int, word: str) -> None:
    found = ran(f"sys.exit(command(lambda: (me({int(signum)}), time.sleep(9))))")
    assert found == (code, f"{word}; half is kept: the same command goes on\n")


def test_outside_of_every_command_too() -> None:
    assert ran("me(15); time.sleep(9)") == (143, "terminated; nothing was written; give the same command again\n")


@pytest.mark.parametrize("what", ["class D:\n def __del__(self): me(15); time.sleep(0.1)\nD()", "import weakref\n"])
def test_a_signal_within_a_destructor_is_not_forgotten(what: str) -> None:
    if "weakref" in what:
        what += "class D: pass\nd = D()\nw = weakref.ref(d, lambda _: (me(15), time.sleep(0.1)))\ndel d"
    code, said = ran(what + "\ntime.sleep(9)")
    assert (code, said) == (143, "terminated; nothing was written; give the same command again\n")


def test_who_catches_it_ends_after_a_while_and_leaves_nothing_unfinished(tmp_path: Path) -> None:
    script = """
ending.GRACE_S = 0.2
unfinished = Unfinished(sys.argv[1] + "/file")
me(15)
while True:
    try: time.sleep(9)
    except BaseException: pass
"""
    assert ran(script, str(tmp_path))[0] == 143
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_forces() -> None:
    script = """
import threading
def main():
    threading.Timer(0.1, me, (2,)).start()
    while True:
        try: time.sleep(9)
        except BaseException: threading.Timer(0.1, me, (2,)).start()
sys.exit(command(main))
"""
    began = time.monotonic()
    assert ran(script) == (130, "interrupted; half is kept: the same command goes on\n")
    assert time.monotonic() - began < ending.GRACE_S


def test_the_innermost_sentence_is_said_and_may_be_made_when_it_is_wanted() -> None:
    script = """
def main():
    with keeping(lambda: "a third is kept"):
        me(15); time.sleep(9)
sys.exit(command(main))
"""
    assert ran(script) == (143, "terminated; a third is kept\n")


def test_what_nohup_ignores_stays_ignored() -> None:
    script = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{HEAD}\nme(1); print('on', file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (found.returncode, found.stderr) == (0, "on\n")


def test_after_the_end_a_signal_says_nothing() -> None:
    code, said = ran("import atexit\nending._let_go(list(WORDS))\nme(15); time.sleep(9)")
    assert (code, said) == (-signal.SIGTERM, "")


def test_within_a_simulation_it_stays_what_it_is() -> None:
    """SimPy makes an error anew that passes through a process."""
    env = simpy.Environment()

    def process() -> object:
        yield env.timeout(1)
        raise Stopped(signal.SIGTERM)

    env.process(process())
    with pytest.raises(Stopped, match="terminated by SIGTERM") as caught:
        env.run()
    assert exit_code(caught.value) == 143


def test_in_a_process_that_is_no_command_it_is_said_each_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Earlier tests may have run a command in this process.
    monkeypatch.setattr(ending, "_begun", [])
    monkeypatch.setattr(ending, "_told", [])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt) as caught, keeping("x" * 400):
            raise KeyboardInterrupt
        assert stopped(caught.value) == 130
        assert capsys.readouterr().err == ("interrupted; " + "x" * 400)[:300] + "\n"
