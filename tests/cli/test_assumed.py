"""A model without a trace of its topology runs on assumed routing, says so, and gives a range."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sim import assumed, sweep
from sim.assumed import Row, page, table_csv
from sim.collect import collect, markdown
from sim.job.assumed import range_line
from sim.job.configure import configure
from sim.job.setup import make_workload, trace_of
from tests.support.commands import job, run_here, run_there

SMALL = ("+hardware=rtx3090", "model=mixtral-8x7b", "trace.num_tokens=32", "residency=0.5")


def metrics_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_a_run_without_a_trace_of_its_model_says_what_it_assumed_and_how_much_hangs_on_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    found = run_here([*SMALL, "+policy=lru", "compare=none"], folder)
    assert found.code == 0, found.err
    assert "trace assumed:usual 32x8 top 2: 32 tokens, 8 requests; assumed routing, usual locality" in found.out
    line = re.search(r"^TPOT (\S+) ms, (\S+)–(\S+) by how local the routing is; record your own", found.out, re.M)
    assert line is not None, found.out
    usual, least, most = map(float, line.groups())
    assert least < usual < most
    metrics = metrics_of(folder)
    told = metrics["assumed"]
    assert (told["routing"], told["locality"], list(told["range"])) == (
        "assumed routing, usual locality",
        "usual",
        ["low", "high"],
    )
    assert told["range"]["high"]["num_hits"] > metrics["num_hits"] > told["range"]["low"]["num_hits"]
    assert told["range"]["low"]["tpot_ms"]["mean"] == pytest.approx(most, rel=0.01)
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["assumed"]["routing"] == "assumed routing, usual locality"
    assert "shipped: assumed.families.json" in json.loads((folder / "DONE").read_text(encoding="utf-8"))["files"]
    # Asked again, it stands; for another locality it does not.
    again = run_here([*SMALL, "+policy=lru", "compare=none", "skip_done=true"], folder)
    assert again.out.startswith("done before")
    other = run_here([*SMALL, "+policy=lru", "compare=none", "skip_done=true", "trace.locality=low"], folder)
    assert "assumed routing, low locality: not recorded" in other.out
    assert metrics_of(folder)["assumed"]["range"] is None
    assert metrics_of(folder)["num_hits"] == told["range"]["low"]["num_hits"]
    assert len(collect(tmp_path)) == 1


@pytest.mark.slow
def test_one_after_the_other_gives_what_side_by_side_does(tmp_path: Path) -> None:
    words = [*SMALL, "+policy=lru", "compare=none"]
    assert run_here(words, tmp_path / "run").code == 0
    side_by_side = metrics_of(tmp_path / "run")
    assert side_by_side == json.loads(json.dumps(job(*words)))


@pytest.mark.slow
def test_policies_that_learn_run_and_what_needs_a_recording_is_refused_in_one_line(tmp_path: Path) -> None:
    metrics = job(*SMALL, "+policy=adaptive", "compare=none", "trace.locality=high")
    assert metrics["prefetch"]["issued"] > 0
    found = run_here([*SMALL, "+policy=adaptive", "policy/predictor=lookahead"], tmp_path / "run")
    assert found.code == 2
    assert "needs a recorded pre-gate; the trace assumed:usual 32x8 top 2 has none" in found.err
    assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ((), "gpt-oss-20b-twin-eval"),
        (("model=gpt-oss-20b",), "gpt-oss-20b-twin-eval"),
        (("trace.num_tokens=40",), "gpt-oss-20b-generated-40x8-seed0"),
        (("model=gpt-oss-20b", "trace.num_tokens=40"), "gpt-oss-20b-generated-40x8-seed0"),
        (("model=gpt-oss-20b", "trace.locality=low"), "assumed:low 24x32 top 4"),
        (("model=olmoe-1b-7b", "trace.seed=3"), "assumed:usual 16x64 top 8 seed 3"),
    ],
)
def test_what_is_assumed_and_what_is_as_it_was(words: tuple[str, ...], name: str) -> None:
    assert trace_of(configure(["+hardware=a100", "+policy=lru", *words])).name == name


@pytest.mark.slow
def test_batches_up_to_the_number_of_requests_run() -> None:
    words = ("+hardware=a100", "+policy=lru", "model=mixtral-8x7b", "compare=none", "trace.locality=usual")
    assert job(*words, "batch_size=8", "trace.num_tokens=32")["num_tokens"] == 32
    with pytest.raises(ValueError, match=r"^batch_size=9 is more than the 8 requests .*trace\.num_requests=9"):
        make_workload(configure([*words, "batch_size=9"]))
    cfg = configure([*words, "batch_size=9", "trace.num_requests=9", "trace.num_tokens=36"])
    assert make_workload(cfg).batches.num_requests == 9


@pytest.mark.slow
def test_a_run_that_is_given_up_with_its_range_under_way_is_one_line(tmp_path: Path) -> None:
    words = ["+hardware=rtx3090", "+policy=lru", "model=qwen3-235b-a22b", "gpu_memory_gb=23", "compare=none"]
    found = run_there([*words, "timeout_s=2"], tmp_path / "run", cwd=tmp_path)
    assert found.code == 2
    assert found.err.startswith("error: timeout_s=2: ")
    assert found.err.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.json").exists()


def run_of(mean: float | None) -> dict[str, Any]:
    return {"tpot_ms": {"mean": mean}, "elapsed_ns": 4_000_000, "num_tokens": 2}


@pytest.mark.parametrize(
    ("times", "line"),
    [
        ((31.04, 40.21, 24.4), "TPOT 31.0 ms, 24.4–40.2 by how local the routing is; record your own for one figure"),
        ((1290.6, 1302.9, 871.2), "TPOT 1291 ms, 871–1303 by"),
        ((0.0512, 0.06, 0.05), "TPOT 0.0512 ms, 0.0500–0.0600 by"),
        ((5.0, 5.0, 5.0), "TPOT 5.00 ms at low, usual and high locality of the routing; it is not recorded"),
        ((None, None, None), "a token 2.00 ms at low"),
    ],
)
def test_the_range_is_said_in_words(times: tuple[float | None, ...], line: str) -> None:
    usual, low, high = map(run_of, times)
    told = {"locality": "usual", "range": {"low": low, "high": high}}
    assert range_line({**usual, "assumed": told}).startswith(line)


@pytest.mark.slow
def test_the_line_of_a_sweep_and_its_table_have_the_range_too(tmp_path: Path) -> None:
    words = [*SMALL, "+policy=lru,lfu", "compare=none", "hydra/launcher=basic", f"hydra.sweep.dir={tmp_path / 's'}"]
    found = run_here(["-m", *words], tmp_path)
    assert found.code == 0, found.err
    assert (
        len(re.findall(r"\(assumed routing, usual locality\): TPOT \S+ ms \(\S+–\S+ ms by how local", found.out)) == 2
    )
    text = markdown(collect(tmp_path / "s"), "tpot_ms")
    assert len(re.findall(r"\(\S+–\S+\)\\\*", text)) == 2
    runs = sweep(hardware="rtx3090", model="mixtral-8x7b", trace={"num_tokens": 32}, policy=["lru"], jobs=1)
    head, row, note = str(runs).splitlines()
    assert "tpot_ms_range" in head
    assert re.search(r" \d+\.\d–\d+\.\d ", row)
    assert note.startswith("tpot_ms_range: assumed routing, usual locality; the range is by how local the routing is")
    assert "not recorded" in runs._repr_html_()


# -- held against recordings ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_says_where_the_range_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assumed, "TOPOLOGIES", assumed.TOPOLOGIES[:2])
    rows = [
        Row("a-eval", "b-train", 0.5, "LRU hits", 50.0, (40.0, 45.0, 60.0)),
        Row("a-eval", "b-train", 0.5, "adaptive hits", 70.0, (40.0, 45.0, 66.5)),
    ]
    assert [row.bracketed for row in rows] == [True, False]
    text = page(rows, "python -m sim.assumed", 64)
    assert "brackets the recording in **1 of 2** places" in text
    assert "| b-train | 2 | 1 | adaptive hits of a-eval at 50%, by 3.5 points |" in text
    assert "| 50% | adaptive hits | 70.0 | 40.0 | 45.0 | 66.5 | outside by 3.5 |" in text
    assert table_csv(rows).splitlines()[2] == 'a-eval,"b-train",0.5,adaptive hits,70.000,40.000,45.000,66.500,false'


@pytest.mark.slow
def test_a_recording_is_held_against_families_of_other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assumed, "RESIDENCIES", (0.5,))
    found = assumed.recordings([])
    trace = next(one for one in found if one.name == "qwen1.5-moe-a2.7b-twin-eval")
    [train] = [one for one in found if assumed.is_to_fit(one)]
    assert train.name == "gpt-oss-20b-twin-train"
    rows = assumed.compare(trace.paths[0], assumed.shipped_families(), train.name, 80)
    assert [row.quantity for row in rows] == list(assumed.QUANTITIES)
    low, _, high = rows[0].assumed
    assert low < high


def test_a_folder_without_recordings_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert assumed.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no recording lies there")


def test_an_installed_package_without_recordings_names_no_folder_that_nobody_gave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assumed, "INSTALLED", True)
    monkeypatch.setattr(assumed, "OWN", tmp_path / "inside")
    assert assumed.main(["--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: the recordings that are compared are in the repository (traces/data)")
    assert assumed.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no recording lies there")
