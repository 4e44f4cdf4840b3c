"""`python -m sim.collect`: what a sweep was over is a column each, in the table and in its Markdown."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from sim import collect
from sim.job.given import given_keys
from tests.support.commands import run_here, small_trace


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that differ in a key, in a part of their policy, and one that was given neither."""
    folder = tmp_path_factory.mktemp("collect")
    trace = small_trace(folder / "t.safetensors")
    words = ["+hardware=a100", "+policy=lru", f"trace.path={trace}"]
    for chunk in (2, 4):
        for eviction in ("lru", "lfu"):
            more = [f"chunk_mib={chunk}", f"policy/eviction={eviction}", "compare=none"]
            assert run_here([*words, *more], folder / "s" / f"{chunk}-{eviction}").code == 0
    assert run_here([*words, "chunk_mib=8", "residency=0.25", "compare=full"], folder / "s" / "other").code == 0
    return folder / "s"


@pytest.mark.slow
def test_each_key_that_was_given_is_a_column_and_what_was_not_given_is_what_was_configured(sweep: Path) -> None:
    table = collect.collect(sweep).set_index("run")
    assert list(table["chunk_mib"]) == [2, 2, 4, 4, 8]
    assert list(table["policy/eviction"]) == ["lfu", "lru", "lfu", "lru", "lru"]
    # A column of the metrics already, or nothing that a result depends on.
    assert list(table.columns).count("residency") == 1
    assert "compare" not in table.columns
    assert set(table["trace.path"]) == {str(sweep.parent / "t.safetensors")}


@pytest.mark.slow
def test_the_runs_beside_have_another_policy_and_the_same_keys(sweep: Path) -> None:
    table = collect.collect(sweep, beside=True).set_index("run")
    row = table.loc["other (on_demand)"]
    assert row["chunk_mib"] == 8
    assert pd.isna(row["policy/eviction"])


@pytest.mark.slow
def test_markdown_has_a_column_for_each_combination_of_what_differs(sweep: Path) -> None:
    lines = collect.markdown(collect.collect(sweep), "ms_per_token").splitlines()
    heads = [head.strip() for head in lines[0].strip("|").split("|")]
    assert sorted(heads[1:]) == [
        "a100 eager 25% chunk_mib=8 policy/eviction=lru",
        *(f"a100 eager 50% chunk_mib={chunk} policy/eviction={one}" for chunk in (2, 4) for one in ("lfu", "lru")),
    ]
    assert len(lines) == 3
    with pytest.raises(ValueError, match=r"--markdown=tpot is no column \(did you mean tpot_ms\?\)"):
        collect.markdown(collect.collect(sweep), "tpot")
    with pytest.raises(ValueError, match="no column of figures"):
        collect.markdown(collect.collect(sweep), "policy")


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("+hardware.link_gb_per_s=50", "hardware.link_gb_per_s", 50),
        ("residency=0.5", "residency", 0.5),
        ("policy.eviction._target_=mine.MRU", "policy.eviction._target_", "mine.MRU"),
        ("max_tokens=null", "max_tokens", None),
        ("policy.transfer.serial=true", "policy.transfer.serial", True),
        ("seed=1e400", "seed", "1e400"),
        ("trace.path=[a,b]", "trace.path", "[a,b]"),
    ],
)
def test_words_are_read_as_keys_and_values(word: str, key: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps({"overrides": [word, "compare=none"]}), encoding="utf-8")
    assert given_keys(tmp_path) == {key: value}


@pytest.mark.parametrize("content", ['{"overrides": 3}', '{"overrides": [3]}', "[]", "{"])
def test_a_record_that_no_run_writes_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"provenance\.json.*remove the folder or run it again"):
        given_keys(tmp_path)


def test_markdown_of_a_column_without_a_figure_says_why() -> None:
    table = pd.DataFrame([{"run": "a", "schema": 1, "policy": "lru", "tpot_ms": None}])
    with pytest.raises(ValueError, match=r"tpot_ms is empty in every run \(max_tokens ends inside the prompt\?\)"):
        collect.markdown(table, "tpot_ms")


def test_markdown_names_the_model_where_it_differs() -> None:
    row = {"schema": 1, "policy": "lru", "hardware": "a100", "stack": "eager", "residency": 0.5, "tpot_ms": 1.0}
    rows = [{"run": one, **row, "model": one} for one in ("big", "small")]
    heads = collect.markdown(pd.DataFrame(rows), "tpot_ms").splitlines()[0]
    assert heads == "| policy | a100 eager 50% model=big | a100 eager 50% model=small |"
    assert "model=" not in collect.markdown(pd.DataFrame(rows[:1]), "tpot_ms")


# -- what a table of many unlike runs reads like ---------------------------------------------------------------


ROW = {"schema": 1, "policy": "lru", "hardware": "a100", "stack": "eager", "residency": 0.5, "tpot_ms": 1.0}


