"""The core compiled and as it is written: which of the two runs, and that the results are the same to the byte."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from expertflow import core
from expertflow.network import compiled_functions
from sim.bench import TRACE
from sim.job.decided import code_that_ran
from tests.cli.wheels import ROOT, build_wheel, copy_checkout

TELL = "import expertflow.core; print(expertflow.core.described())"
PURE, COMPILED = "core in pure Python", "compiled core"


def start(root: Path, compiled: str | None, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in the checkout at `root`, where EXPERTFLOW_COMPILED is so."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for name in (core.SWITCH, "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    if compiled is not None:
        environment[core.SWITCH] = compiled
    return subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=580
    )


# -- which of the two runs -------------------------------------------------------------------------------------------


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A checkout whose core looks as if it was compiled. None of it is loaded here."""
    for name in ("expertflow.__init__", "expertflow.core", *core.MODULES):
        path = core.source_of(name, tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(core.source_of(name).read_bytes())
    for name in (core.LIBRARY, *core.MODULES):
        path = core.file_of(name, tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "expertflow" / "_core" / core.SOURCES).write_text(json.dumps(core.hashes(tmp_path)))
    return tmp_path


@pytest.mark.parametrize(("wanted", "runs"), [(None, COMPILED), ("", COMPILED), ("1", COMPILED), ("0", PURE)])
def test_the_environment_chooses(wanted: str | None, runs: str, told: Path) -> None:
    done = start(told, wanted, "-c", TELL)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{runs}\n", "")


@pytest.mark.parametrize("name", [core.LIBRARY, "expertflow.runtime"])
def test_what_was_not_compiled_whole_does_not_run(name: str, told: Path) -> None:
    core.file_of(name, told).unlink()
    done = start(told, None, "-c", TELL)
    assert (done.stdout, done.stderr) == (f"{PURE}\n", "")
    refused = start(told, "1", "-c", TELL)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: EXPERTFLOW_COMPILED=1, but the core was not compiled for this Python; ")
    assert refused.stderr.count("\n") == 1


def test_what_was_compiled_of_other_sources_does_not_run_and_says_so_once(told: Path) -> None:
    with core.source_of("expertflow.slots", told).open("a") as file:
        file.write("# changed\n")
    again = f"{TELL}; import subprocess, sys; subprocess.run([sys.executable, '-c', {TELL!r}])"
    done = start(told, None, "-u", "-c", again)
    assert done.stdout == f"{PURE}\n" * 2
    line = "warning: expertflow/slots.py is not what was compiled, so that pure Python runs; build it again"
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) <= 300
    assert start(told, "0", "-c", TELL).stderr == ""
    refused = start(told, "1", "-c", TELL)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: EXPERTFLOW_COMPILED=1, but expertflow/slots.py is not what was compiled; ")


@pytest.mark.parametrize("text", ["", "[]", "{}", None])
def test_nothing_is_compiled_of_what_nobody_recorded(text: str | None, told: Path) -> None:
    path = told / "expertflow" / "_core" / core.SOURCES
    path.unlink()
    if text is not None:
        path.write_text(text)
    done = start(told, None, "-c", TELL)
    assert done.stdout == f"{PURE}\n"
    assert done.stderr.startswith("warning: expertflow/")


def test_another_word_is_refused(told: Path) -> None:
    done = start(told, "yes", "-c", TELL)
    assert done.returncode == 2
    assert done.stderr == (
        "error: EXPERTFLOW_COMPILED='yes' is unknown; choose 0 for pure Python, 1 for the compiled core, or unset it\n"
    )


def test_both_entry_points_tell_which_runs() -> None:
    for words in (["-m", "sim", "--version"], ["-m", "sim.console", "--version"]):
        done = start(ROOT, "0", *words)
        assert done.returncode == 0
        assert done.stdout.endswith(f", {PURE}\n")


