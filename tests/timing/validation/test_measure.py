"""What a calibration measures, on a device whose durations are known; the link's fit and its peak, hand-computed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replay.calibration.measure import (
    MOST_SLOWDOWN,
    Copier,
    beside_copies_ns,
    chunked,
    copy_beside,
    launch_costs,
    link_curves,
    matrix_tflops,
    memory_gb_per_s,
    pad_share,
    sizes_of,
)
from replay.calibration.peak import link_peak_gb_per_s, pcie_gb_per_s
from replay.calibration.profile import link_fit
from replay.calibration.undisturbed import MeasurementError, undisturbed
from replay.machine.cpu import CpuDevice
from replay.machine.timing import nothing, programs_ns, span_ns
from tests.support.replays import on_cpu
from tests.support.scripted import PacedDevice

SIZES = [1 << power for power in range(16, 27)]


def rows(copy_ns: Callable[[int], float], sizes: list[int] | None = None) -> list[dict[str, Any]]:
    """What `link_curves` would have found on a link of this duration."""
    return [{"bytes": size, "in_a_row_ns": copy_ns(size)} for size in sizes or SIZES]


# -- the link's fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latency_ns", "gb_per_s"), [(0, 25.0), (1_700, 55.0), (5_000, 12.5), (40_000, 0.25)])
def test_latency_and_rate_are_found_again(latency_ns: int, gb_per_s: float) -> None:
    assert link_fit(rows(lambda size: latency_ns + size / gb_per_s), None) == (latency_ns, gb_per_s)


def test_small_and_large_sizes_count_alike() -> None:
    """By shares: 2 % on the largest size do not turn the latency of the smallest upside down."""
    given = rows(lambda size: 5_000 + size / 25.0)
    given[-1]["in_a_row_ns"] *= 1.02
    latency_ns, gb_per_s = link_fit(given, None)
    assert latency_ns == pytest.approx(5_000, rel=0.03)
    assert gb_per_s == pytest.approx(25.0, rel=0.02)


def test_a_link_that_slows_down_with_size_is_a_curve_without_latency() -> None:
    assert link_fit(rows({1000: 100, 2000: 400}.__getitem__, [1000, 2000]), None) == (0, [[1000, 10.0], [2000, 5.0]])


def test_a_link_that_is_no_line_is_a_curve_that_goes_through_every_size() -> None:
    given = rows(lambda size: 4_000 + size / (20.0 if size > 1 << 20 else 10.0))
    latency_ns, curve = link_fit(given, None)
    assert isinstance(curve, list)
    assert 0 < latency_ns <= 0.9 * given[0]["in_a_row_ns"]
    for row, (size, gb_per_s) in zip(given, curve, strict=True):
        assert size == row["bytes"]
        assert latency_ns + size / gb_per_s == pytest.approx(row["in_a_row_ns"], abs=1.0)


def test_a_curves_latency_leaves_the_fastest_copy_a_tenth_of_its_time() -> None:
    given = rows({1000: 100, 2000: 150, 3000: 100}.__getitem__, [1000, 2000, 3000])
    assert link_fit(given, None) == (90, [[1000, 100.0], [2000, 33.333333], [3000, 300.0]])


@pytest.mark.parametrize("peak", [25.0, 25.001, 63.0, None])
def test_a_rate_up_to_the_peak_is_taken(peak: float | None) -> None:
    assert link_fit(rows(lambda size: 5_000 + size / 24.999), peak) == (5_000, 24.999)


def test_a_rate_above_the_peak_is_refused() -> None:
    with pytest.raises(MeasurementError, match=r"25 GB/s on a link of 24\.99 at most.*calibrate again"):
        link_fit(rows(lambda size: 5_000 + size / 25.0), 24.99)


def test_one_size_of_a_curve_above_the_peak_is_refused() -> None:
    given = rows({1000: 100, 2000: 400}.__getitem__, [1000, 2000])
    assert link_fit(given, 10.0)[0] == 0
    with pytest.raises(MeasurementError, match=r"10 GB/s on a link of 9\.9 at most"):
        link_fit(given, 9.9)


@pytest.mark.parametrize("peak", [63.0, None])
@pytest.mark.parametrize("more_ns", [0.0, -1.0])
def test_copies_that_take_no_longer_for_more_bytes_are_refused(more_ns: float, peak: float | None) -> None:
    """No rate at all: a profile with an endless link would say that copies cost nothing."""
    with pytest.raises(MeasurementError, match="calibrate again when the machine is idle"):
        link_fit(rows({1000: 100.0, 2000: 100.0 + more_ns}.__getitem__, [1000, 2000]), peak)


@pytest.mark.parametrize("size", [1000, 70_001, 999_999])
def test_a_single_size_is_refused(size: int) -> None:
    times = [100.0, 103.1, 107.7, 99.3, 100.1, 98.7]
    for count in range(1, len(times) + 1):
        with pytest.raises(MeasurementError, match="measure more sizes"):
            link_fit([{"bytes": size, "in_a_row_ns": taken} for taken in times[:count]], None)


# -- the link's peak -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "lanes", "gb_per_s"),
    [
        (1, 16, 4.0),
        (2, 8, 4.0),
        (3, 16, 15.754),
        (4, 16, 31.508),
        (5, 16, 63.015),
        (5, 8, 31.508),
        (6, 16, 121.0),
    ],
)
def test_pcie_by_generation_and_lanes(generation: int, lanes: int, gb_per_s: float) -> None:
    assert pcie_gb_per_s(generation, lanes) == pytest.approx(gb_per_s, abs=0.001)


def test_a_generation_that_is_not_known_is_told() -> None:
    with pytest.raises(ValueError, match="generation 9 is unknown; known: 1, 2, 3, 4, 5, 6"):
        pcie_gb_per_s(9, 16)


@pytest.mark.parametrize(
    ("answer", "gb_per_s"),
    [
        ("NVIDIA H200, 5, 16\n", 63.015),
        ("NVIDIA A100-SXM4-80GB, 4, 16\nNVIDIA T4, 3, 8\n", 31.508),
        ("NVIDIA GH200 480GB, 5, 16\n", 450.0),
        ("NVIDIA GB200, [N/A], [N/A]\n", 450.0),
        ("NVIDIA H200, [N/A], [N/A]\n", None),
        ("NVIDIA H200, 9, 16\n", None),
        ("NVIDIA H200\n", None),
        ("no devices were found\n", None),
        ("\n", None),
        ("", None),
    ],
)
def test_what_nvidia_smi_says(answer: str, gb_per_s: float | None) -> None:
    found = link_peak_gb_per_s("cuda", answer)
    assert found == (None if gb_per_s is None else pytest.approx(gb_per_s, abs=0.001))


def test_nvidia_smi_is_asked_for_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(words: tuple[str, ...], **_: Any) -> Any:
        asked.append(words)
        return SimpleNamespace(stdout="NVIDIA H100, 5, 16\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert link_peak_gb_per_s("cpu") is None
    assert asked == []
    assert link_peak_gb_per_s("cuda") == pytest.approx(63.015, abs=0.001)
    assert asked[0][0] == "nvidia-smi"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("nvidia-smi"),
        PermissionError("nvidia-smi"),
        subprocess.CalledProcessError(9, "nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 20),
    ],
)
def test_without_nvidia_smi_nobody_knows(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert link_peak_gb_per_s("cuda") is None


# -- copies --------------------------------------------------------------------------------------------------


def line(num_bytes: int) -> int:
    """ns of a copy: 50 and 10 bytes a nanosecond."""
    return 50 + num_bytes // 10


def test_copies_in_a_row_are_timed_from_end_to_end() -> None:
    copier = Copier(PacedDevice(line), 4000)
    assert [copier.in_a_row_ns(size, count, 3) for size, count in ((4000, 1), (4000, 8), (1000, 3))] == [450, 450, 150]


def test_the_first_copy_of_a_row_waits_until_all_are_enqueued() -> None:
    """For a program of nothing: the row is then as long as its copies, whatever each call takes the host."""
    device = PacedDevice(line)
    Copier(device, 4000).in_a_row_ns(4000, 5, 1)
    assert device.launches[0].made.pad_ns == 20_000_000
    waits: list[int] = []
    whole = device.copy

    def copy(target: int, source: int, num_bytes: int, after: Any) -> Any:
        end = whole(target, source, num_bytes, after)
        waits.append(device.copies[-1].waits_for)
        return end

    device.copy = copy  # type: ignore[method-assign]
    Copier(device, 4000).in_a_row_ns(4000, 5, 1)
    assert waits == [2, 0, 0, 0, 0, 0]


def test_a_copy_alone_is_timed_from_its_issue() -> None:
    assert Copier(PacedDevice(line), 4000).alone_ns(2000, 3) == 250


def test_a_copy_that_the_call_itself_makes_is_timed_from_the_call() -> None:
    device = PacedDevice(line)
    whole = device.copy

    def copy(target: int, source: int, num_bytes: int, after: Any) -> Any:
        device.clock_ns += 900
        return whole(target, source, num_bytes, after)

    device.copy = copy  # type: ignore[method-assign]
    copier = Copier(device, 4000)
    assert (copier.alone_ns(2000, 3), copier.alone_ns(2000, 3, with_call=True)) == (250, 1150)


def test_copies_are_from_one_place_after_another_within_their_memory() -> None:
    """A run copies what no cache of the host holds."""
    device = PacedDevice(line)
    sources: list[tuple[int, int]] = []
    whole = device.copy

    def copy(target: int, source: int, num_bytes: int, after: Any) -> Any:
        sources.append((source, num_bytes))
        return whole(target, source, num_bytes, after)

    device.copy = copy  # type: ignore[method-assign]
    size = 3 << 20
    copier = Copier(device, size)
    copier.in_a_row_ns(size, 24, 1)
    copier.in_a_row_ns(1000, 2, 1)
    first, last = copier._host.data_ptr(), copier._host.data_ptr() + copier._host.numel()
    assert all(first <= source and source + num_bytes <= last for source, num_bytes in sources)
    # 64 MiB hold 21 of them; then from the beginning. 1,000 bytes take 1,024.
    offsets = [source - first for source, _ in sources]
    assert offsets[:25] == [size * place for place in (*range(21), *range(4))]
    assert offsets[25:] == [4 * size, 4 * size + 1024, 4 * size + 2048]


@pytest.fixture
def throttled() -> Iterator[CpuDevice]:
    with on_cpu(0.01, 300_000) as device:
        yield device


def test_a_throttled_link_is_never_found_faster(throttled: CpuDevice) -> None:
    """From below: 300 us, and 10 bytes a microsecond."""
    copier = Copier(throttled, 4000)
    assert copier.in_a_row_ns(4000, 6, 2) >= 700_000
    assert copier.in_a_row_ns(1000, 6, 2) >= 400_000


def test_sizes_go_from_64_kib_to_64_mib_at_the_experts_scale() -> None:
    assert sizes_of(1) == SIZES
    assert sizes_of(16) == [256 << number for number in range(11)]
    assert sizes_of(32) == [256 << number for number in range(9)]
    # No size twice, since a curve has one point at each; and always some, which tell latency from rate.
    assert sizes_of(64) == sizes_of(1024) == [256 << number for number in range(7)]


def test_a_links_curves_are_the_links() -> None:
    found = link_curves(PacedDevice(line), 16, 100.0)
    assert [row["bytes"] for row in found] == sizes_of(16)
    for row in found:
        assert row["in_a_row_ns"] == row["alone_ns"] == row["pageable_ns"] == line(row["bytes"])
    latency_ns, gb_per_s = link_fit(found, 10.1)
    assert latency_ns == pytest.approx(50, abs=1)
    assert gb_per_s == pytest.approx(10.0, rel=0.001)


def test_sizes_that_would_take_too_long_are_left_out() -> None:
    """A row costs 2 * 9 * 16 copies of the next size: 10 ms at 256 bytes are 2.88 s, 20 ms 5.76 s."""
    device = PacedDevice(lambda num_bytes: num_bytes * 10_000_000 // 256)
    assert len(link_curves(device, 16, 2.0)) == 1
    assert len(link_curves(device, 16, 4.0)) == 2


def test_an_expert_in_chunks_costs_a_latency_each() -> None:
    found = chunked(PacedDevice(line), 6400)
    assert [(row["chunks"], row["ns"]) for row in found] == [(1, 690), (2, 740), (4, 840), (8, 1040), (16, 1440)]
    assert [row["chunks"] for row in chunked(PacedDevice(line), 300)] == [1, 2, 4]


# -- kernels -------------------------------------------------------------------------------------------------


def test_programs_are_timed_from_start_to_end_without_their_pads() -> None:
    device = PacedDevice(line, lambda _: 730)
    programs = [device.program(nothing, 5_000) for _ in range(3)]
    assert span_ns(device, programs[0]) == 730
    assert programs_ns(device, programs, 4) == 730


def test_the_first_round_is_not_counted() -> None:
    """Libraries load and caches fill in it."""
    lasting = iter([9_000, 9_000, 10, 20, 30, 40, 50, 60])
    device = PacedDevice(line, lambda _: next(lasting))
    assert programs_ns(device, [device.program(nothing) for _ in range(2)], 3) == 35


def test_memory_and_matrices_are_rates() -> None:
    device = PacedDevice(line, lambda _: 1_000_000)
    assert memory_gb_per_s(device) == 2 * (1 << 26) / 1e6
    assert matrix_tflops(device) == 2 * 768**3 / 1e6 / 1e3


def test_a_pad_is_held_against_what_it_should_last() -> None:
    assert pad_share(PacedDevice(line, pad_share=1.02)) == pytest.approx(1.02)


def test_launches_and_waits_take_the_host_time() -> None:
    found = launch_costs(PacedDevice(line))
    assert set(found) == {"launch_host_ns", "sync_ns", "start_after_ns"}
    assert min(found["launch_host_ns"], found["sync_ns"]) > 0
    assert found["start_after_ns"] == 0


# -- copies and kernels beside each other --------------------------------------------------------------------


def test_a_copy_beside_kernels_is_held_against_one_alone() -> None:
    device = PacedDevice(line, slower=1.5)
    assert copy_beside(device, [device.program(nothing)], 950) == {"bytes": 950, "idle_ns": 145, "busy_ns": 218}


def test_a_copy_that_kernels_cannot_have_slowed_so_is_refused() -> None:
    assert MOST_SLOWDOWN == 10.0
    device = PacedDevice(line, slower=10.0)
    assert copy_beside(device, [device.program(nothing)], 950)["busy_ns"] == 1450
    device = PacedDevice(line, slower=10.01)
    with pytest.raises(MeasurementError, match="950 bytes took 145 ns alone and 1451 beside kernels: something else"):
        copy_beside(device, [device.program(nothing)], 950)


@pytest.mark.parametrize(("num_programs", "chunk_bytes"), [(1, 500), (2, 500), (6, 500), (1, 40_000), (3, 40_000)])
def test_kernels_beside_copies_are_those_with_copies_before_and_behind(num_programs: int, chunk_bytes: int) -> None:
    """Also a single one, and one that is over sooner than a copy."""
    device = PacedDevice(line, kernels_slower=1.3)
    programs = [device.program(nothing) for _ in range(num_programs)]
    assert programs_ns(device, programs, 1) == 1000
    assert beside_copies_ns(device, programs, chunk_bytes, 3) == 1300


def test_kernels_that_outlast_the_copies_are_refused() -> None:
    device = PacedDevice(line, kernels_slower=20.0)
    with pytest.raises(MeasurementError, match="no kernel ran wholly beside copies"):
        beside_copies_ns(device, [device.program(nothing)], 500, 3)


# -- disturbed by a neighbour --------------------------------------------------------------------------------


@pytest.mark.parametrize("disturbed", [0, 1, 2])
def test_what_a_neighbour_disturbed_is_measured_again(disturbed: int) -> None:
    slowdowns = [10.01] * disturbed + [1.5]
    said: list[str] = []

    def measure() -> dict[str, float]:
        device = PacedDevice(line, slower=slowdowns.pop(0))
        return copy_beside(device, [device.program(nothing)], 950)

    assert undisturbed(measure, said.append)["busy_ns"] == 218
    again = "measured again: a copy of 950 bytes took 145 ns alone and 1451 beside kernels: something else uses this "
    assert said == [again + "machine"] * disturbed


def test_what_is_disturbed_three_times_is_refused() -> None:
    said: list[str] = []
    device = PacedDevice(line, kernels_slower=20.0)
    with pytest.raises(MeasurementError, match="no kernel ran wholly beside copies"):
        undisturbed(lambda: beside_copies_ns(device, [device.program(nothing)], 500, 3), said.append)
    assert len(said) == 2


def test_a_calibration_measures_again_what_was_disturbed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies by size, and a copy beside kernels: each is impossible once, and the profile is written all the same."""
    from replay import calibrate
    from replay.calibration import record

    curves, beside, given = record.link_curves, record.copy_beside, {"copies": 0, "beside": 0}

    def flat(*args: Any) -> list[dict[str, Any]]:
        given["copies"] += 1
        found = curves(*args)
        return [row | {"in_a_row_ns": 1000.0} for row in found] if given["copies"] == 1 else found

    def crawling(*args: Any) -> dict[str, float]:
        given["beside"] += 1
        return beside(*args) | ({"idle_ns": 1e6, "busy_ns": 1e8} if given["beside"] == 1 else {})

    monkeypatch.setattr(record, "link_curves", flat)
    monkeypatch.setattr(record, "copy_beside", crawling)
    words = ["mine", "--machine", "cpu", "--quick", "--policies", "lru", "--config-dir", str(tmp_path)]
    assert calibrate.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "measured again: copies seem to take no longer for more bytes: they were not timed back to back" in said
    assert "measured again: link_slowdown=" in said
    assert (tmp_path / "hardware" / "mine.yaml").exists()
    assert given["copies"] >= 2
    assert given["beside"] >= 2
