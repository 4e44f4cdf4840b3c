"""`python -m sim.bench` holds its ratios against the committed ones; how fast anything is, no test says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from expertflow.core import described, is_compiled
from sim import bench
from sim.job.forwards import KEEP_SCORES
from traces.reader import open_trace


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is measured, in place of a measurement."""
    found = {"lru": 7.0, "adaptive": 20.0, bench.ALONE: 30.0}

    def measure(trace: str | None, hardware: str, repeat: int) -> dict[str, float]:
        return dict(found)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "compare_length", lambda trace, hardware: None)
    return found


def committed(path: Path, ratios: Mapping[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(json.dumps({described(): dict(ratios)}))
    monkeypatch.setattr(bench, "COMMITTED", path)


@pytest.mark.parametrize(
    ("was", "code"),
    [
        ({"lru": 7.0, "adaptive": 20.0, bench.ALONE: 30.0}, 0),
        ({"lru": 5.9, "adaptive": 16.7, bench.ALONE: 25.1}, 0),
        ({"lru": 5.8, "adaptive": 20.0, bench.ALONE: 30.0}, 1),
        ({"lru": 7.0, "adaptive": 20.0, bench.ALONE: 24.9}, 1),
        ({"lru": 7.0, "adaptive": 20.0}, 1),
    ],
)
def test_worse_by_a_fifth_fails_the_check_alone(
    was: dict[str, float],
    code: int,
    ratios: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    committed(tmp_path / "bench.json", was, monkeypatch)
    assert bench.main([]) == 0
    assert bench.main(["--check"]) == code
    assert ("worse by more than a fifth" in capsys.readouterr().out) is bool(code)


@pytest.mark.parametrize("name", ["lru", "adaptive", bench.ALONE])
def test_a_missed_bar_fails(name: str, ratios: dict[str, float]) -> None:
    assert bench.main([]) == 0
    ratios[name] = bench.BARS[name] + 0.1
    assert bench.main([]) == 1
    # The bars are of the generated trace: another one is timed, not judged.
    assert bench.main(["gpt-oss-20b.eval"]) == 0


def test_adaptive_has_one_bar_whether_scores_are_kept_or_not() -> None:
    assert bench.BARS[bench.ALONE] == bench.BARS["adaptive"] == 32


def test_the_compiled_core_has_a_bar_of_its_own() -> None:
    assert bench.BARS["lru"] == (8 if is_compiled() else 16)


def test_what_is_committed_of_one_core_says_nothing_of_the_other(
    ratios: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"another core": ratios}))
    monkeypatch.setattr(bench, "COMMITTED", path)
    assert bench.main(["--check"]) == 1
    assert capsys.readouterr().out.count("nothing committed") == len(bench.BARS)
    assert bench.main(["--update"]) == 0
    assert json.loads(path.read_text()) == {"another core": ratios, described(): ratios}


def test_update_writes_what_check_then_holds(
    ratios: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(tmp_path / "bench.json", {}, monkeypatch)
    assert bench.main(["--check"]) == 1
    assert bench.main(["--update"]) == 0
    assert bench.main(["--check"]) == 0
    ratios["lru"] *= 1.21
    assert bench.main(["--check"]) == 1


def test_the_committed_ratios_are_of_what_is_measured() -> None:
    of_cores = json.loads(bench.COMMITTED.read_text())
    assert set(of_cores) == {"core in pure Python", "compiled core"}
    told = of_cores[described()]
    assert list(told) == list(bench.BARS)
    # A run on its own misses its bar, which results/LOG.md says.
    assert all(0 < told[name] <= bench.BARS[name] for name in ("lru", "adaptive"))


@pytest.mark.slow
def test_it_runs_and_leaves_the_environment_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "TRACE", ("trace.num_tokens=300", "trace.num_requests=2"))
    before = dict(os.environ)
    assert bench.main(["--repeat", "1"]) in (0, 1)
    assert dict(os.environ) == before
    assert os.environ[KEEP_SCORES] == "0"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == described()
    assert [line[:16].strip() for line in lines[2:5]] == list(bench.BARS)


def test_a_trace_of_ones_own_has_nothing_committed() -> None:
    with pytest.raises(SystemExit):
        bench.main(["some.safetensors", "--check"])


def test_a_recordings_short_name_is_taken_and_a_near_miss_is_one_line(
    ratios: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(bench, "measure", lambda trace, hardware, repeat: asked.append(trace) or dict(ratios))
    assert bench.main(["gpt-oss-20b-twin"]) == 0
    assert bench.composed("lru", "a100", asked[0])["trace"]["path"] == "gpt-oss-20b-twin"
    assert bench.main(["here.safetensors"]) == 0
    assert asked[1] == os.path.realpath("here.safetensors")
    monkeypatch.setattr(bench, "measure", lambda trace, hardware, repeat: open_trace(trace))
    assert bench.main(["gpt-oss-20b-twn"]) == 2
    told = capsys.readouterr().err
    assert "did you mean gpt-oss-20b-twin?" in told
    assert told.count("\n") == 1
