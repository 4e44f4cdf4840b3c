"""Files of a user's own in the current folder that are called like our packages: they stand in nobody's way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT, small_trace

CONSOLE = "import sys; from sim.console import main; sys.argv[0] = 'expertflow'; sys.exit(main())"
PART = "from expertflow.evictions.lru import LRU\n\n\nclass Mine(LRU):\n    pass\n"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Started in `folder`; of an installed command the first entry of the path is that of the command."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_trace(tmp_path / "t.safetensors")
    (tmp_path / "mine.py").write_text(PART, encoding="utf-8")
    return tmp_path


SIM = (
    "+hardware=a100",
    "+policy=lru",
    "policy.eviction._target_=mine.Mine",
    "trace.path=t.safetensors",
    "compare=none",
)


@pytest.mark.slow
def test_a_folder_called_traces_and_a_file_called_expertflow_do_not_shadow_ours(folder: Path) -> None:
    (folder / "traces").mkdir()
    (folder / "traces" / "__init__.py").write_text("raise RuntimeError('not ours')\n", encoding="utf-8")
    (folder / "expertflow.py").write_text("raise RuntimeError('not ours')\n", encoding="utf-8")
    found = run(folder, "-m", "sim", *SIM, "hydra.run.dir=run")
    assert (found.returncode, found.stderr) == (0, "")
    assert (folder / "run" / "DONE").exists()


@pytest.mark.slow
def test_the_console_command_runs_beside_a_sim_py_also_in_worker_processes(folder: Path) -> None:
    for name in ("sim.py", "traces.py", "replay.py"):
        (folder / name).write_text("raise RuntimeError('not ours')\n", encoding="utf-8")
    # As the script of an installation has it: its own folder first on the path.
    (folder / "bin").mkdir()
    script = folder / "bin" / "expertflow"
    script.write_text(CONSOLE, encoding="utf-8")
    words = ["sim", "-m", *SIM, "residency=0.5,1.0", "hydra.sweep.dir=sweep", "hydra.launcher.n_jobs=2"]
    found = run(folder, str(script), *words)
    assert (found.returncode, found.stderr) == (0, "")
    assert len(list(folder.glob("sweep/*/DONE"))) == 2
    assert found.stdout.splitlines()[-1] == "written to sweep; python -m sim.collect sweep makes one table of the runs"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that takes nothing on this system")
@pytest.mark.parametrize("launcher", ["joblib", "basic"])
def test_a_sweep_whose_lines_are_lost_ends_with_1_and_keeps_its_runs(launcher: str, folder: Path) -> None:
    words = ["-m", "sim", "-m", *SIM, "residency=0.5,1.0", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        told = [sys.executable, *words]
        found = subprocess.run(told, cwd=folder, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert found.returncode == 1
    assert "stdout: what is printed is lost (the disk is full)" in found.stderr
    assert len(list(folder.glob("sweep/*/DONE"))) == 2
