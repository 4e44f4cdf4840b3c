"""Without torch, which a plain installation lacks: help is there, and a command that needs it says so in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sim.console import COMMANDS
from tests.support.commands import ROOT, small_trace
from traces.cli import DELEGATED

HIDDEN = (
    "import runpy, sys; sys.modules['torch'] = None; module = sys.argv[1]; del sys.argv[1]; "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)
LARGE = (
    "on Linux torch brings CUDA, several GB: without a GPU run before it pip install torch "
    "--index-url https://download.pytorch.org/whl/cpu"
)
NEEDING = {
    "replay": ["+hardware=local", "+policy=lru"],
    "replay.validate": ["mine"],
    "replay.calibrate": ["mine", "--config-dir", "own"],
    "replay.bench_host": [],
}


def without_torch(module: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    (cwd / "own").mkdir(exist_ok=True)
    path = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(cwd)}
    told = [sys.executable, "-c", HIDDEN, module, *words]
    return subprocess.run(told, cwd=cwd, env=path, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(NEEDING))
def test_a_command_says_that_it_needs_torch(module: str, tmp_path: Path) -> None:
    found = without_torch(module, *NEEDING[module], cwd=tmp_path)
    told = f"error: python -m {module} needs torch; install it: pip install 'expertflow[replay]'; {LARGE}\n"
    assert (found.returncode, found.stderr, found.stdout) == (2, told, "")
    assert len(told) <= 301


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(NEEDING))
def test_help_needs_no_torch(module: str, tmp_path: Path) -> None:
    found = without_torch(module, "--help", cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert f"python -m {module}" in found.stdout


MODULES = sorted(dict.fromkeys(module for module, _ in COMMANDS.values()))
SUB_COMMANDS = [
    *(f"traces {name}" for name in ("validate", "import", *DELEGATED)),
    "traces.twin train",
    "traces.twin ship",
]


@pytest.mark.slow
@pytest.mark.parametrize("words", [*MODULES, *SUB_COMMANDS])
def test_every_command_has_help_without_torch(words: str, tmp_path: Path) -> None:
    found = without_torch(*words.split(), "--help", cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert "usage: python -m" in found.stdout


FIT = "fit-predictor"


@pytest.mark.slow
def test_fitting_needs_torch_only_for_the_kind_that_does(tmp_path: Path) -> None:
    small_trace(tmp_path / "train.safetensors")
    words = (FIT, "train.safetensors", "out.safetensors")
    listed = without_torch("traces", FIT, "--help", cwd=tmp_path)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "kind=hybrid epochs=" in listed.stdout
    found = without_torch("traces", *words, "kind=hybrid", cwd=tmp_path)
    told = f"error: kind=hybrid needs torch; install it: pip install 'expertflow[fit]'; {LARGE}\n"
    assert (found.returncode, found.stderr) == (2, told)
    found = without_torch("traces", *words, "kind=transition", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out.safetensors").is_file()
