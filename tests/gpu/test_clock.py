"""The clock that host and device share, against the simulated truth: thousands of forwards, minutes, drift."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from replay.machine.cuda import CudaDevice
from tests.gpu.fake_cuda import LATENCY_NS, DeviceOnFake, FakeCuda, on_fake

PPM = [0, -120, 120]
SELDOM_NS = 40_000
"""How long a poll takes where it does not matter: thousands of forwards pass in seconds of ours."""


def nothing() -> None:
    """A program of no work."""


class Truth:
    """What the device's clock says of an event, counted from where a device started to count."""

    def __init__(self, cuda: FakeCuda, device: DeviceOnFake) -> None:
        self._cuda = cuda
        self._zero_ns = 0
        program = device.program(nothing)
        device.launch(program)
        device.wait(0, program.end)
        self._zero_ns = self.of(program.end) - device.time_ns(program.end)

    def of(self, event: object) -> int:
        """When it happened."""
        return self._cuda.device_ns(event.at_ns) - self._zero_ns  # type: ignore[attr-defined]

    def now(self) -> int:
        """The present."""
        return self._cuda.device_ns(self._cuda.true_ns) - self._zero_ns


def forwards(cuda: FakeCuda, device: DeviceOnFake, num_forwards: int, work_ns: int) -> Iterator[list[object]]:
    """The events of each forward, in the order in which the host finds them: kernels, copies beside them."""
    source, target = torch.zeros(2000, dtype=torch.uint8, pin_memory=True), torch.zeros(2000, dtype=torch.uint8)
    kernels = [device.program(nothing, work_ns // 2) for _ in range(2)]
    for _ in range(num_forwards):
        device.begin_forward()
        found: list[object] = []
        copies = []
        for kernel in kernels:
            device.launch(kernel)
            copies.append(device.copy(target.data_ptr(), source.data_ptr(), 2000, None))
            device.wait(0, copies[-1])
            found.append(copies[-1])
            device.wait(0, kernel.end)
            found += (kernel.start, kernel.end)
        yield found
        for copy in copies:
            device.recycle(copy)


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("ppm", PPM)
def test_times_are_true_over_thousands_of_forwards(ppm: int) -> None:
    """A forward takes as much of the device as a real one; rounding does not add up to anything that matters."""
    with on_fake(ppm) as (cuda, device):
        truth = Truth(cuda, device)
        cuda.call_ns["query"] = SELDOM_NS
        worst, ends = 0, [0, 0]
        for events in forwards(cuda, device, 3000, 4_000_000):
            times = [device.time_ns(event) for event in events]
            worst = max([worst, *(abs(at - truth.of(event)) for at, event in zip(times, events, strict=True))])
            for stream, of_stream in enumerate(([times[0], times[3]], times[1:3] + times[4:6])):
                assert [ends[stream], *of_stream] == sorted([ends[stream], *of_stream])
                ends[stream] = of_stream[-1]
        assert truth.now() > 12e9
        assert worst < 100


def test_without_renewal_rounding_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""
    monkeypatch.setattr("replay.machine.cuda_clock._BASE_LIFE_NS", 1 << 62)
    monkeypatch.setattr(CudaDevice, "begin_forward", lambda self: None)
    with on_fake() as (cuda, device):
        truth = Truth(cuda, device)
        cuda.call_ns["query"] = SELDOM_NS
        worst = 0
        for events in forwards(cuda, device, 3000, 4_000_000):
            worst = max([worst, *(abs(device.time_ns(event) - truth.of(event)) for event in events)])
        assert worst > 300


@pytest.mark.parametrize("renewed", [True, False])
def test_spans_stay_true_without_forwards(monkeypatch: pytest.MonkeyPatch, renewed: bool) -> None:
    """A calibration lasts minutes and begins no forward; kernels are timed all along."""
    if not renewed:
        monkeypatch.setattr("replay.machine.cuda_clock._BASE_LIFE_NS", 1 << 62)
    with on_fake() as (cuda, device):
        program, worst = device.program(nothing), 0
        for _ in range(200):
            cuda.advance_to(cuda.true_ns + 500_000_123)
            device.launch(program)
            device.wait(0, program.end)
            true_ns = program.end.at_ns - program.start.at_ns
            # The first question of an old base renews it, for the next one.
            device.time_ns(program.start)
            device.wait(0, device._clock._next_base or program.end)
            worst = max(worst, abs(device.time_ns(program.end) - device.time_ns(program.start) - true_ns))
        assert worst <= 2 if renewed else worst > 2000


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("ppm", PPM)
def test_now_is_never_before_what_was_told(ppm: int) -> None:
    with on_fake(ppm) as (cuda, device):
        truth = Truth(cuda, device)
        cuda.call_ns["query"] = SELDOM_NS
        told = latest = 0
        for number, events in enumerate(forwards(cuda, device, 2000, 4_000_000)):
            for event in events:
                told = max(told, device.time_ns(event))
                now = device.now_ns()
                assert now >= told
                assert now >= latest
                latest = now
            if number % 500 == 0:
                # Asked for late, after a while in which nothing was.
                cuda.advance_to(cuda.true_ns + 700_000_000)
                told = max(told, device.time_ns(events[0]))
                assert device.now_ns() >= told
        assert truth.now() > 8e9


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("ppm", PPM)
def test_now_keeps_up_with_a_device_that_drifts(ppm: int) -> None:
    """Four seconds at 120 ppm are half a millisecond: the host's present follows within its own delays."""
    with on_fake(ppm) as (cuda, device):
        truth = Truth(cuda, device)
        cuda.call_ns["query"] = 2_000
        errors = []
        for events in forwards(cuda, device, 1000, 4_000_000):
            for event in events:
                device.time_ns(event)
            errors.append(device.now_ns() - truth.now())
        assert min(errors) > -10_000
        assert max(errors) < 2_000


@pytest.mark.slow
def test_without_forgetting_now_would_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail."""
    monkeypatch.setattr("replay.machine.cuda_clock._FORGET_NS", 1 << 62)
    with on_fake(-120) as (cuda, device):
        truth = Truth(cuda, device)
        cuda.call_ns["query"] = 2_000
        for events in forwards(cuda, device, 1000, 4_000_000):
            for event in events:
                device.time_ns(event)
        assert device.now_ns() - truth.now() > 300_000


def test_what_began_before_the_base_keeps_its_time() -> None:
    """A kernel runs on while the base is renewed behind it."""
    with on_fake() as (cuda, device):
        truth = Truth(cuda, device)
        long, short = device.program(nothing, 900_000), device.program(nothing)
        device.launch(long)
        device.begin_forward()
        base = device._clock._next_base
        device.launch(short)
        device.wait(0, short.end)
        device.time_ns(short.end)
        assert device._clock._base is base
        assert long.start.at_ns < long.end.at_ns <= base.at_ns
        for event in (long.start, long.end):
            assert device.time_ns(event) == pytest.approx(truth.of(event), abs=2)


def test_a_restarted_clock_counts_from_there() -> None:
    with on_fake() as (cuda, device):
        program = device.program(nothing, 50_000_000)
        for _ in range(3):
            device.begin_forward()
            device.launch(program)
            device.wait(0, program.end)
        events = cuda.num_events
        device.restart_clock()
        # Events come from the pool again, the base that was coming among them.
        assert cuda.num_events <= events + 2
        assert 0 <= device.now_ns() < 1_000_000
        program = device.program(nothing)
        device.launch(program)
        device.wait(0, program.end)
        times = device.time_ns(program.start), device.time_ns(program.end)
        assert LATENCY_NS < times[0] < times[1] <= device.now_ns() < 1_000_000
