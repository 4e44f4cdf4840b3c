"""`replay.calibrate` and `replay.validate` end to end on the CPU machine, in a small form: what they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from replay import calibrate, validate
from replay.calibration.record import load_record
from replay.lockstep.compare import main as lockstep
from replay.lost import DeviceLostError
from replay.machine.rig import Rig
from replay.run import PartialRunError
from replay.validation import session as validation
from replay.validation.fidelity import Ran
from sim.specs.hardware import hardware_from_dict, stack_from_dict
from tests.support.commands import exit_code

SMALL = ["--machine", "cpu", "--quick"]


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one small validation: two policies, two batch sizes."""
    out = tmp_path_factory.mktemp("validation")
    words = [
        "mine",
        *SMALL,
        "--policies",
        "lru,adaptive",
        "--residency",
        "0.5",
        "--stacks",
        "found",
        "--tokens",
        "12",
        "--log-tokens",
        "4",
        "--batch-sizes",
        "1,4",
        "--verify-executions",
        "3000",
        "--verify-tokens",
        "64",
        "--repeat",
        "2",
        "--out",
        str(out),
    ]
    assert validate.main(words) in (0, 1)
    return out


@pytest.mark.slow
def test_a_validation_writes_its_table_page_plot_timeline_and_profile(validated: Path) -> None:
    names = {path.relative_to(validated).as_posix() for path in validated.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "fidelity.png",
        "summary.json",
        "provenance.json",
        "table.csv",
        "runs.csv",
        "timeline.json",
        "profile/hardware/mine.yaml",
        "profile/hardware/mine.calibration.json",
        "profile/stack/mine.yaml",
        "logs/cpu-lru.parquet",
        "logs/cpu-adaptive.parquet",
    }
    table = pd.read_csv(validated / "table.csv")
    assert sorted(zip(table["policy"], table["batch_size"], strict=True)) == [
        ("adaptive", 1),
        ("adaptive", 4),
        ("lru", 1),
        ("lru", 4),
    ]
    for column in ("tpot_ms", "compute_ms", "overhead_ms", "link_ms"):
        assert (table[f"{column}_measured"] > 0).all()
        assert (table[f"{column}_predicted"] > 0).all()
    # Without prefetch hits do not depend on time: both worlds count the same.
    lru = table[table["policy"] == "lru"]
    assert (lru["num_hits_measured"] == lru["num_hits_predicted"]).all()
    assert (lru["num_misses_measured"] == lru["num_misses_predicted"]).all()
    runs = pd.read_csv(validated / "runs.csv")
    one, other = "gpt-oss-20b found 50 % batch 1", "gpt-oss-20b found 50 % batch 4"
    # Those of a block take turns; then come those again during which the host changed its speed.
    assert list(runs["case"][:4]) == [f"{one} {policy}" for policy in ("lru", "adaptive")] * 2
    planned = {f"{where} {policy}" for where in (one, other) for policy in ("lru", "adaptive")}
    assert set(runs["case"]) == planned
    for _, mine in runs.groupby("case"):
        assert list(mine["repeat"]) == list(range(1, len(mine) + 1))
        assert 2 <= len(mine) <= 6
    assert (runs["python_loop_ns"] > 0).all()
    for case, policy in ((one, "lru"), (other, "adaptive")):
        mine = runs.loc[(runs["case"] == f"{case} {policy}") & runs["counts"], "tpot_ms"]
        found = table.loc[(table["policy"] == policy) & (table["batch_size"] == int(case[-1])), "tpot_ms_measured"]
        assert found.item() == pytest.approx(mine.median())


@pytest.mark.slow
def test_a_validation_finds_no_wrong_stamp_and_every_decision_again(validated: Path) -> None:
    summary = json.loads((validated / "summary.json").read_text())
    assert summary["stamps"]["wrong"] == 0
    assert summary["stamps"]["executions"] >= 3000
    assert [one["difference"] for one in summary["lockstep"]] == [None, None]
    assert all(one["decisions"] > 100 for one in summary["lockstep"])
    assert (summary["world"], summary["scale"], summary["left_out"]) == ("cpu", 16, [])
    assert summary["judged"]["num_rows"] == 4
    assert len(summary["host_loop"]["times_ns"]) == 2 * summary["replays"] + 1
    assert 0 < summary["breadth_s"] < summary["wall_s"]
    assert (validated / "README.md").read_text().splitlines()[2].removesuffix(".**").endswith(summary["quote"])
    assert lockstep([str(validated / "logs" / "cpu-adaptive.parquet")]) == 0


