"""`link=NAME`: what the host gives a card in place of its profile's link; every result says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sim.collect import collect, markdown
from sim.job.configure import configure
from sim.job.link import chosen_link, with_link
from sim.job.setup import make_workload
from sim.paths import use_own_folder
from tests.cli.test_bad_input import assert_refused
from tests.cli.test_help import help_of
from tests.support.commands import run_here, small_trace
from tests.support.replays import replay_here

LRU = ("+policy=lru", "compare=none", "max_tokens=8")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("link") / "t.safetensors")


def hardware(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = configure([*LRU, *words])["hardware"]
    return found


# -- what it sets --------------------------------------------------------------------------------------------


def test_a_link_sets_the_rate_of_copies_and_says_where_it_is_from() -> None:
    found, before = hardware("+hardware=rtx4090", "link=pcie4x8"), hardware("+hardware=rtx4090")
    assert found["link_gb_per_s"] == 12.351  # 0.784 of 15.754
    assert found["sources"]["link_gb_per_s"].startswith("assumption: link=pcie4x8, 0.784 of 15.754 GB/s: as 24.7 of")
    measured = hardware("+hardware=rtx4090", "link=pcie4x16")["sources"]["link_gb_per_s"]
    assert measured.startswith("link=pcie4x16, 0.784 of 31.508 GB/s: GitHub efeslab/fiddler#7: 24.66 GB/s are measured")
    changed = {key for key in found if found[key] != before[key]}
    assert changed == {"link_gb_per_s", "sources"}


def test_by_default_the_profile_counts() -> None:
    assert hardware("+hardware=rtx4090") == hardware("+hardware=rtx4090", "link=profile")
    assert hardware("+hardware=rtx4090")["link_gb_per_s"] == 25.6
    assert hardware("+hardware=rtx4090", "hardware.link_gb_per_s=20")["link_gb_per_s"] == 20


def test_pageable_copies_are_no_faster_than_the_link() -> None:
    found = hardware("+hardware=rtx4090", "link=pcie3x4")
    assert found["pageable_gb_per_s"] == found["link_gb_per_s"] == 3.001
    assert "link=pcie3x4" in found["sources"]["pageable_gb_per_s"]
    assert hardware("+hardware=rtx4090", "link=pcie4x8")["pageable_gb_per_s"] == 6.0


@pytest.mark.parametrize(
    ("card", "asked", "agreed"),
    [
        ("rtx4090", "pcie5x16", "pcie4x16"),
        ("rtx4090", "pcie5x8", "pcie4x8"),
        ("rtx4060ti", "pcie4x16", "pcie4x8"),
        ("rtx4060ti", "pcie3x16", "pcie3x8"),
        ("rtx5060ti", "pcie4x16", "pcie4x8"),
        ("rtx2080", "pcie4x4", "pcie3x4"),
        ("rtx5090", "pcie4x4", "pcie4x4"),
        ("gh200", "nvlink_c2c", "nvlink_c2c"),
    ],
)
def test_card_and_host_agree_on_the_lower_generation_and_the_fewer_lanes(card: str, asked: str, agreed: str) -> None:
    cfg = configure([*LRU, f"+hardware={card}", f"link={asked}"])
    chosen = chosen_link(cfg)
    assert chosen is not None
    assert (chosen.link.name, chosen.asked) == (agreed, asked)
    assert (f"of {asked})" in chosen.source) is (agreed != asked)
    assert cfg["hardware"]["link_gb_per_s"] == chosen.link.gb_per_s
    assert with_link(cfg) == cfg


def test_another_share_of_the_peak_can_be_given() -> None:
    found = hardware("+hardware=rtx4090", "link=pcie4x8", "link.share=0.9")
    assert found["link_gb_per_s"] == 14.179


def test_what_the_card_takes_can_be_given_for_a_profile_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "hardware").mkdir()
    (tmp_path / "link").mkdir()
    plain = hardware("+hardware=a100")
    mine = {key: value for key, value in plain.items() if key not in ("link", "sources")} | {"name": "mine"}
    (tmp_path / "hardware" / "mine.yaml").write_text(yaml.safe_dump(mine), encoding="utf-8")
    riser = {"name": "riser", "family": "pcie", "generation": 4, "lanes": 4, "peak_gb_per_s": 7.877, "share": 0.5}
    (tmp_path / "link" / "riser.yaml").write_text(yaml.safe_dump(riser), encoding="utf-8")
    use_own_folder(tmp_path)
    try:
        with pytest.raises(ValueError, match=r"hardware='mine' does not say which link its card takes; add \+hardware"):
            hardware("+hardware=mine", "link=riser")
        found = hardware("+hardware=mine", "+hardware.link=pcie4x16", "link=riser")
        assert found["link_gb_per_s"] == 3.938
        assert found["sources"]["link_gb_per_s"] == "link=riser, 0.5 of 7.877 GB/s: as given"
        with pytest.raises(ValueError, match=r"link=riser on pcie3x1: 'pcie3x1' is no file|does not count|link=riser"):
            hardware("+hardware=mine", "+hardware.link=pcie3x1", "link=riser", "link.share=0.6")
    finally:
        use_own_folder(None)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (
            ["+hardware=rtx4090", "link=pcie4x8", "hardware.link_gb_per_s=10"],
            ("link=pcie4x8", "hardware.link_gb_per_s=10"),
        ),
        (
            ["+hardware=rtx4090", "hardware.pageable_gb_per_s=3", "link=pcie4x8"],
            ("link=pcie4x8", "pageable_gb_per_s=3"),
        ),
        (["+hardware=gh200", "link=pcie4x8"], ("link=pcie4x8", "'gh200'", "nvlink_c2c")),
        (["+hardware=rtx4090", "link=nvlink_c2c"], ("link=nvlink_c2c", "'rtx4090'", "pcie4x16")),
        (["+hardware=ideal_link", "link=pcie4x8"], ("link=pcie4x8", "'ideal_link'", "+hardware.link=NAME")),
        (["+hardware=rtx4090", "link=pcie9x8"], ("link=pcie9x8", "did you mean")),
        (["+hardware=rtx4090", "link=null"], ("link=null", "name of one file")),
        (["+hardware=rtx4090", "+link.share=0.5"], ("link.share", "link=profile")),
        (["+hardware=rtx4090", "link=pcie5x8", "link.share=0.5"], ("link=pcie5x8", "pcie4x16", "link=pcie4x8")),
        (["+hardware=rtx4090", "link=pcie4x8", "hardware.link=x99"], ("hardware.link", "'x99'", "pcie4x16")),
        (["+hardware=rtx4090", "link=pcie4x8", "link.family=usb"], ("link.family='usb'", "pcie, c2c")),
    ],
)
def test_what_contradicts_or_cannot_be_is_refused(words: list[str], names: tuple[str, ...], tmp_path: Path) -> None:
    assert_refused(run_here([*LRU, *words], tmp_path / "run"), names)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["+hardware=local"], ("link=pcie4x8", "hardware=local")),
        (["+hardware=a100", "throttle_gb_per_s=1"], ("link=pcie4x8", "throttle_gb_per_s=1")),
    ],
)
def test_a_replay_refuses_a_link_that_nothing_would_follow(
    words: list[str], names: tuple[str, ...], trace: Path, tmp_path: Path
) -> None:
    told = ["+policy=lru", f"trace.path={trace}", "machine=cpu", "scale=64", "link=pcie4x8", *words]
    assert_refused(replay_here(told, tmp_path / "run"), names)


# -- results -------------------------------------------------------------------------------------------------


def test_a_result_says_the_link_and_what_was_asked_and_one_without_says_nothing(trace: Path, tmp_path: Path) -> None:
    words = ["+hardware=rtx4060ti", "+policy=lru", "compare=none", f"trace.path={trace}"]
    plain, found = run_here(words, tmp_path / "plain"), run_here([*words, "link=pcie4x16"], tmp_path / "run")
    assert "link_preset" not in plain.metrics()
    preset = found.metrics()["link_preset"]
    assert {key: preset[key] for key in ("name", "asked", "gb_per_s")} == {
        "name": "pcie4x8",
        "asked": "pcie4x16",
        "gb_per_s": 12.351,
    }
    assert preset["source"].startswith("assumption: link=pcie4x8 (the card takes no more of pcie4x16), 0.784")
    assert "on rtx4060ti (link pcie4x8 of pcie4x16, 12.4 GB/s), eager stack" in found.out
    assert "on rtx4060ti, eager stack" in plain.out


@pytest.mark.slow
def test_a_sweep_over_links_gives_a_row_each(trace: Path, tmp_path: Path) -> None:
    words = ["-m", "+hardware=rtx5060ti,rtx5090", "+policy=lru", "link=pcie4x8,pcie4x16", "compare=none"]
    found = run_here(
        [*words, f"trace.path={trace}", "hydra.launcher.n_jobs=1", f"hydra.sweep.dir={tmp_path}"], tmp_path
    )
    assert found.code == 0, found.err
    table = collect(tmp_path)
    assert sorted(zip(table["hardware"], table["link_preset.name"], strict=True)) == [
        ("rtx5060ti", "pcie4x8"),
        ("rtx5060ti", "pcie4x8"),
        ("rtx5090", "pcie4x16"),
        ("rtx5090", "pcie4x8"),
    ]
    times = table.set_index(["hardware", "link_preset.asked"])["ms_per_token"]
    assert times["rtx5060ti", "pcie4x16"] == times["rtx5060ti", "pcie4x8"]
    stalls = table.set_index(["hardware", "link_preset.asked"])["stall_ms_per_token"]
    assert stalls["rtx5090", "pcie4x16"] < 0.6 * stalls["rtx5090", "pcie4x8"]
    head = markdown(table, "ms_per_token").splitlines()[0]
    for place in (
        "rtx5060ti pcie4x8 of pcie4x16 eager 50%",
        "rtx5060ti pcie4x8 eager 50%",
        "rtx5090 pcie4x16 eager 50%",
    ):
        assert f"| {place} " in head


def test_a_replay_on_the_cpu_is_paced_as_the_link(trace: Path, tmp_path: Path) -> None:
    words = ["+hardware=a100", "+policy=lru", f"trace.path={trace}", "machine=cpu", "scale=64", "link=pcie4x8"]
    found = replay_here(words, tmp_path / "run")
    assert found.code == 0, found.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["link_preset"]["name"] == "pcie4x8"
    assert "(link pcie4x8, 12.4 GB/s)" in found.out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sim", "replay"])
def test_help_lists_the_links(name: str) -> None:
    text = " ".join(help_of(name).split())
    assert "link: nvlink_c2c, pcie3x1, " in text


def test_slower_links_make_slower_runs(trace: Path) -> None:
    words = [*LRU, "+hardware=rtx5090", f"trace.path={trace}"]
    rates = [
        make_workload(configure([*words, f"link=pcie{generation}x{lanes}"])).hardware.link_gb_per_s
        for generation, lanes in ((3, 1), (3, 8), (4, 8), (5, 8), (5, 16))
    ]
    assert rates == [0.751, 6.002, 12.351, 28.798, 55.579]
