"""The CPU machine's two streams: order, waiting, gates, pace from below, failure, and what it gives back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from replay.lost import DeviceLostError
from replay.machine.cpu import CpuDevice
from replay.machine.device import Program, Work
from tests.support.replays import on_cpu


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    with on_cpu() as made:
        yield made


def numbers(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int64).to(torch.uint8)


def nothing() -> None:
    """A kernel that does nothing."""


def ignored(value: object) -> None:
    """A work returns nothing."""


def launched(device: CpuDevice, work: Work = nothing, pad_ns: int = 0) -> Program:
    """A program of its own, under way."""
    program = device.program(work, pad_ns)
    device.launch(program)
    return program


def copied(device: CpuDevice, target: torch.Tensor, source: torch.Tensor, after: Any = None) -> Any:
    """The event at the end of a copy. Both must outlive it: it is by address."""
    return device.copy(target.data_ptr(), source.data_ptr(), source.numel(), after)


# -- programs ------------------------------------------------------------------------------------------------


def test_programs_run_in_order_and_as_often_as_they_are_launched(device: CpuDevice) -> None:
    seen: list[int] = []
    programs = [device.program(lambda number=number: seen.append(number)) for number in range(5)]  # type: ignore[misc]
    assert seen == []
    for program in [*programs, *reversed(programs)]:
        device.launch(program)
    device.wait(0, programs[0].end)
    assert seen == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    assert all(device.happened(event) for program in programs for event in (program.start, program.end))


def test_times_of_a_stream_follow_one_another(device: CpuDevice) -> None:
    target, source = torch.zeros(4096, dtype=torch.uint8), numbers(4096)
    programs = [launched(device) for _ in range(30)]
    ends = [copied(device, target, source) for _ in range(30)]
    device.synchronize()
    for events in ([event for program in programs for event in (program.start, program.end)], ends):
        times = [device.time_ns(event) for event in events]
        assert times == sorted(times)
        assert times[-1] <= device.now_ns()


def test_a_launch_has_events_of_its_own(device: CpuDevice) -> None:
    """A copy that waits for the launch before is not held up by the next one."""
    gates = [threading.Event(), threading.Event()]
    waiting = iter(gates)
    program = device.program(lambda: pass_through(next(waiting)))
    device.launch(program)
    first = program.end
    device.launch(program)
    target, source = torch.zeros(8, dtype=torch.uint8), numbers(8) + 1
    end = copied(device, target, source, first)
    gates[0].set()
    device.wait(0, end)
    assert target.tolist() == list(range(1, 9))
    assert not device.happened(program.end)
    gates[1].set()
    device.wait(0, program.end)
    assert device.time_ns(first) <= device.time_ns(program.start)


def pass_through(gate: threading.Event) -> None:
    assert gate.wait(10)


def test_a_pad_is_nothing_before_the_kernel(device: CpuDevice) -> None:
    first = launched(device)
    padded = launched(device, pad_ns=2_000_000)
    device.wait(0, padded.end)
    assert device.time_ns(padded.start) - device.time_ns(first.end) >= 2_000_000


# -- gates ---------------------------------------------------------------------------------------------------


def test_a_gated_program_brings_its_words_and_then_raises_the_number(device: CpuDevice) -> None:
    source, target = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    program = device.program(lambda: ignored(source.add_(7)), words=(source, target))
    for number in (1, 2, 3):
        device.launch(program)
        device.wait(number)
        assert device.numbers[0] == number
        assert target.tolist() == [7 * number] * 4
        assert device.happened(program.end)


def test_no_words_gate_as_well_and_no_gate_raises_nothing(device: CpuDevice) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    device.wait(0, launched(device).end)
    assert device.numbers[0] == 0
    device.launch(device.program(nothing, words=(none, none)))
    device.wait(1)
    assert device.numbers[0] == 1


def test_a_wait_ends_at_the_number_or_the_event_whichever_is_first(device: CpuDevice) -> None:
    gate, none = threading.Event(), torch.zeros(0, dtype=torch.int64)
    target, source = torch.zeros(8, dtype=torch.uint8), numbers(8)
    device.launch(device.program(lambda: pass_through(gate), words=(none, none)))
    end = copied(device, target, source)
    device.wait(1, end)
    assert (device.numbers[0], device.happened(end)) == (0, True)
    # A copy that waits for a program behind the gate: the number comes first.
    held = threading.Event()
    behind = launched(device, lambda: pass_through(held))
    late = copied(device, target, source, behind.end)
    gate.set()
    device.wait(1, late)
    assert (device.numbers[0], device.happened(late)) == (1, False)
    held.set()
    device.synchronize()


# -- copies --------------------------------------------------------------------------------------------------


def test_copies_arrive_in_order(device: CpuDevice) -> None:
    target = torch.zeros(1000, dtype=torch.uint8)
    sources = [torch.full((1000,), value, dtype=torch.uint8) for value in range(20)]
    ends = [copied(device, target, source) for source in sources]
    device.wait(0, ends[-1])
    assert set(target.tolist()) == {19}


def test_a_copy_moves_the_bytes_it_was_told_of_and_no_others(device: CpuDevice) -> None:
    target, source = torch.zeros(10, dtype=torch.uint8), numbers(10) + 1
    device.wait(0, device.copy(target.data_ptr() + 2, source.data_ptr() + 5, 3, None))
    assert target.tolist() == [0, 0, 6, 7, 8, 0, 0, 0, 0, 0]


def test_a_copy_waits_for_the_program_that_it_comes_after(device: CpuDevice) -> None:
    """And does not hold up the compute stream meanwhile; what is behind it waits with it."""
    gate, target, source = threading.Event(), torch.zeros(8, dtype=torch.uint8), numbers(8) + 1
    read = launched(device, lambda: pass_through(gate))
    end = copied(device, target, source, read.end)
    behind = copied(device, target[:0], source[:0])
    assert not any(map(device.happened, (read.end, end, behind)))
    assert target.sum() == 0
    gate.set()
    device.wait(0, end)
    assert target.tolist() == list(range(1, 9))
    assert device.time_ns(end) >= device.time_ns(read.end)
    device.wait(0, behind)


def test_both_streams_run_at_once(device: CpuDevice) -> None:
    gate, target, source = threading.Event(), torch.zeros(8, dtype=torch.uint8), numbers(8)
    read = launched(device, lambda: pass_through(gate))
    end = copied(device, target, source)
    device.wait(0, end)
    assert (device.happened(read.end), device.happened(end)) == (False, True)
    gate.set()
    device.synchronize()


def test_a_disturbance_is_a_copy_in_the_compute_stream(device: CpuDevice) -> None:
    gate, target, source = threading.Event(), torch.zeros(8, dtype=torch.uint8), numbers(8) + 1
    seen: list[list[int]] = []
    launched(device, lambda: pass_through(gate))
    device.disturb(target.data_ptr(), source.data_ptr(), 8)
    after = launched(device, lambda: seen.append(target.tolist()))
    assert target.sum() == 0
    gate.set()
    device.wait(0, after.end)
    assert seen == [list(range(1, 9))]


@pytest.mark.parametrize(("rate", "latency_ns", "least_ns"), [(0.01, 0, 400_000), (0.01, 300_000, 700_000)])
def test_copies_in_a_row_keep_the_pace_on_average(rate: float, latency_ns: int, least_ns: int) -> None:
    """From below: a busy host may be later, never sooner."""
    target, source = torch.zeros(4000, dtype=torch.uint8), numbers(4000)
    with on_cpu(rate, latency_ns) as device:
        ends = [copied(device, target, source) for _ in range(12)]
        device.wait(0, ends[-1])
        times = [device.time_ns(end) for end in ends]
        assert all(later - earlier >= least_ns for earlier, later in pairwise(times))
        issued_ns = device.now_ns()
        alone = copied(device, target, source)
        device.wait(0, alone)
        assert device.time_ns(alone) - issued_ns >= least_ns


def test_a_copy_after_a_pause_does_not_use_up_the_pause() -> None:
    target, source = torch.zeros(4000, dtype=torch.uint8), numbers(4000)
    with on_cpu(0.01) as device:
        device.wait(0, copied(device, target, source))
        device.wait(0, launched(device, pad_ns=1_000_000).end)
        issued_ns = device.now_ns()
        end = copied(device, target, source)
        device.wait(0, end)
        assert device.time_ns(end) - issued_ns >= 400_000


# -- failure, and the end ------------------------------------------------------------------------------------


def test_what_fails_in_a_stream_is_a_lost_device_and_no_hang(device: CpuDevice) -> None:
    program = launched(device, lambda: ignored(torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))))
    device.wait(0, program.end)
    with pytest.raises(DeviceLostError, match="a stream of the CPU machine failed"):
        device.happened(program.end)
    with pytest.raises(DeviceLostError):
        device.synchronize()


def test_what_comes_after_a_failure_still_ends(device: CpuDevice) -> None:
    """A copy behind a program that failed, and its gate: nobody waits for ever."""
    none, target, source = torch.zeros(0, dtype=torch.int64), torch.zeros(5, dtype=torch.uint8), numbers(5)
    failing = device.program(lambda: ignored(1 // 0), words=(none, none))
    device.launch(failing)
    end = copied(device, target, source, failing.end)
    device.wait(1)
    device.wait(0, end)
    with pytest.raises(DeviceLostError, match="zero"):
        device.happened(end)


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
    early = launched(device)
    device.wait(0, launched(device, pad_ns=3_000_000).end)
    assert device.now_ns() >= 3_000_000
    device.restart_clock()
    late = launched(device)
    device.wait(0, late.end)
    assert device.time_ns(early.end) < 0 <= device.time_ns(late.start) <= device.time_ns(late.end) <= device.now_ns()


def test_what_it_says_of_itself(device: CpuDevice) -> None:
    told = device.describe()
    assert (device.world, device.captures) == ("cpu", False)
    assert told["name"]
    assert (told["memory_bytes"], told["dtype"], told["torch"]) == (None, "float32", torch.__version__)
    assert device.free_bytes() is None
