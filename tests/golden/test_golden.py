"""Pinned metrics of the project's own runs: a change that moves one says so, and by how much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sim.regress import differences, main, read_pins, run_once

GOLDEN = Path(__file__).parent / "runs.json"
RUNS = read_pins(GOLDEN)


@pytest.mark.mostly_slow(keep=8)
@pytest.mark.parametrize("name", RUNS)
def test_no_metric_of_a_pinned_run_has_moved(name: str) -> None:
    found = json.loads(json.dumps(run_once(RUNS[name]["overrides"], GOLDEN.parent)))
    assert differences(RUNS[name]["metrics"], found) == []


def test_a_metric_that_moved_is_named_with_its_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lru a100 eager"
    run = json.loads(json.dumps(RUNS[name]))
    run["overrides"][2] = f"trace.path={GOLDEN.parent / 'generated.safetensors'}"
    run["metrics"]["num_hits"] *= 2
    (tmp_path / "pins.json").write_text(json.dumps({"runs": {name: run}}))
    assert main(["check", str(tmp_path / "pins.json")]) == 1
    moved = f"num_hits: {run['metrics']['num_hits']} → {RUNS[name]['metrics']['num_hits']} (-50.000 %)"
    assert moved in capsys.readouterr().out
