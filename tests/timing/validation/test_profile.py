"""From samples to costs, from copies to a link, from a record to configuration files: hand-computed."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from replay.calibrate import check_name
from replay.calibration.compared import check_rates, datasheet, print_beside
from replay.calibration.probe import steady_mean
from replay.calibration.profile import host_costs, profiles, simulated_as, slowed, summary
from replay.calibration.record import RECORD_VERSION, named_model, write_profile
from replay.calibration.undisturbed import MeasurementError
from sim.job.configure import configure
from sim.specs.hardware import Stack, hardware_from_dict, stack_from_dict, unsourced


def sample(mean: float, count: int = 100) -> dict[str, float]:
    """One kind of sample, as a record holds it."""
    return {"mean": mean, "count": count}


CHUNK_NS = 170_000
"""What a chunk takes behind another."""
SAMPLES = {
    "attention": sample(30_000.0),
    "head": sample(12_000.0),
    "experts": sample(34_000.0, 600),
    "kernel_start": sample(2_000.0),
    "issue": sample(5_000.0, 100),
    "issue_gap": sample(1_000.0, 50),
    "gate_sync": sample(11_000.0),
    "token_sync": sample(15_000.0),
    "decide": sample(20_000.0),
    "classify": sample(8_000.0),
    "observe": sample(3_000.0),
    "load_sync": sample(2_500.0),
    "lone_copy": sample(177_000.0),
    "forward": sample(40_000.0),
}


def record() -> dict[str, Any]:
    """A calibration that never was, with round figures."""
    sizes = [1 << power for power in range(16, 30)]
    rows = [
        {"bytes": size, "in_a_row_ns": 5_000 + size / 25.0, "alone_ns": 6_000 + size / 25.0, "pageable_ns": size / 6.0}
        for size in sizes
    ]
    tables = {"expert": [[1, 10_000], [8, 12_000]], "head": [[1, 300_000]], "attention": [[1, 20_000]], "kv": 0.5}
    return {
        "format": "expertflow-calibration",
        "version": RECORD_VERSION,
        "date": "2026-01-01",
        "device": {"name": "NVIDIA H200", "torch": "2.11", "memory_bytes": 141_000_000_000},
        "scale": 1,
        "memory_gb": 141.0,
        "launches": {"launch_host_ns": 9_000.0, "sync_ns": 4_000.0, "start_after_ns": 8_000.0},
        "pad_share": 1.02,
        "kv_grid": 0,
        "link_peak_gb_per_s": 63.0,
        "chunk_ns": {"gpt-oss-20b": CHUNK_NS},
        "link": rows,
        "memory_gb_per_s": 4_300.0,
        "matrix_tflops": 780.0,
        "chunked": {},
        "beside": {"gpt-oss-20b": {"bytes": 13_219_200, "idle_ns": 533_768.0, "busy_ns": 586_144.8}},
        "kernels": {"gpt-oss-20b": tables},
        "kernel_launch_ns": {"gpt-oss-20b": 1_500.4},
        "host": {"gpt-oss-20b": {"found": {"lru": SAMPLES | {"decide": sample(0.0)}, "adaptive": SAMPLES}}},
        "threads_share_interpreter": False,
        "decisions": {"adaptive": {"p50_ns": 20_000, "p99_ns": 60_000, "decide_ns": 18_000}},
    }


def test_the_slowest_thousandth_is_left_out_of_a_mean() -> None:
    assert steady_mean([10.0] * 999 + [1_000_000.0]) == 10.0
    assert steady_mean([10.0] * 99 + [1_010.0]) == 20.0
    assert steady_mean([10.0, 30.0]) == 20.0
    assert steady_mean([]) == 0.0


def test_costs_are_what_the_samples_say() -> None:
    costs = host_costs(SAMPLES, CHUNK_NS)
    assert (costs["launch_host_ns"], costs["launch_latency_ns"]) == (30_000, 2_000)
    assert costs["issue_copy_ns"] == 5_500
    # To say which experts takes 4 us more than a launch that says nothing; a chunk on an idle link, 7 more.
    names = ("gate_sync_ns", "token_sync_ns", "decide_ns", "classify_ns", "observe_ns", "forward_ns", "copy_start_ns")
    assert [costs[name] for name in names] == [11_000, 15_000, 20_000, 12_000, 9_500, 40_000, 7_000]


def test_a_kernel_that_starts_before_its_launch_returns_leaves_no_latency() -> None:
    costs = host_costs(SAMPLES | {"kernel_start": sample(-21_000.0)}, CHUNK_NS)
    assert (costs["launch_host_ns"], costs["launch_latency_ns"], costs["classify_ns"]) == (9_000, 0, 8_000 + 25_000)


def test_experts_launched_ahead_are_only_told_to_begin() -> None:
    ahead = {"release": sample(3_000.0), "release_start": sample(1_500.0), "ahead": sample(31_000.0)}
    costs = host_costs({**{name: row for name, row in SAMPLES.items() if name != "experts"}, **ahead}, CHUNK_NS)
    assert (costs["launch_host_ns"], costs["release_ns"], costs["release_latency_ns"]) == (30_000, 3_000, 1_500)
    # Nothing is described after a wake that a release does not describe.
    assert (costs["classify_ns"], costs["observe_ns"]) == (8_000, 5_500)
    costs = host_costs({**SAMPLES, **ahead, "release_start": sample(-1_000.0)}, CHUNK_NS)
    assert (costs["release_ns"], costs["release_latency_ns"]) == (2_000, 0)
    assert host_costs(SAMPLES, CHUNK_NS)["release_ns"] == 0


def test_a_policy_without_copies_or_decisions_costs_nothing_for_them() -> None:
    kept = {name: row for name, row in SAMPLES.items() if not name.startswith(("issue", "decide", "lone"))}
    costs = host_costs(kept, CHUNK_NS)
    assert (costs["issue_copy_ns"], costs["decide_ns"], costs["copy_start_ns"]) == (0, 0, 0)


def test_samples_are_kept_with_their_spread() -> None:
    found = summary({"issue": [float(number) for number in range(100)]})["issue"]
    assert found == {"mean": 49.5, "count": 100, "p10": 10.0, "p50": 50.0, "p90": 90.0}


def test_the_profile_is_one_that_simulations_take(tmp_path: Path) -> None:
    paths = write_profile(record(), "mine", tmp_path)
    hardware = hardware_from_dict(yaml.safe_load(paths[0].read_text()))
    stack = stack_from_dict(yaml.safe_load(paths[1].read_text()))
    assert (hardware.launch_latency_ns, stack.group_ns, stack.kv_grid) == (2_000, 1_500, 0)
    assert (hardware.link_gb_per_s, hardware.link_latency_ns) == (pytest.approx(25.0), 5_000)
    assert (unsourced(hardware), unsourced(stack)) == ([], [])
    assert (hardware.name, stack.name, stack.layer_overhead_ns) == ("mine", "mine", 0)
    assert hardware.link_slowdown == pytest.approx((586_144.8 - 5_000) / (533_768 - 5_000), abs=1e-4)
    assert hardware.pageable_gb_per_s == pytest.approx(6.0)
    assert hardware.kernel_ns["gpt-oss-20b"].expert[1] == (8, 12_000)
    assert json.loads(paths[2].read_text())["format"] == "expertflow-calibration"
    assert "replay.calibrate" in paths[0].read_text().splitlines()[0]


def test_kernels_that_were_captured_tell_the_lengths_they_were_captured_for() -> None:
    raw = record() | {"kv_grid": 256}
    stack = profiles(raw, "mine")[1]
    assert stack["kv_grid"] == 256
    assert stack["sources"]["kv_grid"].startswith("definition")
    eager = stack_from_dict(configure(["+hardware=a100", "+policy=lru"])["stack"])
    assert simulated_as(raw, "mine", "gpt-oss-20b", "lru", eager)[1].kv_grid == 256


@pytest.mark.parametrize("busy_ns", [5_000_000_000.0, 6_000_000.0])
def test_a_slowdown_that_no_kernel_causes_is_never_written(busy_ns: float, tmp_path: Path) -> None:
    raw = record()
    raw["beside"]["gpt-oss-20b"]["busy_ns"] = busy_ns
    with pytest.raises(MeasurementError, match=r"link_slowdown=.*calibrate again"):
        write_profile(raw, "mine", tmp_path)
    assert not list(tmp_path.rglob("*.yaml"))


def test_a_link_that_is_faster_than_it_can_be_is_never_written(tmp_path: Path) -> None:
    raw = record() | {"link_peak_gb_per_s": 24.0}
    with pytest.raises(MeasurementError, match=r"25 GB/s on a link of 24"):
        write_profile(raw, "mine", tmp_path)
    assert not list(tmp_path.rglob("*.yaml"))


def test_pageable_copies_that_are_faster_than_the_link_are_never_written(tmp_path: Path) -> None:
    raw = record()
    for row in raw["link"]:
        row["pageable_ns"] = row["bytes"] / 640.0
    with pytest.raises(MeasurementError, match=r"pageable copies .* 640 GB/s on a link of 63 at most"):
        write_profile(raw, "mine", tmp_path)
    assert not list(tmp_path.rglob("*.yaml"))


def test_a_profile_tells_the_decision_of_effort_one() -> None:
    raw = record()
    raw["decisions"]["adaptive"]["effort"] = 2.5
    assert profiles(raw, "mine")[0]["decide_ns"] == 8_000
    # A replay is simulated with all that was measured of its own policy.
    eager = stack_from_dict(configure(["+hardware=a100", "+policy=lru"])["stack"])
    assert simulated_as(raw, "mine", "gpt-oss-20b", "adaptive", eager)[0].decide_ns == 20_000


def test_each_policy_is_simulated_with_its_own_costs_and_pads_as_they_last() -> None:
    eager = stack_from_dict(configure(["+hardware=a100", "+policy=lru"])["stack"])
    hardware, stack = simulated_as(record(), "mine", "gpt-oss-20b", "lru", eager)
    assert (hardware.decide_ns, stack.layer_overhead_ns, stack.classify_ns) == (0, 1_020_000, 12_000)
    assert simulated_as(record(), "mine", "gpt-oss-20b", "adaptive", eager)[0].decide_ns == 20_000
    # Of what was not measured the nearest is taken: another stack, another policy. A model has to be measured.
    other = simulated_as(record(), "mine", "gpt-oss-20b", "oracle", Stack("none", 0, 0))
    assert other[0].decide_ns == 0
    assert other[1].layer_overhead_ns == 0
    with pytest.raises(ValueError, match="mixtral-8x7b is not in the calibration"):
        simulated_as(record(), "mine", "mixtral-8x7b", "lru", eager)


def test_where_threads_wait_for_each_other_kernels_are_taken_as_they_ran_in_place() -> None:
    runs = {
        "run attention": sample(45_000.0),
        "run head": sample(605_000.0),
        "run experts[1]": sample(25_000.0),
        "run experts_shared[3]": sample(65_000.0),
        "run experts[2]": sample(9.0, 3),
    }
    table, launch = slowed(record()["kernels"]["gpt-oss-20b"], SAMPLES | runs)
    # Through (1, 25000) and (3, 65000): 20 us each, 5 us for the launch; three samples of two experts are too few.
    assert launch == pytest.approx(5_000)
    assert table["expert"] == [[1, 20_000], [8, 24_000]]
    assert (table["attention"], table["head"], table["kv"]) == ([[1, 40_000]], [[1, 600_000]], 0.5)
    raw = record() | {"threads_share_interpreter": True}
    raw["host"]["gpt-oss-20b"]["found"]["adaptive"] = SAMPLES | runs
    hardware, stack = profiles(raw, "mine")
    assert (stack["group_ns"], hardware["kernel_ns"]["gpt-oss-20b"]["expert"][0]) == (5_000, [1, 20_000])


def test_a_measured_machine_is_compared_with_the_datasheet_of_its_name() -> None:
    found = datasheet("NVIDIA H200")
    assert found is not None
    assert found[0] == "h200"
    assert datasheet("NVIDIA GeForce RTX 4090") is not None
    assert datasheet("NVIDIA H20")[0] == "h20"  # type: ignore[index]
    assert datasheet("x86_64") is None


@pytest.mark.parametrize(
    ("device", "profile"),
    [
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090ti"),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx4070tisuper"),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100_40"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A5000", "a5000"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtxpro6000"),
        ("NVIDIA GB200", None),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_card_is_not_taken_for_another_with_part_of_its_name(device: str, profile: str | None) -> None:
    found = datasheet(device)
    assert (None if found is None else found[0]) == profile


@pytest.mark.parametrize(
    ("device", "figures", "message"),
    [
        ("NVIDIA H200", {"memory_gb_per_s": 5_999.0, "matrix_tflops": 1_236.0}, ""),
        ("NVIDIA H200", {"memory_gb_per_s": 6_001.0}, "memory at 6001 GB/s, of which the datasheet of h200 has 4800"),
        ("NVIDIA H200", {"matrix_tflops": 1_237.0}, "matrices at 1237 TFLOPS, of which the datasheet of h200 has 989"),
        # Of a card that is not known nothing is.
        ("NVIDIA H900", {"memory_gb_per_s": 1e6, "matrix_tflops": 1e6}, ""),
    ],
)
def test_rates_that_no_card_of_its_name_has_are_refused(device: str, figures: dict[str, float], message: str) -> None:
    raw = record() | {"memory_gb_per_s": 1.0, "matrix_tflops": 1.0} | figures
    raw["device"] = raw["device"] | {"name": device}
    if not message:
        check_rates(raw)
        return
    with pytest.raises(MeasurementError, match=message):
        check_rates(raw)


def test_every_figure_stands_beside_the_last_ones_and_the_datasheets() -> None:
    raw = record() | {
        "pad_share": 1.0,
        "python_loop_ns": [1_000_000, 2_000_000],
        "prompt": {"gpt-oss-20b": {"attention": {"host_ns": 2_000, "device_ns": 3_000}}},
    }
    raw["device"] = raw["device"] | {"name": "NVIDIA H200"}
    hardware, stack = profiles(raw, "mine")
    last = {**hardware, **stack, "classify_ns": 77_777, "memory_gb_per_s": 4_444.0}
    last["kernel_ns"] = {name: table | {"head": [[1, 123_000]]} for name, table in hardware["kernel_ns"].items()}
    out = StringIO()
    print_beside(Console(file=out, width=200), hardware, stack, raw, last)
    lines = {line.strip().split("  ")[0]: line for line in out.getvalue().splitlines()}
    asked = {key for key in hardware | stack if key not in ("name", "sources", "kernel_ns") and "efficiency" not in key}
    assert asked <= set(lines)
    assert "77,777" in lines["classify_ns"]
    assert "4,444" in lines["memory_gb_per_s"]
    assert "4800.0 x 0.877" in lines["memory_gb_per_s"]
    assert lines["head, tokens 1"].split()[-4:] == ["300", "us", "123", "us"]
    assert lines["expert, tokens 1 to 8"].split()[5:9] == ["10", "to", "12", "us"]
    assert max(map(len, out.getvalue().splitlines())) <= 80
    # Without a calibration before this one, and of no card that is known.
    raw["device"] = raw["device"] | {"name": "x86_64"}
    out = StringIO()
    print_beside(Console(file=out, width=200), hardware, stack, raw, {})
    assert "shipped" not in out.getvalue()


@pytest.mark.parametrize("name", ["local", "auto", "", "a/b", "..", "a b", "x.yaml"])
def test_a_name_that_is_no_file_of_ours_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="NAME="):
        check_name(name)


def test_an_unknown_model_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"choose from: .*gpt-oss-20b"):
        named_model("gpt-5")


def test_profiles_name_what_they_were_measured_with() -> None:
    hardware, stack = profiles(record(), "mine")
    for text in (*hardware["sources"].values(), *stack["sources"].values()):
        assert text.startswith(("measured 2026-01-01", "definition:"))
