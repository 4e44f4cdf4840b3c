"""A study from its file to its folder: the same numbers as single runs, kept, and errors in one line."""

import json
from pathlib import Path

import pandas as pd
import pytest

from sim.study import cells as cells_module
from sim.study.cells import run_cell
from tests.support.commands import exit_code, job, small_trace
from tests.support.studies import command, summary, table, write_study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_study(tmp_path)
    small_trace(tmp_path / "r.safetensors", 24, 2, prompt=4)
    return tmp_path


def words(folder: Path) -> list[str]:
    return ["--set", f"recording={folder / 'r.safetensors'}"]


def test_a_cell_is_what_python_m_sim_writes(folder: Path) -> None:
    assert command(folder, *words(folder), "--only", "stack=eager") == 0
    trace = f"trace.path={folder / 'r.safetensors'}"
    told = ("+hardware=a100", "residency=0.25", trace, "compare=none", "count_redundant=true")
    single = job(*told, "+policy=adaptive")
    kept = [json.loads(path.read_text()) for path in (folder / "out" / "cells").glob("*.json")]
    (cell,) = (one for one in kept if one["prefetch"]["redundant"] is not None)
    phases = cell.pop("phases")
    del cell["costs"]
    assert {**cell, "compare": None, "bounds": None} == single
    for key in ("elapsed_ns", "stall_ns", "late_stall_ns", "num_accesses", "num_hits", "num_forwards", "num_tokens"):
        assert phases["prefill"][key] + phases["decode"][key] == single[key], key
    assert phases["prefill"]["num_rows"] == 8


@pytest.mark.slow
def test_the_phases_leave_out_the_warm_up_as_the_metrics_do(folder: Path) -> None:
    assert command(folder, *words(folder), "warmup_forwards=5", "--only", "variant=lru,adaptive") == 0
    for path in (folder / "out" / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        for key in ("elapsed_ns", "stall_ns", "num_accesses", "num_hits", "num_forwards", "num_tokens"):
            assert sum(cell["phases"][phase][key] for phase in ("prefill", "decode")) == cell[key], key


@pytest.mark.slow
def test_the_table_sets_each_cell_beside_the_others_of_its_place(folder: Path) -> None:
    assert command(folder, *words(folder)) == 0
    rows = table(folder).set_index(["stack", "variant"])
    assert len(rows) == 12
    for stack in ("eager", "graph"):
        stall = rows.loc[stack]["stall_ns"]
        row = rows.loc[(stack, "adaptive")]
        assert row["stall_left_on_demand"] == pytest.approx(stall["adaptive"] / stall["on_demand"])
        gap = (stall["lru"] - stall["adaptive"]) / (stall["lru"] - stall["perfect"])
        assert row["gap_closed"] == pytest.approx(gap)
        slower = row["elapsed_ns"] / rows.loc[(stack, "lru"), "elapsed_ns"] - 1
        assert row["slower_than_lru_pct"] == pytest.approx(100 * slower)
        assert pd.isna(row["stall_left_hf_offload"])
        # N_e of 4 at one token; the miss rate is that of lru.
        assert row["decode_experts_per_layer"] == 4.0
        miss_rate = 1 - rows.loc[(stack, "lru"), "decode_hit_rate"]
        assert row["decode_link_pressure"] == pytest.approx(miss_rate * row["decode_copy_over_compute"])
    assert rows.loc[("eager", "perfect"), "gap_closed"] == 1.0
    assert rows.loc[("eager", "lru"), "gap_closed"] == 0.0


@pytest.mark.slow
def test_finished_cells_are_kept_and_others_are_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(cells_module, "run_cell", lambda cfg, work: ran.append(cfg["seed"]) or run_cell(cfg, work))
    told = [*words(folder), "--only", "variant=lru,on_demand"]
    assert command(folder, *told) == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.suffix in (".csv", ".md")}
    assert (len(ran), command(folder, *told), len(ran)) == (4, 0, 4)
    after = {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.suffix in (".csv", ".md")}
    assert after == before
    assert command(folder, *told, "--set", "seed=3") == 0
    assert ran[4:] == [3, 3, 3, 3]
    small_trace(folder / "r.safetensors", 24, 2, prompt=4, seed=9)
    cells_module._open_trace.cache_clear()
    assert command(folder, *told) == 0
    assert len(ran) == 12


