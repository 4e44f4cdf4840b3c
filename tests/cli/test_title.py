"""A policy that the command has changed is shown as such, beside the baseline whose name it bears."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from sim.paths import config_files
from tests.support.commands import Outcome, run_here, small_trace
from traces.yamltext import read_yaml

MRU = "from expertflow.evictions.lru import LRU\n\n\nclass MRU(LRU):\n    pass\n"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("title") / "t.safetensors")


def ran(trace: Path, folder: Path, *words: str) -> Outcome:
    found = run_here(["+hardware=a100", f"trace.path={trace}", *words], folder)
    assert found.code == 0, found.err
    return found


def rows_of(text: str) -> list[str]:
    """The names in the table's first column."""
    lines = text.splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("policy "))
    end = next(place for place, line in enumerate(lines) if line.startswith("  stall"))
    return [line.split("  ")[0] for line in lines[first + 1 : end]]


def head_of(text: str) -> str:
    return re.sub(r" \(predictor: \w+\)$", "", text.splitlines()[0].split(" on a100")[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "title", "own"),
    [
        (["+policy=lru"], "lru", "lru"),
        (["+policy=lru", "policy/eviction=lru"], "lru", "lru"),
        (["+policy=lru", "policy/eviction=lfu"], "lru with eviction=lfu", "lru (changed)"),
        (["+policy=lru", "policy.eviction._target_=mru.MRU"], "lru with eviction=mru.MRU", "lru (changed)"),
        (["+policy=lru", "policy/transfer=pageable_serial"], "lru with transfer=pageable_serial", "lru (changed)"),
        (["+policy=fixed_1", "policy.horizon.depth=2"], "fixed_1 with horizon.depth=2", "fixed_1"),
        (["+policy=lru", "policy.name=mine"], "mine of lru.yaml", "mine"),
    ],
)
def test_the_head_names_what_was_changed_and_the_baseline_stays(
    words: list[str], title: str, own: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mru.py").write_text(MRU, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    text = ran(trace, tmp_path / "run", *words).out
    assert head_of(text) == title
    beside = [name for name in ("on_demand", "lru", "clairvoyant") if name != own]
    assert rows_of(text) == [own, *beside, "floor"]
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    sys.modules.pop("mru", None)


def test_the_name_of_a_baseline_is_marked_where_it_did_not_run_beside(trace: Path, tmp_path: Path) -> None:
    for words, own in (([], "lru"), (["policy/eviction=lfu"], "lru (changed)")):
        assert rows_of(ran(trace, tmp_path / "run", "+policy=lru", "compare=none", *words).out) == [own]


@pytest.mark.slow
def test_where_nothing_ran_beside_there_is_no_share_of_on_demand(trace: Path, tmp_path: Path) -> None:
    assert "of on-demand" not in ran(trace, tmp_path / "run", "+policy=lru", "compare=none").out
    assert "of on-demand" not in ran(trace, tmp_path / "floor", "+policy=lru", "compare=floor").out


def test_each_policy_of_the_package_bears_the_name_of_its_file() -> None:
    files = config_files("policy")
    assert {name: read_yaml(path)["name"] for name, path in files.items()} == {name: name for name in files}
