"""`CudaDevice` on the fake: streams, events, pads, memory, and what becomes of errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from replay.lost import DeviceLostError
from replay.machine.cuda import CudaDevice
from replay.machine.cuda_errors import explaining
from replay.machine.device import Device, Program
from tests.gpu.fake_cuda import (
    BUSY_GHZ,
    CALL_NS,
    COPY_NS,
    FREE_BYTES,
    GATE_NS,
    IDLE_GHZ,
    WORK_NS,
    DeviceOnFake,
    FakeCuda,
    on_fake,
)

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported elsewhere."
TRIED = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.70 GiB of which 1.10 GiB "
    "is free. Of the allocated memory 13.00 GiB is allocated by PyTorch."
)


def nothing() -> None:
    """A kernel that does nothing, for as long as any."""


def test_is_a_device() -> None:
    for name, wanted in vars(Device).items():
        if not name.startswith("_"):
            assert (
                inspect.signature(getattr(CudaDevice, name)).parameters.keys()
                == inspect.signature(wanted).parameters.keys()
            ), name
    with on_fake() as (_, device):
        assert set(Device.__annotations__) == {
            "world",
            "torch_device",
            "dtype",
            "captures",
            "launches_ahead",
            "numbers",
            "ends_inside",
        }
        assert device.world == "cuda"
        assert dict(device.describe())["name"] == "Fake GPU"
        assert CudaDevice.dtype == torch.bfloat16


HERE, THERE = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
"""Copies by address need memory that stays."""


def address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()


def lasted(device: DeviceOnFake, program: Program) -> int:
    """How long the kernels of the last launch ran."""
    return device.time_ns(program.end) - device.time_ns(program.start)


def test_copies_run_beside_kernels() -> None:
    with on_fake() as (cuda, device):
        source = torch.zeros(100_000, dtype=torch.uint8, pin_memory=True)
        target = torch.zeros(100_000, dtype=torch.uint8)
        kernel = device.program(nothing, 400_000)
        device.launch(kernel)
        copies = [device.copy(address(target), address(source), 100_000, None) for _ in range(2)]
        device.wait(0, kernel.end)
        ends = [device.time_ns(end) for end in copies]
        assert ends[1] < device.time_ns(kernel.start)
        assert ends[1] - ends[0] == pytest.approx(COPY_NS + 100_000, abs=CALL_NS + 2)
        assert cuda.num_pageable == 0


@pytest.mark.parametrize("again", [False, True])
def test_a_copy_waits_for_the_launch_that_it_names(again: bool) -> None:
    """Also if the program is launched once more while the copy waits."""
    with on_fake() as (cuda, device):
        source, target = torch.zeros(1000, dtype=torch.uint8, pin_memory=True), torch.zeros(1000, dtype=torch.uint8)
        programs = [device.program(nothing, 300_000) for _ in range(3)]
        for program in programs:
            device.launch(program)
        ends = [program.end.at_ns for program in programs]
        free = device.copy(address(target), address(source), 1000, None)
        copy = device.copy(address(target), address(source), 1000, programs[1].end)
        if again:
            device.launch(programs[1])
            assert cuda.num_spoiled == 2
        device.synchronize()
        assert free.at_ns < ends[0]
        assert ends[1] < copy.at_ns < ends[2]


def test_wait_sees_the_first_of_two() -> None:
    with on_fake() as (_, device):
        source, words = torch.zeros(10, dtype=torch.uint8, pin_memory=True), torch.zeros(0, dtype=torch.int64)
        late = device.program(nothing, 3_000_000, (words, words))
        number = device.numbers[0] + 1
        device.launch(late)
        copied = device.copy(address(THERE), address(source), 10, None)
        device.wait(number, copied)
        assert (device.happened(late.end), device.happened(copied)) == (False, True)
        assert device.numbers[0] == number - 1
        device.wait(number, None)
        assert device.happened(late.end)


def test_the_words_are_there_when_the_number_is_seen() -> None:
    with on_fake() as (cuda, device):
        source, target = torch.tensor([5, 6], dtype=torch.int64), torch.zeros(2, dtype=torch.int64, pin_memory=True)
        program = device.program(nothing, 20_000, (source, target))
        before = device.numbers[0]
        for number in (1, 2, 3):
            source.fill_(number)
            device.launch(program)
            assert target.tolist() != [number] * 2
            device.wait(before + number)
            assert target.tolist() == [number] * 2
            # The number comes behind the end: whoever has seen it may still have to ask for that once more.
            assert cuda.true_ns >= program.end.at_ns + GATE_NS


def test_while_the_host_waits_it_may_do_something() -> None:
    with on_fake() as (_, device):
        program, done = device.program(nothing, 500_000), []
        device.launch(program)
        device.wait(0, program.end, lambda: done.append(device.happened(program.end)))
        assert len(done) > 3
        assert not any(done)


def test_a_launch_is_one_call_whatever_it_holds() -> None:
    with on_fake() as (cuda, device):
        words = torch.zeros(0, dtype=torch.int64)
        program = device.program(nothing, 100_000, (words, words))
        calls = cuda.calls.total()
        device.launch(program)
        assert cuda.calls.total() == calls + 1
        eager = device.program(nothing, 100_000, (words, words), captured=False)
        calls = cuda.calls.total()
        device.launch(eager)
        # Pad, two events, the kernel and the gate.
        assert cuda.calls.total() == calls + 5


@pytest.mark.parametrize("forgetful", [False, True])
def test_times_of_a_launch_are_those_of_the_last(forgetful: bool) -> None:
    """Also on a GPU on which an event inside a graph still counts as happened while it is under way again."""
    with on_fake(forgetful=forgetful) as (cuda, device):
        assert device.ends_inside != forgetful
        assert device.describe()["ends_inside_graphs"] != forgetful
        program = device.program(nothing, 40_000)
        found = []
        for _ in range(3):
            calls = cuda.calls.total()
            device.launch(program)
            assert cuda.calls.total() == calls + (2 if forgetful else 1)
            assert not device.happened(program.end)
            device.wait(0, program.end)
            found.append((device.time_ns(program.start), device.time_ns(program.end)))
        assert [end - start for start, end in found] == pytest.approx([WORK_NS] * 3, abs=2)
        assert all(end < start for (_, end), (start, _) in pairwise(found))


@pytest.mark.parametrize("pad_ns", [5_000, 20_000, 1_000_000, 30_000_000])
def test_pads_last_what_was_asked(pad_ns: int) -> None:
    """From the end of what ran before to the start of what comes behind."""
    with on_fake() as (_, device):
        before, behind = device.program(nothing, 500_000), device.program(nothing, pad_ns)
        device.launch(before)
        device.launch(behind)
        device.wait(0, behind.end)
        pad = device.time_ns(behind.start) - device.time_ns(before.end)
        assert pad == pytest.approx(pad_ns, rel=1e-3, abs=30)
        assert lasted(device, behind) == pytest.approx(WORK_NS, abs=2)


def test_pads_follow_the_clock_of_a_gpu_that_has_come_up() -> None:
    """The first spins run at the idle clock: a pad measured by them would last a third."""
    with on_fake() as (cuda, device):
        assert device._clock._cycles_per_ns == pytest.approx(BUSY_GHZ, rel=1e-3)
        device._clock._cycles_per_ns = IDLE_GHZ
        device.restart_clock()
        assert device._clock._cycles_per_ns == pytest.approx(BUSY_GHZ, rel=1e-3)
        spins = cuda.calls["_sleep"]
        for pad_ns in (0, 1):
            device.launch(device.program(nothing, pad_ns, captured=False))
        assert cuda.calls["_sleep"] == spins


def test_few_events_are_made() -> None:
    with on_fake() as (cuda, device):
        source, target = torch.zeros(10, dtype=torch.uint8, pin_memory=True), torch.zeros(10, dtype=torch.uint8)
        program, made = device.program(nothing), []
        for _ in range(300):
            device.begin_forward()
            device.launch(program)
            end = device.copy(address(target), address(source), 10, None)
            device.wait(0, program.end)
            device.wait(0, end)
            assert device.time_ns(program.start) <= device.time_ns(program.end)
            assert device.time_ns(end) > 0
            device.recycle(end)
            made.append(cuda.num_events)
        assert made[10] == made[-1] < 20
        assert len({id(event) for event in device._pool}) == len(device._pool)
        assert (cuda.num_spoiled, cuda.num_unread) == (0, 0)


def test_free_memory_counts_what_torch_keeps() -> None:
    with on_fake() as (cuda, device):
        kept = cuda.calls["empty_cache"]
        assert device.free_bytes() == FREE_BYTES
        assert cuda.calls["empty_cache"] == kept + 1


# -- errors --------------------------------------------------------------------------------------------------


def restart(device: DeviceOnFake) -> None:
    device.restart_clock()


def prepared(device: DeviceOnFake, captured: bool = True) -> Program:
    """A program made while nothing fails yet."""
    failing, device.cuda._failure = device.cuda._failure, None
    made = device.program(nothing, 500_000, captured=captured)
    device.cuda._failure = failing
    return made


def launch(device: DeviceOnFake) -> None:
    device.launch(prepared(device))


def launch_one_by_one(device: DeviceOnFake) -> None:
    device.launch(prepared(device, captured=False))


def launch_and_wait(device: DeviceOnFake) -> None:
    program = prepared(device)
    device.launch(program)
    device.wait(0, program.end)


def launch_and_time(device: DeviceOnFake) -> None:
    program = prepared(device)
    device.launch(program)
    device.wait(0, program.end)
    device.time_ns(program.end)


def launch_and_ask(device: DeviceOnFake) -> None:
    program = prepared(device)
    device.launch(program)
    device.happened(program.end)


def launch_and_copy(device: DeviceOnFake) -> None:
    program = prepared(device)
    device.launch(program)
    device.copy(address(THERE), address(HERE), 16, program.end)


def disturb(device: DeviceOnFake) -> None:
    device.disturb(address(THERE), address(HERE), 16)


def prepare(device: DeviceOnFake) -> None:
    device.program(nothing)


CALLS: list[tuple[str, Callable[[DeviceOnFake], object]]] = [
    ("record", launch_one_by_one),
    ("_sleep", launch_one_by_one),
    ("replay", launch),
    ("capture_begin", prepare),
    ("query", launch_and_wait),
    ("query", launch_and_ask),
    ("elapsed_time", launch_and_time),
    ("wait_event", launch_and_copy),
    ("memcpy", launch_and_copy),
    ("record", launch_and_copy),
    ("memcpy", disturb),
    ("synchronize", DeviceOnFake.synchronize),
    ("synchronize", restart),
    ("synchronize", prepare),
    ("elapsed_time", restart),
    ("mem_get_info", DeviceOnFake.free_bytes),
    ("record", DeviceOnFake.begin_forward),
]


@pytest.mark.mostly_slow(keep=8)
@pytest.mark.parametrize(("name", "use"), CALLS)
@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_a_cuda_error_is_a_lost_device(name: str, use: Callable[[DeviceOnFake], object], kind: type) -> None:
    with on_fake() as (cuda, device):
        cuda.fail(name, kind(ILLEGAL))
        with pytest.raises(DeviceLostError) as caught:
            use(device)
        assert str(caught.value) == "CUDA error: an illegal memory access was encountered"
        with pytest.raises(DeviceLostError):
            device.synchronize()
        emptied = cuda.calls["empty_cache"]
        device.close()
        assert cuda.calls["empty_cache"] == emptied


@pytest.mark.mostly_slow(keep=12)
@pytest.mark.parametrize(("name", "use"), CALLS)
@pytest.mark.parametrize(
    "text",
    [
        "Expected all tensors on cuda:0",
        "no kernel for the 'CUDA' backend",
        "",
        "CUDA error: invalid argument\nmore",
        "CUDA error: device not ready",
    ],
)
def test_our_mistakes_keep_their_traceback(name: str, use: Callable[[DeviceOnFake], object], text: str) -> None:
    with on_fake() as (cuda, device):
        mistake = RuntimeError(text)
        cuda.fail(name, mistake, sticky=False)
        with pytest.raises(RuntimeError) as caught:
            use(device)
        assert caught.value is mistake
        device.synchronize()


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (torch.cuda.OutOfMemoryError(TRIED), "lower residency"),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), "lower host_memory_gb"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "residency"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device\n..."), "build of torch"),
    ],
)
def test_too_little_memory_is_no_lost_device(error: RuntimeError, remedy: str) -> None:
    with on_fake() as (_, device):

        def fails() -> None:
            raise error

        with pytest.raises(ValueError, match=remedy) as caught:
            CudaDevice.program(device, fails)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 240
        with pytest.raises(ValueError, match=remedy), explaining():
            fails()
        device.close()


def test_errors_beside_the_device_are_explained() -> None:
    with pytest.raises(DeviceLostError, match=r"^CUDA error: an illegal memory access was encountered$"), explaining():
        raise RuntimeError(ILLEGAL)
    with pytest.raises(RuntimeError, match=r"^shapes$") as caught, explaining():
        raise RuntimeError("shapes")
    assert not isinstance(caught.value, DeviceLostError)


@pytest.mark.parametrize("initialized", [False, True])
def test_a_lost_device_is_told_where_there_is_a_context(
    initialized: bool, told: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_fake() as (cuda, device):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
        cuda.fail("replay", RuntimeError(ILLEGAL))
        with pytest.raises(DeviceLostError) as first:
            launch(device)
        with pytest.raises(DeviceLostError) as second, explaining():
            raise RuntimeError(ILLEGAL)
        with pytest.raises(RuntimeError), explaining():
            raise RuntimeError("shapes")
    assert told == ([first.value, second.value] if initialized else [])


def test_a_device_that_hangs_is_lost() -> None:
    with on_fake() as (cuda, device):
        program = device.program(nothing)
        device.launch(program)
        program.end.at_ns = 1 << 62
        cuda.call_ns["query"] = 10_000_000
        with pytest.raises(DeviceLostError, match="has not answered for 60 s"):
            device.wait(0, program.end)


def test_a_device_that_is_lost_raises_no_number_and_is_asked_for_its_error() -> None:
    """Well before patience ends."""
    with on_fake() as (cuda, device):
        cuda.fail("query", RuntimeError(ILLEGAL))
        with pytest.raises(DeviceLostError, match="an illegal memory access"):
            device.wait(device.numbers[0] + 1)
        assert cuda.true_ns < 1_000_000_000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Stream", "CUDA error: all CUDA-capable devices are busy or unavailable\nmore"),
        ("_sleep", "CUDA error: no kernel image is available for execution on the device\nmore"),
        ("synchronize", "CUDA unknown error - this may be due to an incorrectly set up environment"),
    ],
)
def test_a_gpu_that_does_not_work_is_a_users_error(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    FakeCuda().install(monkeypatch).fail(name, RuntimeError(text))
    with pytest.raises(ValueError, match=r"machine=cuda: .*choose machine=cpu") as caught:
        CudaDevice()
    assert "\n" not in str(caught.value)


def test_no_gpu_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no CUDA device here; choose machine=cpu"):
        CudaDevice()