@pytest.mark.slow
def test_two_processes_find_what_one_does(folder: Path) -> None:
    told = [*words(folder), "--only", "variant=lru,adaptive"]
    assert command(folder, *told) == 0
    alone = (folder / "out" / "table.csv").read_bytes()
    for path in (folder / "out" / "cells").glob("*.json"):
        path.unlink()
    assert command(folder, *told, "--jobs", "2") == 0
    assert (folder / "out" / "table.csv").read_bytes() == alone


@pytest.mark.slow
def test_the_report_shows_command_verdicts_and_tables_but_no_path(folder: Path) -> None:
    assert command(folder, *words(folder), "--tokens", "20") == 0
    text = (folder / "out" / "README.md").read_text(encoding="utf-8")
    told = "--config-dir $CONFIG_DIR --set recording=$RECORDING --tokens 20"
    assert f"python -m sim.study tiny --out out {told}" in text
    assert "Below (stall_left_on_demand at most 1): holds in 2 of 2 cells" in text
    assert "| variant | small eager | small graph |" in text
    for path in (folder / "out").iterdir():
        if path.is_file():
            assert str(folder) not in path.read_text(encoding="utf-8")
    assert (folder / "out" / "DONE").exists()
    assert set(summary(folder)["traces"]) == {"r"}


@pytest.mark.slow
def test_a_verdict_can_fail(folder: Path) -> None:
    claim = {"name": "Never", "variants": ["lru"], "column": "stall_left_on_demand", "at_most": 0.0}
    write_study(folder, claims=[claim])
    assert command(folder, *words(folder)) == 0
    (found,) = summary(folder)["claims"]
    assert (found["num_holds"], found["num_fails"]) == (0, 2)
    assert {one["variant"] for one in found["fails"]} == {"lru"}
    (best,) = summary(folder)["best"]
    for place in best["places"]:
        assert place["gain"] == pytest.approx(1 - place["value"] / place["best_value"])


@pytest.mark.slow
def test_an_optional_variant_is_left_out_and_any_other_fails_the_study(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {"lru": ["+policy=lru"], "pregate": ["+policy=adaptive", "policy/predictor=lookahead"]}
    common = {"variants": variants, "claims": None, "best": None}
    write_study(folder, **common)
    assert command(folder, *words(folder)) == 2
    error = capsys.readouterr().err
    assert "variant=pregate (2 of 4 cells): " in error
    assert "needs a recorded pre-gate" in error
    assert len(error.splitlines()) == 1
    assert not (folder / "out").exists()
    assert not (folder / "out" / "DONE").exists()
    write_study(folder, **common, optional=["pregate"])
    assert command(folder, *words(folder)) == 0
    assert set(table(folder)["variant"]) == {"lru"}
    assert len(summary(folder)["left_out"]) == 2


@pytest.mark.mostly_slow(keep=3)
@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([], "needs --set recording=VALUE: a recording"),
        (["--set", "recording"], "give KEY=VALUE"),
        (["--set", "recording=none.safetensors"], "none.safetensors"),
        (["--set", "recording=R", "sead=1"], "sead"),
        (["--set", "recording=R", "--only", "stack=fast"], "choose from: eager, graph"),
        (["--set", "recording=R", "--only", "link=fast"], "no axis of tiny"),
        (["--set", "recording=R", "--jobs", "0"], "--jobs=0"),
        (["--set", "recording=R", "--tokens", "0"], "argument --tokens: 0 must be a whole number"),
    ],
)
def test_a_wrong_word_is_one_line(
    told: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [word.replace("recording=R", f"recording={folder / 'r.safetensors'}") for word in told]
    assert exit_code(lambda: command(folder, *told)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_unknown_study_is_one_line_with_the_choices(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, name="tinny") == 2
    assert "did you mean tiny?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_that_decodes_nothing_says_so_in_place_of_a_verdict(folder: Path) -> None:
    assert command(folder, *words(folder), "--tokens", "1") == 0
    text = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert "holds in" not in text
    assert "the run ends before the first decoded token; give more --tokens" in text