@pytest.mark.slow
def test_a_validation_with_a_place(tmp_path: Path) -> None:
    """All that is missing is computed on the host: both worlds place and count alike, whatever the time."""
    shape = ["--residency", "0.25", "--stacks", "found", "--tokens", "8", "--log-tokens", "4", "--batch-sizes", "1"]
    words = [*SMALL, "--policies", "lru+cheaper,lru+host_layers", "--host", "server", "--repeat", "2", *shape]
    assert validate.main(["mine", *words, "--throttle", "0.03", "--beside", "--out", str(tmp_path)]) in (0, 1)
    table = pd.read_csv(tmp_path / "table.csv").set_index("policy")
    for column in ("num_host", "num_hits", "num_misses"):
        assert list(table[f"{column}_measured"]) == list(table[f"{column}_predicted"])
    assert table.loc["lru+cheaper", "num_host_measured"] == 8 * 24 * 4
    assert 0 < table.loc["lru+host_layers", "num_host_measured"] < 8 * 24 * 4
    # Of the host's time the pace is the most.
    ratio = table["host_ms_measured"] / table["host_ms_predicted"]
    assert (ratio > 0.99).all()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stamps"]["wrong"] == 0
    assert [one["difference"] for one in summary["lockstep"]] == [None, None]
    assert "| policy | host stall measured | host stall predicted |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_the_two_timelines_are_of_the_same_forwards(validated: Path) -> None:
    events = json.loads((validated / "timeline.json").read_text())["traceEvents"]
    attention = {
        pid: [event["name"] for event in events if event.get("cat") == "attention" and event["pid"] == pid]
        for pid in (1, 2)
    }
    assert attention[1] == attention[2]
    assert len(attention[1]) == 24 * validation.TIMELINE_FORWARDS