def test_a_module_of_the_core_counts_by_its_source_however_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for a compiled module: what one DONE says is good for both."""
    importlib.import_module("expertflow.runtime")
    monkeypatch.setattr(sys.modules["expertflow.slots"], "__file__", str(core.file_of("expertflow.slots")))
    found = code_that_ran({"expertflow.runtime"})
    assert {core.source_of(name).relative_to(ROOT).as_posix() for name in core.MODULES[:10]} <= set(found)
    assert all(name.endswith(".py") for name in found)


# -- what a build makes ----------------------------------------------------------------------------------------------

ASK = "import build_backend as b; print(b.get_requires_for_build_wheel(), b.get_requires_for_build_editable())"


@pytest.mark.parametrize(
    ("wanted", "compiler", "wheel", "editable"),
    [
        ("0", "cc", False, False),
        ("1", "no-such-compiler", True, True),
        (None, "no-such-compiler", False, False),
        (None, sys.executable, True, False),
    ],
)
def test_mypy_is_needed_where_it_is_used(
    wanted: str | None, compiler: str, wheel: bool, editable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    for name in ("build_backend.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "expertflow").mkdir()
    (tmp_path / "expertflow" / "core.py").write_bytes((ROOT / "expertflow" / "core.py").read_bytes())
    done = start(tmp_path, wanted, "-c", ASK)
    assert done.returncode == 0, done.stderr
    of_wheel, of_editable = done.stdout.splitlines()[-1].split("] [")
    assert ("mypy" in of_wheel, "mypy" in of_editable) == (wheel, editable)


FLAGS = re.MULTILINE | re.DOTALL
TRY = "import build_backend; print(build_backend.try_compile())"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "why"), [("no-such-compiler", "there is no C compiler"), ("false", "mypyc or the C compiler failed")]
)
def test_what_cannot_be_compiled_stays_pure_python(
    compiler: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_checkout(tmp_path)
    # One module fails as all of them do, and takes a tenth of the time.
    path = tmp_path / "expertflow" / "core.py"
    text, number = re.subn(r"^MODULES = \(.*?^\)", 'MODULES = ("expertflow.counters",)', path.read_text(), flags=FLAGS)
    assert number == 1
    path.write_text(text)
    monkeypatch.setenv("CC", compiler)
    done = start(tmp_path, None, "-c", TRY)
    assert done.returncode == 0, done.stderr
    assert f"expertflow: the core was not compiled and stays pure Python: {why}" in done.stdout
    assert done.stdout.endswith("False\n")
    assert start(tmp_path, None, "-c", TELL).stdout == f"{PURE}\n"


def test_a_build_that_must_be_compiled_and_cannot_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    refused = start(ROOT, "1", "-c", TRY)
    assert refused.returncode == 1
    assert refused.stderr == "error: EXPERTFLOW_COMPILED=1, but the core was not compiled: there is no C compiler\n"


# -- both ways -------------------------------------------------------------------------------------------------------

needs_a_compiler = pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import build_backend, sys; sys.exit(not build_backend.has_c_compiler())"], cwd=ROOT
    ).returncode
    != 0,
    reason="there is no C compiler",
)

JOBS = {
    "lru": ["+hardware=a100", "+policy=lru"],
    "adaptive": ["+hardware=a100", "+policy=adaptive", "residency=0.3", "compare=none"],
    "batch": ["+hardware=h20", "+policy=two_level", "batch_size=4", "prefill_chunk=32", "compare=none"],
    "host": [
        "+hardware=gh200",
        "+policy=oracle",
        "stack=graph",
        "+stack.classify_ns=3000",
        "+stack.copy_start_ns=2000",
        "hardware.link_slowdown=1.4",
        "compare=floor",
    ],
    "serial": ["+hardware=a6000", "+policy=hf_offload", "compare=none"],
    "places": ["+hardware=a6000", "+host=desktop", "+policy=fixed_1", "+policy/place=balanced", "compare=floor"],
    "pinned": ["+hardware=a100", "+policy=lru", "start=pinned", "policy.transfer.staging_slots=4", "compare=none"],
    "bench": ["+hardware=a100", "+policy=lru", "compare=none", "chunk_mib=64", *TRACE],
    "mine": ["+hardware=a100", "+policy=lru", "policy.eviction._target_=mine.Mine", "compare=none"],
}
MINE = """from expertflow.core import is_compiled
from expertflow.evictions.lru import LRU
from expertflow.observer import Observer
from expertflow.parts import DEMAND
from sim.machine.host_bound import HostBoundMachine
from sim.machine.simulated import SimMachine


