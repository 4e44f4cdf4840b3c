"""What a study tells of what it lacks and of what failed: all of it, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.study import plan
from sim.study.cells import plan_jobs, run_jobs
from sim.study.plan import Cell, cells, load_study, read_study
from tests.support.commands import small_trace
from tests.support.studies import write_study


def test_all_parameters_that_are_missing_are_named_at_once_with_the_recordings_that_are_shipped() -> None:
    study = load_study("paper")
    with pytest.raises(ValueError, match=r"needs --set deepseek=VALUE qwen=VALUE gpt_oss=VALUE: a recording") as caught:
        cells(study, {})
    told = str(caught.value)
    fitting = "deepseek=deepseek-v2-lite-twin qwen=qwen1.5-moe-a2.7b-twin gpt_oss=gpt-oss-20b-twin"
    assert told.endswith(f"shipped: {fitting}")
    assert len(told) <= 293
    with pytest.raises(ValueError, match=r"needs --set qwen=VALUE: .*; shipped: qwen=qwen1\.5-moe-a2\.7b-twin$"):
        cells(study, {"deepseek": "a", "gpt_oss": "b"})
    # What no chosen cell needs is not asked for.
    assert cells(study, {"gpt_oss": "b"}, only={"model": ["gpt-oss-20b_8GB"]})


def test_recordings_that_are_in_the_repository_alone_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "is_here", lambda name: name.startswith("gpt-oss"))
    with pytest.raises(ValueError, match="needs --set") as caught:
        cells(load_study("paper"), {})
    told = str(caught.value)
    assert "; shipped: gpt_oss=gpt-oss-20b-twin; in the repository's traces/data: deepseek=" in told
    assert len(told) <= 293


def test_a_parameter_that_is_not_about_a_recording_is_asked_for_without_them(tmp_path: Path) -> None:
    changes = {"parameters": {"slots": "a share"}, "axes": {}, "base": ["+hardware=a100", "residency={slots}"]}
    study = read_study(write_study(tmp_path, **changes))
    with pytest.raises(ValueError, match=r"needs --set slots=VALUE: a share$"):
        cells(study, {})


def made(trace: Path, *words: str) -> list[Cell]:
    base = ("+hardware=a100", f"trace.path={trace}")
    return [Cell((("seed", str(seed)),), "lru", (*base, *words, f"seed={seed}")) for seed in range(4)]


def test_a_cause_that_cells_share_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = small_trace(tmp_path / "t.safetensors")
    jobs = plan_jobs(made(trace, "+policy=lru", "warmup_forwards=100"))
    with pytest.raises(ValueError, match=r"^4 of 4 cells failed, all for one cause, none is kept; the first: "):
        run_jobs(jobs, tmp_path / "cells", 1)
    said = capsys.readouterr().out
    assert said.count("leaves nothing to measure") == 1
    assert "2/4" not in said


def test_each_cause_is_said_where_there_are_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = small_trace(tmp_path / "t.safetensors")
    one, two = made(trace, "+policy=lru", "warmup_forwards=100")[:2], made(trace, "+policy=lru")[2:]
    other = Cell(
        (("seed", "9"),), "lru", ("+hardware=a100", f"trace.path={trace}", "+policy=lru", "warmup_forwards=50")
    )
    with pytest.raises(ValueError, match=r"^3 of 5 cells failed, the others are kept"):
        run_jobs(plan_jobs([*one, *two, other]), tmp_path / "cells", 1)
    said = capsys.readouterr().out
    assert [said.count(word) for word in ("warmup_forwards=100", "warmup_forwards=50", ": done")] == [1, 1, 2]
