"""`CudaDevice` on the fake: streams, events, pads, memory, and what becomes of errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch

from replay.cuda import CudaDevice, explaining
from replay.device import Device, DeviceLostError
from tests.replay_cuda.fake_cuda import (
    BUSY_GHZ,
    CALL_NS,
    COPY_NS,
    FREE_BYTES,
    IDLE_GHZ,
    WORK_NS,
    DeviceOnFake,
    FakeCuda,
    on_fake,
)

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported elsewhere."
TRIED = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.70 GiB of which 1.10 GiB "
         "is free. Of the allocated memory 13.00 GiB is allocated by PyTorch.")  # fmt: skip


def nothing() -> None:
    """A kernel that does nothing, for as long as any."""


def test_is_a_device() -> None:
    for name, wanted in vars(Device).items():
        if not name.startswith("_"):
            assert inspect.signature(getattr(CudaDevice, name)).parameters.keys() == inspect.signature(
                wanted).parameters.keys(), name  # fmt: skip
    with on_fake() as (_, device):
        assert set(Device.__annotations__) == {"world", "torch_device", "dtype"}
        assert device.world == "cuda"
        assert dict(device.describe())["name"] == "Fake GPU"
        assert CudaDevice.dtype == torch.bfloat16


def test_copies_run_beside_kernels() -> None:
    with on_fake() as (cuda, device):
        source = torch.zeros(100_000, dtype=torch.uint8, pin_memory=True)
        target = torch.zeros(100_000, dtype=torch.uint8)
        kernel = device.launch(nothing, 400_000)
        copy = device.copy(target, source, None)
        device.wait([kernel[1]])
        assert device.time_ns(copy[1]) < device.time_ns(kernel[0])
        assert device.time_ns(copy[1]) - device.time_ns(copy[0]) == pytest.approx(COPY_NS + 100_000, abs=CALL_NS + 2)
        assert cuda.num_pageable == 0


@pytest.mark.parametrize("recycled", [False, True])
def test_a_copy_waits_for_the_kernel_that_it_names(recycled: bool) -> None:
    """Also if the event is recorded for something else while the copy waits."""
    with on_fake() as (cuda, device):
        source, target = torch.zeros(1000, dtype=torch.uint8, pin_memory=True), torch.zeros(1000, dtype=torch.uint8)
        spans = [device.launch(nothing, 300_000) for _ in range(3)]
        ends = [span[1].at_ns for span in spans]
        free = device.copy(target, source, None)
        copy = device.copy(target, source, spans[1][1])
        if recycled:
            spans[1][1].record(cuda.default)
            assert cuda.num_spoiled == 1
        device.synchronize()
        assert free[0].at_ns < ends[0]
        assert ends[1] <= copy[0].at_ns < ends[2]


def test_wait_sees_the_first_of_two() -> None:
    with on_fake() as (_, device):
        source = torch.zeros(10, dtype=torch.uint8, pin_memory=True)
        late = device.launch(nothing, 3_000_000)[1]
        copied = device.copy(torch.zeros(10, dtype=torch.uint8), source, None)[1]
        device.wait([late, copied])
        assert (device.happened(late), device.happened(copied)) == (False, True)


@pytest.mark.parametrize("pad_ns", [5_000, 20_000, 1_000_000, 30_000_000])
def test_pads_last_what_was_asked(pad_ns: int) -> None:
    """From the end of what ran before to the start of what comes behind."""
    with on_fake() as (_, device):
        before = device.launch(nothing, 500_000)
        behind = device.launch(nothing, pad_ns)
        device.wait([behind[1]])
        lasted = device.time_ns(behind[0]) - device.time_ns(before[1])
        assert lasted == pytest.approx(pad_ns, rel=1e-3, abs=30)
        assert device.time_ns(behind[1]) - device.time_ns(behind[0]) == pytest.approx(WORK_NS, abs=2)


def test_pads_follow_the_clock_of_a_gpu_that_has_come_up() -> None:
    """The first spins run at the idle clock: a pad measured by them would last a third."""
    with on_fake() as (cuda, device):
        assert device._cycles_per_ns == pytest.approx(BUSY_GHZ, rel=1e-3)
        device._cycles_per_ns = IDLE_GHZ
        device.restart_clock()
        assert device._cycles_per_ns == pytest.approx(BUSY_GHZ, rel=1e-3)
        spins = cuda.calls["_sleep"]
        device.launch(nothing, 0)
        device.launch(nothing, 1)
        assert cuda.calls["_sleep"] == spins


def test_few_events_are_made() -> None:
    with on_fake() as (cuda, device):
        source, target = torch.zeros(10, dtype=torch.uint8, pin_memory=True), torch.zeros(10, dtype=torch.uint8)
        made = []
        for _ in range(300):
            device.begin_forward()
            spans = [device.launch(nothing, 0), device.copy(target, source, None)]
            device.wait([spans[0][1]])
            device.wait([spans[1][1]])
            for start, end in spans:
                assert device.time_ns(start) <= device.time_ns(end)
                device.recycle(start)
                device.recycle(end)
            made.append(cuda.num_events)
        assert made[10] == made[-1] < 20
        assert len({id(event) for event in device._pool}) == len(device._pool)
        assert cuda.num_spoiled == 0


def test_free_memory_counts_what_torch_keeps() -> None:
    with on_fake() as (cuda, device):
        kept = cuda.calls["empty_cache"]
        assert device.free_bytes() == FREE_BYTES
        assert cuda.calls["empty_cache"] == kept + 1


# -- errors --------------------------------------------------------------------------------------------------


def restart(device: DeviceOnFake) -> None:
    device.restart_clock()


def launch(device: DeviceOnFake) -> None:
    device.launch(nothing, 500_000)


def launch_and_wait(device: DeviceOnFake) -> None:
    device.wait([device.launch(nothing, 0)[1]])


def launch_and_time(device: DeviceOnFake) -> None:
    span = device.launch(nothing, 0)
    device.wait([span[1]])
    device.time_ns(span[1])


def launch_and_ask(device: DeviceOnFake) -> None:
    device.happened(device.launch(nothing, 0)[1])


def launch_and_copy(device: DeviceOnFake) -> None:
    device.copy(torch.zeros(4), torch.zeros(4), device.launch(nothing, 0)[1])


def read_back(device: DeviceOnFake) -> None:
    device.read_back(torch.zeros(4), torch.zeros(4))


CALLS: list[tuple[str, Callable[[DeviceOnFake], object]]] = [
    ("record", launch), ("_sleep", launch), ("query", launch_and_wait), ("query", launch_and_ask),
    ("elapsed_time", launch_and_time), ("wait_event", launch_and_copy), ("copy_", launch_and_copy),
    ("copy_", read_back), ("synchronize", DeviceOnFake.synchronize), ("synchronize", restart),
    ("elapsed_time", restart), ("mem_get_info", DeviceOnFake.free_bytes), ("record", DeviceOnFake.begin_forward),
]  # fmt: skip


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


@pytest.mark.parametrize(("name", "use"), CALLS)
@pytest.mark.parametrize("text", ["Expected all tensors on cuda:0", "no kernel for the 'CUDA' backend", "",
                                  "CUDA error: invalid argument\nmore", "CUDA error: device not ready"])  # fmt: skip
def test_our_mistakes_keep_their_traceback(name: str, use: Callable[[DeviceOnFake], object], text: str) -> None:
    with on_fake() as (cuda, device):
        mistake = RuntimeError(text)
        cuda.fail(name, mistake, sticky=False)
        with pytest.raises(RuntimeError) as caught:
            use(device)
        assert caught.value is mistake
        device.synchronize()


@pytest.mark.parametrize(("error", "remedy"), [
    (torch.cuda.OutOfMemoryError(TRIED), "lower residency"),
    (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), "lower host_memory_gb"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "residency"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device\n..."), "build of torch"),
])  # fmt: skip
def test_too_little_memory_is_no_lost_device(error: RuntimeError, remedy: str) -> None:
    with on_fake() as (_, device):

        def fails() -> None:
            raise error

        with pytest.raises(ValueError, match=remedy) as caught:
            CudaDevice.launch(device, fails, 0)
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


def test_a_device_that_hangs_is_lost() -> None:
    with on_fake() as (cuda, device):
        end = device.launch(nothing, 0)[1]
        end.at_ns = 1 << 62
        cuda.call_ns["query"] = 10_000_000
        with pytest.raises(DeviceLostError, match="has not answered for 60 s"):
            device.wait([end])


@pytest.mark.parametrize(("name", "text"), [
    ("Stream", "CUDA error: all CUDA-capable devices are busy or unavailable\nmore"),
    ("_sleep", "CUDA error: no kernel image is available for execution on the device\nmore"),
    ("synchronize", "CUDA unknown error - this may be due to an incorrectly set up environment"),
])  # fmt: skip
def test_a_gpu_that_does_not_work_is_a_users_error(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    FakeCuda().install(monkeypatch).fail(name, RuntimeError(text))
    with pytest.raises(ValueError, match=r"machine=cuda: .*choose machine=cpu") as caught:
        CudaDevice()
    assert "\n" not in str(caught.value)


def test_no_gpu_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no CUDA device here; choose machine=cpu"):
        CudaDevice()