class Mine(LRU):
    def victim(self, key, cause):
        found = super().victim(key, cause)
        return found if cause == DEMAND or key % 3 else None


class Watching(Observer):
    def __init__(self):
        self.seen = []

    def stalled(self, start_ns, end_ns, key, kind):
        self.seen.append((start_ns, end_ns, key, kind))

    def horizon(self, now_ns, distances):
        self.seen.append((now_ns, distances))


def late(kind):
    class Late(kind):
        def copy(self, load, chunk, key, slot, num_bytes, after):
            self.now_ns += 777
            self.num_copies = getattr(self, "num_copies", 0) + 1
            super().copy(load, chunk, key, slot, num_bytes, after)

    return Late
"""
SCRIPT = """import json, sys
import mine
import sim.machine.run as run
from sim.job.configure import configure
from sim.job.setup import make_policy, make_workload

made = []
for kind in (mine.SimMachine, mine.HostBoundMachine):
    late = mine.late(kind)
    run.machine_for = lambda *given: made.append(late(*given)) or made[-1]
    watching = mine.Watching()
    cfg = configure(["+hardware=a100", "+policy=adaptive", "max_tokens=40", "compare=none"])
    work = make_workload(cfg)
    policy, transfer = make_policy(cfg["policy"], work, cfg["seed"])
    print(json.dumps(run.run_policy(work, policy, transfer, [watching])))
    print(made[-1].num_copies, watching.seen)
"""

EACH = """import json, sys
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from sim.app import cli

for name, words in json.loads(sys.argv[1]).items():
    sys.argv = ["sim", *words]
    print("ended:", name, cli())
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
"""
COMPARE = """import sys
from pathlib import Path
from replay.lockstep.compare import check

for path in sys.argv[1:]:
    found = check(Path(path))
    print(found.num_forwards, found.num_decisions, found.partial, found.difference)
"""


TEST = """import sys
import expertflow.core
import pytest

code = pytest.main(sys.argv[1:])
print(expertflow.core.described())
print(sys.modules["replay.machine.real"].__spec__.origin)
sys.exit(code)
"""
"""The tests of this checkout, of the packages beside the `expertflow` that is imported first."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the compiled core of a wheel that was built of it, and parts of a user's own."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    compiled_functions()  # so that numba, where it is installed, has kept what all jobs need
    copy_checkout(copy, with_kernels=True)
    wheel = build_wheel(copy, out, compiled="1")
    assert not (copy / "expertflow" / "_core").exists()
    with zipfile.ZipFile(wheel) as packed:
        compiled = [name for name in packed.namelist() if name.startswith("expertflow/_core/")]
        packed.extractall(copy, compiled)
        assert len(compiled) == len(core.MODULES) + 2
        tops = {name.partition("/")[0] for name in packed.namelist() if ".dist-info/" not in name}
    assert tops == {"expertflow", "sim", "replay", "traces"}
    assert not wheel.name.endswith("-none-any.whl")
    assert wheel.stat().st_size <= 9e6
    (copy / "mine.py").write_text(MINE)
    (copy / "script.py").write_text(SCRIPT)
    return copy


def run(root: Path, compiled: str, *words: str) -> str:
    """Output of Python in the checkout; it must succeed and warn of nothing."""
    done = start(root, compiled, *words)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "warning" not in done.stderr
    return done.stdout


@needs_a_compiler
@pytest.mark.slow
def test_it_says_which_runs(both: Path) -> None:
    assert run(both, "1", "-m", "sim", "--version").endswith(f", {COMPILED}\n")
    assert run(both, "0", "-m", "sim", "--version").endswith(f", {PURE}\n")
    # All of it, whichever module is asked for first.
    for name in ("expertflow.view", "expertflow.runtime", "sim.machine.host_bound", "replay.machine.real"):
        told = run(
            both,
            "1",
            "-c",
            f"import sys, {name}; print(*(sys.modules[one].__spec__.origin for one in sys.argv[1:]))",
            name,
        )
        assert told.strip() == str(core.file_of(name, both))


