"""The cards of conf/hardware and the links of conf/link: figures that follow from others do, and none is beyond a peak.

Compute follows from the multiprocessors, their clock and what one of them multiplies and adds a clock; the rate of the
memory from the width and the pace of its bus.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import yaml

from sim.paths import CONF
from sim.specs.hardware import Hardware, hardware_from_dict, unsourced
from sim.specs.links import PCIE_GT_PER_S, LinkPreset, link_from_dict, pcie_peak_gb_per_s

LINKS = sorted(path.stem for path in (CONF / "link").glob("*.yaml") if path.stem != "profile")
CARDS = sorted(path.stem for path in (CONF / "hardware").glob("*.yaml"))
REAL = [name for name in CARDS if name != "ideal_link" and not name.endswith("_as_printed")]

# Multiprocessors, GHz, multiply-adds a clock of one (fp16 or bf16 summed in fp32), bits of the memory bus, Gbit/s.
PARTS: dict[str, tuple[int, float, int, int, float]] = {
    "rtx2080": (46, 1.71, 256, 256, 14),
    "rtx2080ti": (68, 1.545, 256, 352, 14),
    "rtx3060": (28, 1.777, 256, 192, 15),
    "rtx3070": (46, 1.725, 256, 256, 14),
    "rtx3080": (68, 1.71, 256, 320, 19),
    "rtx3090": (82, 1.695, 256, 384, 19.5),
    "rtx3090ti": (84, 1.86, 256, 384, 21),
    "rtx4060ti": (34, 2.535, 256, 128, 18),
    "rtx4070tisuper": (66, 2.61, 256, 256, 21),
    "rtx4080": (76, 2.505, 256, 256, 22.4),
    "rtx4090": (128, 2.52, 256, 384, 21),
    "rtx5060ti": (36, 2.572, 256, 128, 28),
    "rtx5070": (48, 2.512, 256, 192, 28),
    "rtx5070ti": (70, 2.452, 256, 256, 28),
    "rtx5080": (84, 2.617, 256, 256, 30),
    "rtx5090": (170, 2.407, 256, 512, 28),
    "a10": (72, 1.695, 512, 384, 12.5),
    "a40": (84, 1.74, 512, 384, 14.5),
    "a5000": (64, 1.695, 512, 384, 16),
    "a6000": (84, 1.8, 512, 384, 16),
    "l4": (58, 2.04, 512, 192, 12.5),
    "l40s": (142, 2.49, 512, 384, 18),
    "t4": (40, 1.59, 512, 256, 10),
    "v100": (80, 1.53, 512, 4096, 1.75),
    "rtx6000ada": (142, 2.505, 512, 384, 20),
    "rtxpro6000": (188, 2.617, 512, 512, 28),
    "a100": (108, 1.41, 1024, 5120, 3.19),
    "a100_40": (108, 1.41, 1024, 5120, 2.43),
    "mi210": (104, 1.7, 512, 4096, 3.2),
    "mi300x": (304, 2.1, 1024, 8192, 5.2),
    "h100": (132, 1.83, 2048, 5120, 5.23),
    "h200": (132, 1.83, 2048, 6144, 6.25),
}


def link(name: str) -> LinkPreset:
    return link_from_dict(yaml.safe_load((CONF / "link" / f"{name}.yaml").read_text()))


def card(name: str) -> Hardware:
    values: dict[str, Any] = yaml.safe_load((CONF / "hardware" / f"{name}.yaml").read_text())
    return hardware_from_dict(values)


# -- links ---------------------------------------------------------------------------------------------------


def test_every_generation_has_every_number_of_lanes() -> None:
    assert sorted(LINKS) == sorted(
        ["nvlink_c2c", *(f"pcie{generation}x{lanes}" for generation in (3, 4, 5) for lanes in (1, 2, 4, 8, 16))]
    )


@pytest.mark.parametrize("name", LINKS)
def test_a_link_says_its_name_its_peak_and_where_its_share_is_from(name: str) -> None:
    found = link(name)
    assert found.name == name
    assert set(found.sources) == {"peak_gb_per_s", "share"}
    if found.family == "pcie":
        assert name == f"pcie{found.generation}x{found.lanes}"
        assert found.peak_gb_per_s == pytest.approx(pcie_peak_gb_per_s(found.generation, found.lanes), abs=1e-3)
    assert 0.7 < found.share < 0.95


def test_a_lane_carries_what_the_standard_says() -> None:
    # GB/s one way, as PCI-SIG's generations are commonly listed.
    listed = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938}
    assert {key: round(pcie_peak_gb_per_s(key, 1), 3) for key in PCIE_GT_PER_S} == listed
    assert pcie_peak_gb_per_s(4, 16) == pytest.approx(31.5, abs=0.01)


@pytest.mark.parametrize(
    ("name", "measured"),
    [("pcie3x16", 12.0), ("pcie4x16", 24.7), ("pcie5x16", 55.6), ("pcie5x8", 28.8), ("nvlink_c2c", 346.0)],
)
def test_a_link_reaches_what_was_measured(name: str, measured: float) -> None:
    assert link(name).gb_per_s == pytest.approx(measured, rel=0.003)


def test_more_lanes_and_a_later_generation_are_faster() -> None:
    for generation in (3, 4, 5):
        rates = [link(f"pcie{generation}x{lanes}").gb_per_s for lanes in (1, 2, 4, 8, 16)]
        assert rates == sorted(rates)
        assert all(1.8 < after / before < 2.2 for before, after in pairwise(rates))
    for lanes in (1, 2, 4, 8, 16):
        rates = [link(f"pcie{generation}x{lanes}").gb_per_s for generation in (3, 4, 5)]
        assert rates == sorted(rates)


def test_a_link_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"link\.share=1\.1 is outside \[0\.01, 1\]"):
        replace(link("pcie4x8"), share=1.1)
    with pytest.raises(ValueError, match=r"link\.sources\.shar is no figure; valid keys: family, generation"):
        replace(link("pcie4x8"), sources={"shar": "x"})
    with pytest.raises(ValueError, match=r"link lacks family, generation, lanes, peak_gb_per_s and 1 more"):
        link_from_dict({"name": "bare"})


# -- cards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_a_card_names_its_link_and_every_figure_has_an_origin(name: str) -> None:
    machine = card(name)
    assert machine.link in LINKS
    assert unsourced(machine) == []
    assert all(len(text) > 10 for text in machine.sources.values())


def test_a_card_without_the_origin_of_its_link_is_found() -> None:
    machine = card("a100")
    sources = {key: text for key, text in machine.sources.items() if key != "link"}
    assert unsourced(replace(machine, sources=sources)) == ["link"]
    assert unsourced(replace(machine, sources=sources, link=None)) == []


@pytest.mark.parametrize("name", REAL)
def test_copies_reach_a_plausible_share_of_the_link(name: str) -> None:
    machine = card(name)
    assert machine.link is not None
    assert isinstance(machine.link_gb_per_s, float)
    wide = link(machine.link)
    assert 0.7 * wide.peak_gb_per_s < machine.link_gb_per_s < 0.95 * wide.peak_gb_per_s
    # What a profile says and what its link says differ by less than machines do.
    assert machine.link_gb_per_s == pytest.approx(wide.gb_per_s, rel=0.12)
    assert machine.pageable_gb_per_s < machine.link_gb_per_s
    generation = f"PCIe {wide.generation} x{wide.lanes}" if wide.family == "pcie" else "NVLink-C2C"
    assert generation in machine.sources["link"]


def test_every_card_with_known_parts_is_checked() -> None:
    # Of the H20 no parts are published, the B200 has two dies, the GH200 is an H200's sibling with other memory.
    assert set(REAL) - set(PARTS) == {"b200", "gh200", "h20"}


@pytest.mark.parametrize("name", PARTS)
def test_compute_and_memory_follow_from_the_parts_of_the_card(name: str) -> None:
    processors, ghz, multiply_adds, bits, gbit_per_s = PARTS[name]
    machine = card(name)
    assert machine.tflops == pytest.approx(processors * ghz * multiply_adds * 2 / 1000, rel=0.01)
    assert machine.memory_gb_per_s == pytest.approx(bits * gbit_per_s / 8, rel=0.01)


@pytest.mark.parametrize("name", REAL)
def test_no_figure_is_one_with_sparsity_and_none_is_tiny(name: str) -> None:
    machine = card(name)
    # Bytes that memory delivers while it computes one operation: cards of seven years lie within a factor of ten.
    balance = machine.tflops * 1e12 / (machine.memory_gb_per_s * 1e9)
    assert 30 < balance < 460
    assert 8 <= machine.memory_gb <= 192
    assert not math.isinf(machine.link_gb_per_s)  # type: ignore[arg-type]
