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