@pytest.fixture(scope="module")
def jobs(both: Path) -> Path:
    """The folder with what each job wrote, pure and compiled: all of them in one process each, which has to load numba
    and its like but once."""
    more = ["max_tokens=40", "timeline=true", "events=true"]
    for compiled in ("0", "1"):
        told = {name: [*words, *more, f"hydra.run.dir=out/{name}/{compiled}"] for name, words in JOBS.items()}
        done = run(both, compiled, "-c", EACH, json.dumps(told))
        assert [line for line in done.splitlines() if line.startswith("ended: ")] == [
            f"ended: {name} 0" for name in JOBS
        ]
    return both / "out"


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_file_of_a_job_is_the_same(name: str, jobs: Path) -> None:
    pure, other = jobs / name / "0", jobs / name / "1"
    for file in ("metrics.json", "timeline.json", "events.parquet", "DONE"):
        assert (pure / file).read_bytes() == (other / file).read_bytes(), file
    ran = [json.loads((folder / "provenance.json").read_text())["core"] for folder in (pure, other)]
    assert ran == [PURE, COMPILED]


@needs_a_compiler
@pytest.mark.slow
def test_what_one_has_finished_the_other_need_not_repeat(both: Path) -> None:
    words = ["-m", "sim", *JOBS["mine"], "max_tokens=4", "skip_done=true", "hydra.run.dir=finished"]
    assert not run(both, "1", *words).startswith("done before")
    assert run(both, "0", *words).startswith("done before")


@needs_a_compiler
@pytest.mark.slow
def test_pinned_runs_and_stored_logs_are_the_same_compiled(both: Path) -> None:
    checked = run(both, "1", "-m", "sim.regress", "check", str(ROOT / "tests" / "golden" / "runs.json"))
    assert checked.endswith("15 of 15 runs identical\n")
    logs = sorted(str(path) for path in (ROOT / "tests" / "lockstep" / "stored").glob("*.parquet"))
    assert logs
    lines = run(both, "1", "-c", COMPARE, *logs)
    assert lines == run(both, "0", "-c", COMPARE, *logs)
    assert lines.count("None\n") == len(logs)


@needs_a_compiler
@pytest.mark.slow
def test_observers_and_machines_of_ones_own_see_the_same(both: Path) -> None:
    pure = run(both, "0", "script.py")
    assert pure.count("\n") == 4
    assert run(both, "1", "script.py") == pure


@needs_a_compiler
@pytest.mark.slow
def test_the_replay_passes_its_tests_compiled(both: Path) -> None:
    """Records, rows, launches ahead, the clock, whole replays on a stand-in for CUDA and on the CPU."""
    names = ["ahead", "machine", "probe", "records", "rows"]
    files = [*(f"replay/test_{name}.py" for name in names), "gpu/test_clock.py", "gpu/test_replay.py"]
    words = ["-q", "-p", "no:cacheprovider", "-m", "not slow", *(str(ROOT / "tests" / name) for name in files)]
    told = run(both, "1", "-c", TEST, *words)
    assert told.splitlines()[-2:] == [COMPILED, str(core.file_of("replay.machine.real", both))]
    assert re.search(r"^1[0-9]{2} passed", told, re.MULTILINE)


@needs_a_compiler
@pytest.mark.slow
def test_the_processes_of_a_sweep_run_what_was_chosen(both: Path) -> None:
    tables = []
    for compiled, ran in (("0", PURE), ("1", COMPILED)):
        words = [
            "+hardware=a100,h20",
            "+policy=lru,adaptive",
            "max_tokens=8",
            "compare=none",
            "hydra.launcher.n_jobs=2",
        ]
        run(both, compiled, "-m", "sim", "-m", *words, f"hydra.sweep.dir=sweep{compiled}")
        run(both, compiled, "-m", "sim.collect", f"sweep{compiled}")
        folder = both / f"sweep{compiled}"
        told = [json.loads(path.read_text())["core"] for path in folder.rglob("provenance.json")]
        assert told == [ran] * 4
        tables.append({path.parent.name: path.read_bytes() for path in folder.rglob("metrics.json")})
    assert tables[0] == tables[1]
    assert len(tables[0]) == 4
