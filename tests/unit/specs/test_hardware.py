"""Every machine and stack file is complete, sourced and honest; what is out of range is refused."""

import math
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import yaml

from sim.machine.link import Link
from sim.paths import CONF
from sim.specs.hardware import Hardware, Stack, hardware_from_dict, stack_from_dict, unsourced

ROOT = CONF
HARDWARE = sorted(path.stem for path in (ROOT / "hardware").glob("*.yaml"))
STACKS = ["eager", "found", "graph", "launched"]
AS_PRINTED = {"a6000_as_printed": 64, "h20_as_printed": 128}


def raw(group: str, name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / group / f"{name}.yaml").read_text())
    return values


def hardware(name: str) -> Hardware:
    return hardware_from_dict(raw("hardware", name))


def stack(name: str) -> Stack:
    return stack_from_dict(raw("stack", name))


def differences(first: Hardware, second: Hardware) -> set[str]:
    return {item.name for item in fields(Hardware) if getattr(first, item.name) != getattr(second, item.name)}


# -- the files -----------------------------------------------------------------------------------------------


def test_every_file_is_listed_here() -> None:
    assert len(HARDWARE) >= 38
    assert sorted(path.stem for path in (ROOT / "stack").glob("*.yaml")) == STACKS


@pytest.mark.parametrize("name", HARDWARE)
def test_every_figure_of_every_machine_has_an_origin(name: str) -> None:
    machine = hardware(name)
    assert machine.name == name
    assert unsourced(machine) == []


@pytest.mark.parametrize("name", STACKS)
def test_every_figure_of_every_stack_has_an_origin(name: str) -> None:
    assert stack(name).name == name
    assert unsourced(stack(name)) == []


def test_a_figure_without_an_origin_is_found() -> None:
    values = raw("hardware", "a100")
    del values["sources"]["tflops"]
    assert unsourced(hardware_from_dict(values)) == ["tflops"]
    assert unsourced(Stack("bare", 1, 2)) == ["layer_overhead_ns", "head_overhead_ns"]


@pytest.mark.parametrize("name", AS_PRINTED)
def test_as_printed_differs_by_the_link_alone_and_says_two_way(name: str) -> None:
    printed, honest = hardware(name), hardware(name.removesuffix("_as_printed"))
    assert differences(printed, honest) == {"name", "link_gb_per_s", "sources"}
    assert printed.link_gb_per_s == AS_PRINTED[name]
    assert "two-way peak" in printed.sources["link_gb_per_s"].lower()
    assert "2510.26730" in printed.sources["link_gb_per_s"]


def test_the_ideal_link_is_the_a100_with_copies_in_no_time() -> None:
    ideal = hardware("ideal_link")
    assert differences(ideal, hardware("a100")) == {
        "name",
        "link",
        "link_gb_per_s",
        "pageable_gb_per_s",
        "link_latency_ns",
        "issue_copy_ns",
        "decide_ns",
        "sources",
    }
    assert math.isinf(ideal.link_gb_per_s)  # type: ignore[arg-type]
    assert ideal.link_latency_ns == ideal.issue_copy_ns == ideal.decide_ns == 0


def test_copies_on_the_h200_take_as_long_as_was_measured() -> None:
    # us a copy, eight to 64 in a row enqueued behind a spinning kernel, by KiB.
    measured = {64: 3.78, 256: 7.55, 1024: 21.94, 2048: 40.94, 4096: 78.37, 8192: 154.93, 16384: 305.39, 65536: 1214.06}
    link = Link(hardware("h200"))
    errors = {size: link.chunk_ns(size << 10, False) / 1000 / us - 1 for size, us in measured.items()}
    assert max(map(abs, errors.values())) < 0.05, errors
    assert max(abs(error) for size, error in errors.items() if size >= 1024) < 0.025, errors


def test_the_h200_says_of_every_figure_whether_it_was_measured() -> None:
    sources = hardware("h200").sources
    origins = {key: text.split()[0] for key, text in sources.items()}
    assert {key for key, word in origins.items() if word == "measured"} == {
        "link_gb_per_s",
        "pageable_gb_per_s",
        "memory_efficiency",
        "compute_efficiency",
        "link_latency_ns",
        "launch_host_ns",
        "issue_copy_ns",
        "decide_ns",
    }
    assert {key for key, word in origins.items() if word == "assumption:"} == {
        "launch_latency_ns",
        "gate_sync_ns",
        "token_sync_ns",
        "link_slowdown",
    }
    assert all("2026-11-27" in text for key, text in sources.items() if origins[key] == "measured")


def test_eager_costs_a_millisecond_a_layer_and_graph_a_fiftieth() -> None:
    assert stack("eager").layer_overhead_ns == 1_000_000
    assert stack("graph").layer_overhead_ns == 20_000


