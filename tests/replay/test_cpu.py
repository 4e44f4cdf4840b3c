"""The CPU machine's two streams: order, waiting, pace from below, failure, and what it gives back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from replay.cpu import CpuDevice
from replay.device import DeviceLostError
from tests.replay.support import on_cpu


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    with on_cpu() as made:
        yield made


def numbers(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int64).to(torch.uint8)


def test_kernels_run_in_order(device: CpuDevice) -> None:
    seen: list[int] = []
    spans = [device.launch(lambda number=number: seen.append(number), 0) for number in range(50)]  # type: ignore[misc]
    device.wait([spans[-1][1]])
    assert seen == list(range(50))
    assert all(device.happened(event) for span in spans for event in span)


def test_times_of_a_stream_follow_one_another(device: CpuDevice) -> None:
    target, source = torch.zeros(4096, dtype=torch.uint8), numbers(4096)
    kernels = [device.launch(lambda: None, 0) for _ in range(30)]
    copies = [device.copy(target, source, None) for _ in range(30)]
    device.synchronize()
    for spans in (kernels, copies):
        times = [device.time_ns(event) for span in spans for event in span]
        assert times == sorted(times)
        assert times[-1] <= device.now_ns()


def test_copies_arrive_in_order(device: CpuDevice) -> None:
    target = torch.zeros(1000, dtype=torch.uint8)
    for value in range(20):
        end = device.copy(target, torch.full((1000,), value, dtype=torch.uint8), None)[1]
    device.wait([end])
    assert set(target.tolist()) == {19}


def test_a_copy_waits_for_the_kernel_that_it_comes_after(device: CpuDevice) -> None:
    """And does not hold up the compute stream meanwhile."""
    gate, target = threading.Event(), torch.zeros(8, dtype=torch.uint8)
    _, read = device.launch(lambda: _pass(gate), 0)
    _, copied = device.copy(target, numbers(8) + 1, read)
    behind = device.copy(target[:0], target[:0], None)[1]
    assert not device.happened(read)
    assert not any(map(device.happened, (copied, behind)))
    assert target.sum() == 0
    gate.set()
    device.wait([copied])
    assert target.tolist() == list(range(1, 9))
    device.wait([behind])


def _pass(gate: threading.Event) -> None:
    assert gate.wait(10)


def test_both_streams_run_at_once(device: CpuDevice) -> None:
    gate, target = threading.Event(), torch.zeros(8, dtype=torch.uint8)
    _, read = device.launch(lambda: _pass(gate), 0)
    _, copied = device.copy(target, numbers(8), None)
    device.wait([read, copied])
    assert (device.happened(read), device.happened(copied)) == (False, True)
    gate.set()
    device.synchronize()


def test_a_read_back_comes_after_the_kernels_before_it(device: CpuDevice) -> None:
    source, target = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    device.launch(lambda: source.fill_(7) and None, 0)
    device.wait([device.read_back(target, source)])
    assert target.tolist() == [7] * 4


def test_a_pad_is_nothing_before_the_kernel(device: CpuDevice) -> None:
    first = device.launch(lambda: None, 0)
    padded = device.launch(lambda: None, 2_000_000)
    device.wait([padded[1]])
    assert device.time_ns(padded[0]) - device.time_ns(first[1]) >= 2_000_000


@pytest.mark.parametrize(("rate", "latency_ns", "least_ns"), [(0.01, 0, 400_000), (0.01, 300_000, 700_000)])
def test_copies_in_a_row_keep_the_pace_on_average(rate: float, latency_ns: int, least_ns: int) -> None:
    """From below: a busy host may be later, never sooner. And not a sleep's slack for each of them."""
    target, source = torch.zeros(4000, dtype=torch.uint8), numbers(4000)
    with on_cpu(rate, latency_ns) as device:
        spans = [device.copy(target, source, None) for _ in range(12)]
        device.wait([spans[-1][1]])
        taken = device.time_ns(spans[-1][1]) - device.time_ns(spans[0][0])
        assert taken >= 12 * least_ns
        alone = device.copy(target, source, None)
        device.wait([alone[1]])
        assert device.time_ns(alone[1]) - device.time_ns(alone[0]) >= least_ns


def test_a_copy_after_a_pause_does_not_use_up_the_pause() -> None:
    target, source = torch.zeros(4000, dtype=torch.uint8), numbers(4000)
    with on_cpu(0.01) as device:
        device.wait([device.copy(target, source, None)[1]])
        device.wait([device.launch(lambda: None, 1_000_000)[1]])
        start, end = device.copy(target, source, None)
        device.wait([end])
        assert device.time_ns(end) - device.time_ns(start) >= 400_000


@pytest.mark.parametrize("stream", ["compute", "copy"])
def test_what_fails_in_a_stream_is_a_lost_device_and_no_hang(stream: str, device: CpuDevice) -> None:
    if stream == "compute":
        event = device.launch(lambda: torch.mm(torch.zeros(2, 3), torch.zeros(2, 3)) and None, 0)[1]
    else:
        event = device.copy(torch.zeros(5, dtype=torch.uint8), numbers(9), None)[1]
    device.wait([event])
    with pytest.raises(DeviceLostError, match="a stream of the CPU machine failed"):
        device.happened(event)
    with pytest.raises(DeviceLostError):
        device.synchronize()


def test_what_comes_after_a_failure_still_ends(device: CpuDevice) -> None:
    """A copy behind a kernel that failed: nobody waits for ever."""
    _, failed = device.launch(lambda: 1 // 0 and None, 0)
    _, copied = device.copy(torch.zeros(5, dtype=torch.uint8), numbers(5), failed)
    device.wait([copied])
    with pytest.raises(DeviceLostError, match="zero"):
        device.happened(copied)


def test_closing_gives_threads_and_settings_back() -> None:
    interval, num_threads, running = sys.getswitchinterval(), torch.get_num_threads(), threading.active_count()
    with on_cpu():
        assert sys.getswitchinterval() < interval
        assert torch.get_num_threads() == 1
        assert threading.active_count() == running + 2
    assert sys.getswitchinterval() == interval
    assert torch.get_num_threads() == num_threads
    assert threading.active_count() == running


def test_the_clock_can_start_anew(device: CpuDevice) -> None:
    early = device.launch(lambda: None, 0)[1]
    device.wait([device.launch(lambda: None, 3_000_000)[1]])
    assert device.now_ns() >= 3_000_000
    device.restart_clock()
    start, end = device.launch(lambda: None, 0)
    device.wait([end])
    assert device.time_ns(early) < 0 <= device.time_ns(start) <= device.time_ns(end) <= device.now_ns()


def test_what_it_says_of_itself(device: CpuDevice) -> None:
    told = device.describe()
    assert device.world == "cpu"
    assert told["name"]
    assert (told["memory_bytes"], told["dtype"], told["torch"]) == (None, "float32", torch.__version__)
    assert device.free_bytes() is None
