"""What a calibration or a validation refuses, before minutes are spent and before anything is overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertflow.core import described
from replay.bench_host import main as bench_host
from replay.calibrate import check_free
from replay.calibrate import main as calibrate
from replay.calibration.record import load_record, write_profile
from replay.validate import main as validate
from sim.job.configure import configure
from sim.job.setup import make_workload
from sim.paths import CONF
from tests.timing.validation.test_profile import record


def whole() -> dict[str, Any]:
    """A record as a calibration writes it now."""
    raw = record() | {"python_loop_ns": [1, 2]}
    raw["link"] = raw["link"][:11]
    return raw


def written(tmp_path: Path, raw: Any) -> Path:
    path = tmp_path / "mine.calibration.json"
    path.write_text(json.dumps(raw))
    return path


def test_a_whole_record_is_taken(tmp_path: Path) -> None:
    assert load_record(written(tmp_path, whole()), 1)["format"] == "expertflow-calibration"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("chunk_ns", None),
        ("kernels", None),
        ("python_loop_ns", None),
        ("host", {}),
        ("link", {}),
        ("beside", {}),
        ("link_peak_gb_per_s", "x"),
        ("memory_gb_per_s", -1),
        ("pad_share", 1e6),
        ("matrix_tflops", "fast"),
        ("link", [{"bytes": 1}]),
    ],
)
def test_a_damaged_or_old_record_is_named(tmp_path: Path, key: str, value: Any) -> None:
    raw = whole()
    if value is None:
        del raw[key]
    else:
        raw[key] = value
    path = written(tmp_path, raw)
    with pytest.raises(ValueError, match=r"calibrate again") as caught:
        load_record(path, 1)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    raw = whole()
    del raw["version"]
    with pytest.raises(ValueError, match=r"is a record of version 1, this program writes 2; write one with") as caught:
        load_record(written(tmp_path, raw), 1)
    assert "\n" not in str(caught.value)


def test_a_record_of_another_core_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host took another time. One of before, which does not say, is taken."""
    path = written(tmp_path, whole() | {"core": described()})
    assert load_record(path, 1)["core"] == described()
    monkeypatch.setattr("replay.calibration.record.described", lambda: "another core")
    with pytest.raises(ValueError, match=r"this run has another core, .* calibrate again, or choose by") as caught:
        load_record(path, 1)
    assert repr(described()) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "core" not in load_record(written(tmp_path, whole()), 1)


def test_a_profile_that_no_simulation_would_take_is_not_written(tmp_path: Path) -> None:
    raw = record() | {"memory_gb_per_s": -1.0}
    with pytest.raises(ValueError, match="memory_gb_per_s"):
        write_profile(raw, "mine", tmp_path)
    assert not list(tmp_path.rglob("*.yaml"))


@pytest.mark.parametrize("name", ["a100", "h200", "eager", "graph", "found"])
def test_a_shipped_profile_is_never_overwritten(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in CONF.rglob("*.yaml")}
    assert calibrate([name, "--machine", "cpu", "--quick"]) == 2
    assert f"{name}-measured" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in CONF.rglob("*.yaml")} == before


def test_ones_own_profile_is_measured_again(tmp_path: Path) -> None:
    write_profile(record(), "mine", tmp_path)
    check_free("mine", tmp_path)
    (tmp_path / "hardware" / "mine.calibration.json").unlink()
    with pytest.raises(ValueError, match="would be overwritten"):
        check_free("mine", tmp_path)


def code_of(command: Callable[[list[str]], int], words: list[str]) -> int | str | None:
    """Its exit code, also where its flags are refused."""
    try:
        return command(words)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    "words",
    [
        ["--minutes", "nan"],
        ["--minutes", "inf"],
        ["--minutes", "-1"],
        ["--residency", "2"],
        ["--residency", "0.5,0"],
        ["--batch-sizes", "0"],
        ["--trace", "nowhere.safetensors"],
        ["--policies", ""],
        ["--throttle", "-3"],
        ["--throttle", "0"],
        ["--throttle", "2", "--hardware", "h100"],
        ["--quick", "--calibration", "there.json"],
    ],
)
def test_arguments_are_looked_at_first(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(validate, ["mine", "--machine", "cpu", *words, "--out", str(tmp_path / "out")]) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert "calibrating" not in found.out


def test_a_profile_of_smaller_widths_is_not_taken_for_the_models() -> None:
    cfg = configure(["+hardware=a100", "+policy=lru", "compare=none"])
    table = {"expert": [[1, 10]], "head": [[1, 10]], "attention": [[1, 10]], "kv": 0.0}
    hardware = yaml.safe_load((CONF / "hardware" / "a100.yaml").read_text())
    small = {**cfg, "hardware": {**hardware, "name": "mine", "kernel_ns": {"gpt-oss-20b/16": table}}}
    with pytest.raises(ValueError, match="hardware=mine was measured with gpt-oss-20b/16"):
        make_workload(small)
    both = {"gpt-oss-20b/16": table, "gpt-oss-20b": table}
    assert make_workload({**cfg, "hardware": {**hardware, "kernel_ns": both}}).model.name == "gpt-oss-20b"


@pytest.mark.parametrize("words", [["--repeat", "0"], ["--tokens", "0"]])
def test_bench_host_wants_something_to_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(bench_host, words) == 2
    assert "0 must be a whole number in [1, " in capsys.readouterr().err