# -- refusals ------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
REFUSED: list[tuple[str, Any, str]] = [
    (
        "link_gb_per_s",
        0.0,
        r"hardware\.link_gb_per_s=0\.0 is outside \[0\.0001, 1e\+06\] GB/s or inf; give GB/s in one direction",
    ),
    ("link_gb_per_s", -25.0, r"link_gb_per_s=-25\.0 is outside"),
    ("link_gb_per_s", NAN, r"link_gb_per_s=nan is outside"),
    ("link_gb_per_s", 2039.1, r"link_gb_per_s=2039\.1 is above memory_gb_per_s=2039\.0, into which it copies; give"),
    ("link_gb_per_s", (), r"link_gb_per_s=\(\) has no points"),
    ("link_gb_per_s", ((1024, 0.0),), r"link_gb_per_s\[1024 bytes\]=0\.0 is outside"),
    ("link_gb_per_s", ((1024, INF),), r"link_gb_per_s\[1024 bytes\]=inf is outside"),
    ("link_gb_per_s", ((1024, 5.0), (1024, 6.0)), r"\[1024 bytes\] follows 1024 bytes; sizes must rise"),
    ("link_gb_per_s", ((0, 5.0),), r"\[0 bytes\] follows 0 bytes; sizes must rise and be at least 1"),
    (
        "pageable_gb_per_s",
        0.0,
        r"pageable_gb_per_s=0\.0 is outside \[0\.0001, 1e\+06\] GB/s or inf; give GB/s of a copy",
    ),
    ("memory_gb", 0.0, r"memory_gb=0\.0 is outside \[0\.001, 100000\] GB"),
    ("memory_gb_per_s", NAN, r"memory_gb_per_s=nan is outside"),
    ("memory_gb_per_s", INF, r"memory_gb_per_s=inf is outside"),
    ("tflops", -1.0, r"tflops=-1\.0 is outside .*dense bf16"),
    ("memory_efficiency", 1.01, r"memory_efficiency=1\.01 is outside \[0\.001, 1\]; give the share of the peak"),
    ("compute_efficiency", 0.0, r"compute_efficiency=0\.0 is outside"),
    ("link_slowdown", 0.99, r"link_slowdown=0\.99 is outside \[1, 1000\]"),
    ("link_latency_ns", -1, r"link_latency_ns=-1 is outside \[0, 1e\+09\] ns; give whole nanoseconds"),
    ("decide_ns", 1_000_000_001, r"decide_ns=1000000001 is outside"),
    ("sources", {"flops": "x"}, r"sources\.flops is no figure; valid keys: compute_efficiency"),
    ("sources", {"tflops": " "}, r"sources\.tflops=' ' must be text"),
    ("sources", ["x"], r"sources=\['x'\] must map each figure's key to its origin"),
    ("name", "", r"hardware\.name='' must be text"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_a_value_out_of_range_is_refused_with_its_range(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        replace(hardware("a100"), **{key: value})
    # SimPy re-raises an error from its arguments: there must be one.
    assert len(caught.value.args) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory_efficiency", 1.0),
        ("link_slowdown", 1.0),
        ("link_latency_ns", 0),
        ("decide_ns", 10**9),
        ("link_gb_per_s", 2039.0),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(key: str, value: Any) -> None:
    assert getattr(replace(hardware("a100"), **{key: value}), key) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_gbps": 1}, r"hardware\.memory_gbps is no key \(did you mean hardware\.memory_gb"),
        ({"tflops": "312"}, r"hardware\.tflops='312' must be a number"),
        ({"decide_ns": 2e4}, r"hardware\.decide_ns=20000\.0 must be a whole number"),
        ({"link_gb_per_s": "25"}, r"link_gb_per_s='25' must be a number .*, or a list of \[bytes, GB/s\]"),
        ({"link_gb_per_s": True}, r"link_gb_per_s=true must be a number"),
        ({"link_gb_per_s": [1024, 5.0]}, r"1024 must be a point \[bytes, GB/s\]"),
        ({"link_gb_per_s": [[1024.5, 5.0]]}, r"\[1024\.5, 5\.0\] must be a point"),
        ({"link_gb_per_s": [[1024, 5.0, 1]]}, r"\[1024, 5\.0, 1\] must be a point"),
    ],
)
def test_a_mapping_with_a_wrong_key_or_type_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hardware_from_dict({**raw("hardware", "a100"), **changes})


def test_a_missing_link_is_named_and_not_assumed() -> None:
    values = raw("hardware", "a100")
    del values["link_gb_per_s"]
    with pytest.raises(ValueError, match=r"hardware lacks link_gb_per_s; choose another file of the group hardware"):
        hardware_from_dict(values)


def test_a_measured_curve_is_taken_from_a_list_of_points() -> None:
    curve = [[65536, 10], [4194304, 24.5]]
    machine = hardware_from_dict({**raw("hardware", "a100"), "link_gb_per_s": curve})
    assert machine.link_gb_per_s == ((65536, 10.0), (4194304, 24.5))
    # A resolved configuration holds plain lists again: it builds the same machine.
    assert hardware_from_dict({**asdict(machine), "link_gb_per_s": curve}) == machine


def test_a_stack_is_checked_like_hardware() -> None:
    with pytest.raises(ValueError, match=r"stack\.layer_overhead_ns=-1 is outside"):
        Stack("bad", -1, 0)
    with pytest.raises(ValueError, match=r"stack\.head_overhead is no key .*did you mean stack\.head_overhead_ns"):
        stack_from_dict({"name": "bad", "head_overhead": 0})
    with pytest.raises(ValueError, match=r"stack\.name='' must be text"):
        Stack("", 0, 0)