def table_of(*rows: dict[str, object]) -> pd.DataFrame:
    """A row a run: what it was given, before what every run has."""
    given = {key: None for row in rows for key in row if key not in (*ROW, "beside")}
    return collect.frame_of([{"run": str(n), **given, **ROW, **row} for n, row in enumerate(rows)])


def heads(text: str) -> list[str]:
    return [head.strip() for head in text.splitlines()[0].strip("|").split("|")][1:]


def test_columns_are_in_the_order_of_their_values_and_whole_numbers_stay_whole() -> None:
    rows = [{"batch_size": size} for size in (16, 4, 1)]
    text = collect.markdown(table_of(*rows, {"max_tokens": 150}), "tpot_ms")
    assert heads(text) == [
        *(f"a100 eager 50% batch_size={size}" for size in (1, 4, 16)),
        "a100 eager 50% max_tokens=150",
    ]
    table = table_of({"batch_size": 4}, {})
    assert table["batch_size"].tolist() == [4, pd.NA]


def test_keys_are_named_by_their_last_words_and_only_where_a_run_has_them() -> None:
    first = {"policy.horizon.depth": 2, "a.scope": "x"}
    text = collect.markdown(table_of(first, {"policy.horizon.depth": 4, "b.scope": True}), "tpot_ms")
    assert heads(text) == ["a100 eager 50% depth=2 a.scope=x", "a100 eager 50% depth=4 b.scope=true"]


@pytest.mark.slow
def test_a_run_and_one_of_its_policy_beside_it_are_two_rows(sweep: Path) -> None:
    found = collect.collect(sweep, beside=True)
    assert found.loc[found["run"] == "other (on_demand)", "beside"].tolist() == ["lru"]
    lines = collect.markdown(found, "ms_per_token").splitlines()[2:]
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert rows == ["lru", "on_demand", "lru (beside)", "clairvoyant"]
    assert "(beside): run beside the others" in collect.markdown(found, "ms_per_token")


def test_runs_beside_that_are_not_the_same_are_told_apart() -> None:
    rows = [{"policy": "lru"}, {"policy": "lfu"}]
    beside = [{"policy": "lru", "beside": name, "tpot_ms": time} for name, time in (("lru", 1.0), ("lfu", 2.0))]
    text = collect.markdown(table_of(*rows, *beside), "tpot_ms")
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:6]] == [
        "lru",
        "lfu",
        "lru (beside lru)",
        "lru (beside lfu)",
    ]
    same = table_of(*rows, *beside).assign(tpot_ms=1.0)
    assert collect.markdown(same, "tpot_ms").count("| lru (beside) |") == 1


def test_a_policy_that_all_commands_changed_is_marked_and_told() -> None:
    key = "policy.eviction._target_"
    text = collect.markdown(table_of(*({"policy": one, key: "mine.MRU"} for one in ("lru", "lfu"))), "tpot_ms")
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:4]] == ["lru (changed)", "lfu (changed)"]
    assert text.splitlines()[-1] == f"(changed): {key}=mine.MRU"


def test_assumed_routing_is_marked_with_its_range() -> None:
    ends = {
        f"assumed.range.{end}.{key}": value
        for end, time in (("low", 3.0), ("high", 0.5))
        for key, value in {"tpot_ms.mean": time, "elapsed_ns": int(time * 8e6), "num_tokens": 4}.items()
    }
    table = table_of({}).assign(**{"assumed.routing": "assumed routing, usual locality", "ms_per_token": 2.0}, **ends)
    text = collect.markdown(table, "tpot_ms")
    assert r"| lru | 1.000 (0.500–3.000)\* |" in text
    assert r"\*: assumed routing, usual locality, not recorded; in brackets: by how local the routing is" in text
    assert r"| lru | 2.000 (1.000–6.000)\* |" in collect.markdown(table, "ms_per_token")
    assert r"| lru | 0.500\* |" in collect.markdown(table, "residency")


def test_two_runs_that_no_column_tells_apart_are_named() -> None:
    with pytest.raises(ValueError, match="two runs of lru at one place: 0 and 1; --markdown takes one of each"):
        collect.markdown(table_of({}, {}), "tpot_ms")


@pytest.mark.slow
def test_a_folder_that_is_no_run_is_left_out_and_counted_and_truth_values_are_as_given(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "study").mkdir()
    (sweep / "study" / "DONE").write_text("0f3a\n")
    assert collect.main([str(sweep)]) == 0
    assert capsys.readouterr().out.endswith("; left out: 1 with a DONE that is no run's\n")
    text = (sweep / "table.csv").read_text()
    assert ",false," in text
    assert "False" not in text
    for name in ("table.csv", "table.parquet", "study/DONE"):
        (sweep / name).unlink()
    (sweep / "study").rmdir()


def test_runs_are_sorted_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    for name in ("b=16", "b=4", "b=1", "a=0.5", "a=0.25"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "DONE").write_text('{"asked": ""}')
    assert [path.name for path in collect.finished_runs(tmp_path)[0]] == ["a=0.25", "a=0.5", "b=1", "b=4", "b=16"]
