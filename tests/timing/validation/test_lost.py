"""A device that is lost while it is calibrated, by either command: exit code 3, one line, and what there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from replay import calibrate, validate
from replay.calibration import record
from replay.lost import DeviceLostError
from tests.timing.validation.test_folder import files, result

ROOT = Path(__file__).parents[3]
GONE = "error: the device was lost: {}; what was finished by then is kept\n"
WORDS = ["mine", "--machine", "cpu", "--quick", "--policies", "lru"]


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is lost in the first step of a calibration."""

    def gone(device: Any) -> None:
        raise DeviceLostError("gone")

    monkeypatch.setattr(record, "launch_costs", gone)


def test_a_calibration_whose_device_is_lost_writes_no_profile(
    lost: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hardware").mkdir()
    before = {"mine.yaml": b"there: 1\n", "mine.calibration.json": b"{}"}
    for name, content in before.items():
        (tmp_path / "hardware" / name).write_bytes(content)
    assert calibrate.main([*WORDS, "--config-dir", str(tmp_path)]) == 3
    said = capsys.readouterr()
    assert said.err == GONE.format("gone")
    assert "launches and waits" in said.out
    assert files(tmp_path / "hardware") == before
    assert not (tmp_path / "stack").exists()


def test_a_validation_whose_device_is_lost_while_calibrating_leaves_a_page_that_says_so(
    lost: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate.main([*WORDS, "--out", str(tmp_path)]) == 3
    said = capsys.readouterr()
    assert said.err == GONE.format("gone")
    assert "launches and waits" in said.out
    assert set(files(tmp_path)) == {"README.md", "summary.json", "provenance.json"}
    broke_off = "it broke off: before anything was measured: gone"
    assert f"- Not shown: {broke_off}." in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["not_shown"] == [broke_off, "nothing was compared"]
    assert validate.main([*WORDS, "--out", str(tmp_path)]) == 3


def test_a_result_of_before_outlives_a_calibration_that_breaks_off(
    lost: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = result(tmp_path)
    assert validate.main([*WORDS, "--out", str(tmp_path)]) == 3
    assert f"broke off before anything was measured; what {tmp_path} held before stays" in capsys.readouterr().out
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_profile_that_no_simulation_would_take_takes_the_place_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "memory_gb_per_s", lambda device: -1.0)
    before = result(tmp_path)
    assert validate.main([*WORDS, "--out", str(tmp_path)]) == 2
    assert "memory_gb_per_s" in capsys.readouterr().err
    assert files(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize(("command", "flag"), [("calibrate", "--config-dir"), ("validate", "--out")])
def test_an_error_of_cuda_that_torch_raises_in_a_calibration_is_a_lost_device(
    command: str, flag: str, tmp_path: Path
) -> None:
    """As it comes, from a call that nothing explains; in a process of its own, which ends without destructors."""
    code = f"""
import replay.calibration.record as record

def gone(device):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCompile with ...")

record.matrix_tflops = gone
from replay.{command} import main
raise SystemExit(main({[*WORDS, flag, str(tmp_path)]!r}))
"""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    text = "CUDA error: an illegal memory access was encountered"
    assert (done.returncode, done.stderr) == (3, GONE.format(text))
    assert "memory and matrices" in done.stdout
    assert not list(tmp_path.rglob("*.yaml"))
    assert not list(tmp_path.rglob("DONE"))
    if command == "validate":
        assert f"it broke off: before anything was measured: {text}." in (tmp_path / "README.md").read_text()