@pytest.mark.slow
def test_a_record_that_is_there_is_taken_and_another_scale_refused(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = validated / "profile" / "hardware" / "mine.calibration.json"
    words = [
        "again",
        "--machine",
        "cpu",
        "--calibration",
        str(record),
        "--policies",
        "lru",
        "--residency",
        "0.5",
        "--stacks",
        "found",
        "--tokens",
        "4",
        "--log-tokens",
        "2",
        "--batch-sizes",
        "1",
        "--beside",
        "--repeat",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert validate.main(words) in (0, 1)
    beside = json.loads((tmp_path / "beside.json").read_text())
    assert list(beside) == ["gpt-oss-20b found 50 % batch 1 lru"]
    assert beside["gpt-oss-20b found 50 % batch 1 lru"]["run attention"]["count"] > 100
    again = json.loads((tmp_path / "profile" / "hardware" / "again.calibration.json").read_text())
    assert again["kernels"] == json.loads(record.read_text())["kernels"]
    capsys.readouterr()
    assert validate.main([*words, "--scale", "8"]) == 2
    assert "measured at scale 16, this run has 8" in capsys.readouterr().err


@pytest.mark.slow
def test_time_that_is_up_leaves_rows_out_and_says_so(
    validated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = validated / "profile" / "hardware" / "mine.calibration.json"
    words = [
        "short",
        "--machine",
        "cpu",
        "--calibration",
        str(record),
        "--policies",
        "lru",
        "--residency",
        "0.5",
        "--stacks",
        "found",
        "--tokens",
        "2",
        "--log-tokens",
        "2",
        "--batch-sizes",
        "1,8",
        "--minutes",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert validate.main(words) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["left_out"]) == 2
    assert summary["judged"]["num_rows"] == 0
    assert summary["not_shown"] == [
        "nothing was compared",
        "the 0 minutes did not reach every policy and capacity once",
        "the time did not suffice for the lockstep of lru",
    ]
    assert summary["lockstep"] == []
    told = capsys.readouterr().out.splitlines()
    assert any("no time now for the lockstep of lru: raise --minutes" in line for line in told)
    assert told[-4:] == [
        "NOT shown: nothing was compared",
        *(f"not shown: {reason}" for reason in summary["not_shown"]),
    ]


@pytest.mark.slow
def test_a_lost_device_leaves_what_was_finished(
    validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the second replay of a comparison: the first is kept, exit code 3, a log of each policy, no DONE."""
    measure, begun = validation.measure, []

    def second_is_lost(rig: Rig, *args: Any) -> Ran:
        begun.append(rig)
        if len(begun) == 2:
            # What a process that is killed here would leave behind claims nothing.
            between = json.loads((tmp_path / "summary.json").read_text())
            assert between["not_shown"][0] == "it was still running, after 1 replays"
            raise PartialRunError("gone", {}) from DeviceLostError("gone")
        return measure(rig, *args)

    monkeypatch.setattr(validation, "measure", second_is_lost)
    record = validated / "profile" / "hardware" / "mine.calibration.json"
    words = [
        "lost",
        "--machine",
        "cpu",
        "--calibration",
        str(record),
        "--policies",
        "lru",
        "--residency",
        "0.5",
        "--stacks",
        "found",
        "--tokens",
        "2",
        "--log-tokens",
        "2",
        "--batch-sizes",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert validate.main(words) == 3
    assert capsys.readouterr().err == "error: the device was lost: gone; what was finished by then is kept\n"
    assert len(pd.read_csv(tmp_path / "table.csv")) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["not_shown"] == ["it broke off: gone", "no row could be judged"]
    assert "- Not shown: it broke off: gone." in (tmp_path / "README.md").read_text()
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"cpu-lru.parquet"}
    assert not (tmp_path / "DONE").exists()


@pytest.mark.slow
def test_a_calibration_writes_a_profile_that_simulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--policies", "lru", "--throttle", "0.2", "--config-dir", str(tmp_path)]
    assert calibrate.main(["mine", *words]) == 0
    hardware = hardware_from_dict(yaml.safe_load((tmp_path / "hardware" / "mine.yaml").read_text()))
    stack_from_dict(yaml.safe_load((tmp_path / "stack" / "mine.yaml").read_text()))
    assert list(hardware.kernel_ns) == ["gpt-oss-20b/16"]
    # The throttle is a floor under every copy's time: the link is never found faster than that.
    raw = json.loads((tmp_path / "hardware" / "mine.calibration.json").read_text())
    assert all(row["bytes"] / row["in_a_row_ns"] <= 0.2001 for row in raw["link"])
    printed = capsys.readouterr().out
    for figure in ("link_gb_per_s", "gate_sync_ns", "lru decides, p50", "pads last"):
        assert figure in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["local"], "NAME='local'"),
        (["mine", "--models", "gpt-5"], "model 'gpt-5' is unknown"),
        (["mine", "--machine", "cuda", "--throttle", "1"], "throttle_gb_per_s"),
    ],
)
def test_calibrate_answers_mistakes_with_one_line(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words if "--machine" in words else [*words, "--machine", "cpu"]
    assert calibrate.main([*given, "--quick", "--config-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a/b"], "NAME='a/b'"),
        (["mine", "--tokens", "0"], "argument --tokens: 0 must be a whole number"),
        (["mine", "--calibration", "missing.json"], "missing.json"),
        (["mine", "--hardware", "abacus"], "abacus"),
        (["mine", "--residency", "half"], "--residency='half' must be numbers"),
        (["mine", "--batch-sizes", "1.5"], "--batch-sizes='1.5' must be whole numbers"),
        (["mine", "--policies", "lru,best"], "best"),
        (["mine", "--policies", "lru+nowhere"], "--policies=lru+nowhere: place 'nowhere' does not exist"),
        (
            ["mine", "--policies", "lru", "--host", "server"],
            "--host=server is of policies with a place, and --policies names none",
        ),
        (["mine", "--policies", "lru+cheaper", "--host", "abacus"], "abacus"),
        (["mine", "--models", "gpt-5"], "--models='gpt-5' does not exist"),
        (["mine", "--scale", "-1"], "argument --scale: -1 must be a whole number"),
    ],
)
def test_validate_answers_mistakes_with_one_line(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(lambda: validate.main([*words, "--machine", "cpu", "--out", str(tmp_path)])) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in ("{", "[]", "{}", '{"format": "other"}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"replay\.calibrate"):
            load_record(path, 16)
