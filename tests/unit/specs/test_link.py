"""Copies: t0 + bytes / bandwidth(bytes), chunked exactly, slowed while kernels run."""

from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sim.machine.link import Link
from sim.paths import CONF
from sim.specs.chunks import chunk_sizes
from sim.specs.curves import bandwidth_at
from sim.specs.hardware import Hardware, hardware_from_dict

FOLDER = CONF / "hardware"
MIXTRAL_EXPERT_BYTES = 3 * 4096 * 14336 * 2


def hardware(name: str) -> Hardware:
    return hardware_from_dict(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


# 5 µs, then 10 GB/s = 10 bytes a nanosecond.
PLAIN = replace(hardware("a100"), link_gb_per_s=10.0, pageable_gb_per_s=2.0, link_latency_ns=5000)
CURVE = ((1024, 4.0), (4096, 8.0), (16384, 10.0))


# -- one copy ------------------------------------------------------------------------------------------------


def test_a_copy_takes_t0_and_its_bytes_over_the_bandwidth() -> None:
    link = Link(PLAIN)
    assert link.chunk_ns(1_000_000, False) == 5000 + 100_000
    assert link.chunk_ns(1, False) == 5000
    assert isinstance(link.chunk_ns(1_000_003, False), int)


def test_pageable_memory_has_its_own_rate_and_no_curve() -> None:
    link = Link(replace(PLAIN, link_gb_per_s=CURVE), "pageable")
    assert link.chunk_ns(1_000_000, False) == 5000 + 500_000


def test_compute_slows_the_transfer_but_not_t0() -> None:
    link = Link(replace(PLAIN, link_slowdown=1.5))
    assert link.slowdown == 1.5
    assert link.chunk_ns(1_000_000, True) == 5000 + 150_000
    assert link.chunk_ns(1_000_000, False) == 5000 + 100_000


def test_without_a_slowdown_compute_does_not_matter() -> None:
    assert Link(PLAIN).chunk_ns(1_000_000, True) == Link(PLAIN).chunk_ns(1_000_000, False)


@pytest.mark.parametrize(
    ("num_bytes", "gb_per_s"),
    [(1, 4.0), (1023, 4.0), (1024, 4.0), (2048, 6.0), (4096, 8.0), (8192, 9.0), (16384, 10.0), (10**9, 10.0)],
)
def test_bandwidth_is_linear_in_log_bytes_and_clamped_at_the_ends(num_bytes: int, gb_per_s: float) -> None:
    assert bandwidth_at(CURVE, num_bytes) == pytest.approx(gb_per_s, rel=1e-12)
    expected_ns = 5000 + round(num_bytes / gb_per_s)
    assert Link(replace(PLAIN, link_gb_per_s=CURVE)).chunk_ns(num_bytes, False) == expected_ns


@given(st.integers(1, 10**9))
def test_between_the_points_bandwidth_stays_between_them(num_bytes: int) -> None:
    assert 4.0 <= bandwidth_at(CURVE, num_bytes) <= 10.0


def test_a_curve_of_one_point_is_one_rate() -> None:
    assert bandwidth_at(((4096, 7.0),), 1) == bandwidth_at(((4096, 7.0),), 10**9) == 7.0


# -- one expert ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expert_bytes", "chunk_bytes", "sizes"),
    [(12, 4, [4, 4, 4]), (13, 4, [4, 3, 3, 3]), (11, 4, [4, 4, 3]), (4, 4, [4]), (5, 4, [3, 2]), (3, 4, [3])],
)
def test_chunks_are_as_equal_as_bytes_allow(expert_bytes: int, chunk_bytes: int, sizes: list[int]) -> None:
    assert chunk_sizes(expert_bytes, chunk_bytes) == sizes


@given(st.integers(1, 100_000), st.integers(1, 5000))
def test_chunks_add_up_fit_and_are_as_few_as_possible(expert_bytes: int, chunk_bytes: int) -> None:
    sizes = chunk_sizes(expert_bytes, chunk_bytes)
    assert sum(sizes) == expert_bytes
    assert 1 <= min(sizes) <= max(sizes) <= min(chunk_bytes, min(sizes) + 1)
    assert (len(sizes) - 1) * chunk_bytes < expert_bytes


def test_the_fastest_load_is_its_chunks_back_to_back() -> None:
    link = Link(PLAIN, chunk_bytes=500_000)
    assert link.fastest_load_ns(1_000_000) == 2 * (5000 + 50_000)
    assert link.fastest_load_ns(1_000_000, 1_000_000) == 5000 + 100_000
    # More than two chunks hold costs a third t0.
    assert link.fastest_load_ns(1_000_020) == 3 * (5000 + 33_334)


def test_no_busy_gpu_makes_a_load_faster_than_the_fastest() -> None:
    link = Link(replace(PLAIN, link_slowdown=1.3), chunk_bytes=400_000)
    busy_ns = sum(link.chunk_ns(size, True) for size in chunk_sizes(1_000_000, 400_000))
    assert link.fastest_load_ns(1_000_000) < busy_ns


@pytest.mark.parametrize("memory", ["pinned", "pageable"])
def test_the_ideal_link_copies_in_no_time(memory: str) -> None:
    link = Link(hardware("ideal_link"), memory)
    assert link.chunk_ns(10**12, True) == link.chunk_ns(1, False) == 0
    assert link.fastest_load_ns(MIXTRAL_EXPERT_BYTES, 1 << 20) == 0


def test_a_mixtral_expert_reaches_a_4090_as_fast_as_was_measured() -> None:
    # GitHub efeslab/fiddler#7: 13.30 ms, one pinned copy.
    load_ms = Link(hardware("rtx4090")).chunk_ns(MIXTRAL_EXPERT_BYTES, False) / 1e6
    assert load_ms == pytest.approx(13.30, rel=0.05)


# -- refusals ------------------------------------------------------------------------------------------------


def test_unknown_memory_and_empty_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"link memory='mmap' is unknown; choose pinned or pageable"):
        Link(PLAIN, "mmap")
    with pytest.raises(ValueError, match=r"chunk_bytes=0 must be at least 1; raise chunk_mib"):
        Link(PLAIN, chunk_bytes=0)
    with pytest.raises(ValueError, match=r"chunk_bytes=0 must be at least 1"):
        chunk_sizes(10, 0)
    with pytest.raises(ValueError, match=r"expert_bytes=0 must be at least 1"):
        chunk_sizes(0, 10)
    with pytest.raises(AssertionError, match="a chunk of 0 bytes"):
        Link(PLAIN).chunk_ns(0, False)
