"""How a process ends whose device is lost: written out, exit code 3, nothing taken down. In processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from replay.lockstep.compare import check
from replay.lost import LOST, DeviceLostError, beyond_repair, loss
from replay.run import PartialRunError

ROOT = Path(__file__).parents[2]
HEAD = """
import atexit, logging.handlers, os, sys
from replay import lost
from replay.lost import DeviceLostError

class Pinned:
    \"\"\"Like a pinned tensor on a lost device: whoever throws it away ends the process.\"\"\"
    def __del__(self):
        os.abort()

pinned = Pinned()
GONE = "CUDA error: an illegal memory access was encountered"

def lose(text=GONE):
    tensor = Pinned()
    raise DeviceLostError(text)
"""
GPU = """
def device_finds_out():
    tensor = Pinned()
    error = DeviceLostError(GONE)
    lost.found_lost(error)
    raise error
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` behind the stand-ins, in `folder`, its output into pipes, which Python buffers."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", HEAD + GPU + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env=environment,
    )


@pytest.mark.slow
def test_the_stand_in_aborts_where_nothing_is_done_about_it(tmp_path: Path) -> None:
    assert python("sys.exit(3)", tmp_path).returncode == -6


ENDINGS = {
    "caught, and an exit code of its own": """
try:
    device_finds_out()
except DeviceLostError as error:
    print(error)
    sys.exit(3)
""",
    "caught in a function that returns": """
def run():
    held = Pinned()
    try:
        device_finds_out()
    except DeviceLostError as error:
        print(error)
        os.write(2, b"handled ")
run()
""",
    "not caught": """
print(GONE)
device_finds_out()
""",
    "as a command": """
from sim.job.run_cli import run_cli
def main():
    held = Pinned()
    print(GONE)
    lose()
sys.exit(run_cli(main, "nothing"))
""",
    "by the context manager": """
print(GONE)
with lost.ending():
    lose()
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("code", ENDINGS.values(), ids=ENDINGS)
def test_nothing_is_taken_down_and_what_was_printed_arrives(code: str, tmp_path: Path) -> None:
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout) == (LOST, "CUDA error: an illegal memory access was encountered\n"), done


@pytest.mark.slow
def test_files_logging_and_logs_of_runs_are_written_first(tmp_path: Path) -> None:
    code = """
logging.basicConfig(filename="app.log", level="INFO")
handler = logging.handlers.MemoryHandler(99, target=logging.getLogger().handlers[0])
logging.getLogger("mine").addHandler(handler)
logging.getLogger("mine").propagate = False
logging.getLogger("mine").info("held back")
file = open("mine.txt", "w")
file.write("not flushed")

class Log:
    def close(self):
        open("log", "w").write("readable")
log = Log()
lost.close_at_end(log)
with lost.ending():
    lose()
"""
    done = python(code, tmp_path)
    assert done.returncode == LOST, done.stderr
    assert done.stderr == (
        "error: the device was lost: CUDA error: an illegal memory access was encountered; what was "
        "finished by then is kept\n"
    )
    assert (tmp_path / "mine.txt").read_text() == "not flushed"
    assert (tmp_path / "log").read_text() == "readable"
    assert "held back" in (tmp_path / "app.log").read_text()


@pytest.mark.slow
def test_a_replay_that_loses_its_gpu_leaves_what_was_measured(tmp_path: Path) -> None:
    """On the CPU machine, with a fault that says what a GPU would say."""
    code = """
import replay.machine.faults
from pathlib import Path
from replay.command import cli
from tests.support.commands import tiny_trace
from tests.support.replays import TINY
trace = tiny_trace(Path("tiny.safetensors"), 24)
replay.machine.faults.DeviceLostError = lambda text: DeviceLostError(GONE)
Path("run").mkdir()
Path("run/DONE").write_text("an earlier run")
sys.argv = ["replay", *TINY, "+policy=lru", "residency=0.1", f"trace.path={trace}", "log=true", "fault=lost",
            "fault_at=40", "hydra.run.dir=run"]
print("held back")
sys.exit(cli())
"""
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout) == (LOST, "held back\n"), done.stderr
    assert "the device was lost: CUDA error: an illegal memory access was encountered" in done.stderr
    assert json.loads((tmp_path / "run" / "partial.json").read_text())["num_forwards"] > 0
    result = check(tmp_path / "run", [f"trace.path={tmp_path / 'tiny.safetensors'}"])
    assert (result.difference, result.partial is None) == (None, False)
    assert not {"DONE", "metrics.json"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["fault=lost: the device stopped answering, as asked", "a stream of the CPU machine failed: division by zero"],
)
def test_a_process_that_can_end_as_ever_does(text: str, tmp_path: Path) -> None:
    """A fault that was asked for, or a thread that failed: exit code 3, handlers and destructors run."""
    code = f"""
atexit.register(lambda: os.write(1, b"handler "))
lost.found_lost(DeviceLostError({text!r}))
Pinned.__del__ = lambda self: os.write(1, b"destructor ")
from sim.job.run_cli import run_cli
sys.exit(run_cli(lambda: lose({text!r}), "nothing"))
"""
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout.split()[0]) == (LOST, "destructor"), done
    assert "handler" in done.stdout
    assert done.stderr.startswith(f"error: the device was lost: {text}")


def test_other_errors_end_as_before(tmp_path: Path) -> None:
    code = """
Pinned.__del__ = lambda self: None
from sim.job.run_cli import run_cli
def main():
    raise ValueError("key=1 is wrong")
assert run_cli(main, "nothing") == 2
try:
    with lost.ending():
        main()
except ValueError:
    print("passed on")
"""
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "passed on\n", "error: key=1 is wrong\n")


def test_which_errors_are_losses() -> None:
    real = DeviceLostError("the GPU has not answered for 60 s")
    asked = DeviceLostError("fault=lost: the device stopped answering, as asked")
    partial = PartialRunError(str(real), {})
    partial.__cause__ = real
    assert (loss(real), loss(partial), loss(asked)) == (real, real, asked)
    assert (loss(ValueError("x")), loss(PartialRunError("alone", {})), loss(None)) == (None, None, None)
    assert (beyond_repair(real), beyond_repair(partial), beyond_repair(asked)) == (True, True, False)
