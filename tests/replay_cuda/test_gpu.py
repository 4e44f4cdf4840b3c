"""The real thing, where there is one: `pytest -m gpu`. What the fake cannot show, and the same replays again."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from replay.calibrate import main as calibrate
from replay.cuda import CudaDevice
from replay.faults import FAULTS
from replay.run import PartialRunError
from sim.paths import CONF
from tests.cli.support import TINY_MODEL_WORDS, tiny_trace
from tests.replay_cuda.support import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: nothing of this was tried"),
]
SCALE = 4
"""Experts of 0.8 MB: each gets a pinned buffer of its own on any host."""
LOST = """
import sys, torch
from replay.cuda import CudaDevice
from replay.device import DeviceLostError
device = CudaDevice()
pinned = torch.zeros(1 << 20, dtype=torch.uint8, pin_memory=True)
there = torch.zeros(1 << 20, dtype=torch.uint8, device=device.torch_device)
device.copy(there, pinned, None)
beyond = torch.full((1,), 1 << 40, device=device.torch_device)
device.synchronize()
try:
    device.wait([device.launch(lambda: there[beyond], 0)[1]])
    device.synchronize()
except DeviceLostError as error:
    print(error)
    device.close()
    sys.exit(3)
"""


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    made = CudaDevice()
    yield made
    made.synchronize()
    made.close()


def nothing() -> None:
    """A launch of no kernel."""


def test_copies_arrive_and_wait(device: CudaDevice) -> None:
    source = torch.arange(1 << 22, dtype=torch.int64).pin_memory()
    target = torch.zeros(1 << 22, dtype=torch.int64, device=device.torch_device)
    back = torch.zeros(1 << 22, dtype=torch.int64, pin_memory=True)
    device.synchronize()
    kernel = device.launch(nothing, 3_000_000)
    held = device.launch(nothing, 3_000_000)
    start, end = device.copy(target[:-1], source[:-1], kernel[1])
    device.wait([end, held[1]])
    assert device.happened(kernel[1])
    device.wait([end])
    device.wait([device.read_back(back, target)])
    assert torch.equal(back[:-1], source[:-1])
    assert device.time_ns(kernel[1]) <= device.time_ns(start) + 1 < device.time_ns(end)
    assert device.time_ns(start) < device.time_ns(held[1])


def test_events_before_the_base_have_negative_times() -> None:
    """The clock relies on it: a copy may start before the base that its times are counted from."""
    first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    torch.cuda._sleep(1_000_000)
    second.record()
    torch.cuda.synchronize()
    assert second.elapsed_time(first) == pytest.approx(-first.elapsed_time(second), rel=1e-6)
    assert second.elapsed_time(first) < 0


def test_the_clock_is_in_order(device: CudaDevice) -> None:
    device.restart_clock()
    last = told = 0
    for number in range(400):
        if number % 7 == 0:
            device.begin_forward()
        start, end = device.launch(nothing, 30_000)
        device.wait([end])
        times = [device.time_ns(start), device.time_ns(end)]
        # Times of different bases are rounded apart.
        assert last - 100 <= times[0] <= times[1] + 1
        last = times[1]
        told = max(told, *times)
        assert device.now_ns() >= told
        device.recycle(start)
        device.recycle(end)
    assert len(device._pool) < 30


def test_pads_last_what_was_asked(device: CudaDevice) -> None:
    """On the device's own clock."""
    for pad_ns in (20_000, 1_000_000):
        lasted = []
        for _ in range(15):
            before, behind = device.launch(nothing, 500_000), device.launch(nothing, pad_ns)
            device.wait([behind[1]])
            lasted.append(device.time_ns(behind[0]) - device.time_ns(before[1]))
        assert statistics.median(lasted) == pytest.approx(pad_ns, rel=0.05, abs=2_000)


def test_memory_given_back_is_free_again(device: CudaDevice) -> None:
    before = device.free_bytes()
    block = torch.empty(1 << 28, dtype=torch.uint8, device=device.torch_device)
    held = device.free_bytes()
    del block
    assert before is not None
    assert held is not None
    assert held <= before - (1 << 28)
    again = device.free_bytes()
    assert again is not None
    assert abs(again - before) < 1 << 26


def test_too_much_memory_is_a_users_error(device: CudaDevice) -> None:
    def greedy() -> None:
        torch.empty(1 << 44, dtype=torch.uint8, device=device.torch_device)

    with pytest.raises(ValueError, match=r"GPU memory: .*lower residency"):
        device.launch(greedy, 0)
    device.wait([device.launch(nothing, 0)[1]])


def test_an_illegal_access_is_a_lost_device() -> None:
    """In a process of its own, whose GPU is lost for good; it must still be able to end as it wants."""
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=300, check=False,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.stdout.startswith("CUDA error"), done.stderr
    assert done.stdout.count("\n") == 1
    assert done.returncode == 3, done.stderr


@pytest.mark.parametrize("policy", ["lru", "adaptive", "hf_offload"])
def test_a_replay_is_whole_and_its_decisions_repeat(tmp_path: Path, device: CudaDevice, policy: str) -> None:
    case = Case.of("+hardware=a100", f"+policy={policy}", "trace.num_tokens=16", "residency=0.4", scale=SCALE)
    metrics, integrity = case.replay(case.rig(device), verify=True, log=tmp_path / "log.parquet")
    assert integrity is not None
    assert integrity.num_executions == metrics["num_accesses"] > 1000
    assert (integrity.num_wrong, integrity.first) == (0, None)
    assert metrics["num_tokens"] == 16
    result = case.lockstep(tmp_path / "log.parquet")
    assert (result.difference, result.partial) == (None, None)
    assert result.num_decisions > 16 * 24


def test_times_are_this_models(device: CudaDevice) -> None:
    """Without stamps to check: a link that never carries more than the fastest there is, a device that is busy."""
    case = Case.of("+hardware=a100", "+policy=lru", "trace.num_tokens=16", "residency=0.4", scale=SCALE)
    metrics, _ = case.replay(case.rig(device))
    total = metrics["bytes"]["demand"] + metrics["bytes"]["prefetch"]
    assert 0 < total / metrics["link"]["busy_ns"] < 1000
    assert metrics["elapsed_ns"] == metrics["compute_ns"] + metrics["stall_ns"] + metrics["overhead_ns"]
    assert metrics["compute_ns"] > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(tmp_path: Path, device: CudaDevice, fault: str) -> None:
    trace = tiny_trace(tmp_path / "tiny.safetensors", 24)
    case = Case.of("+hardware=a100", "+policy=adaptive", f"trace.path={trace}", "residency=0.25", *TINY_MODEL_WORDS,
                   scale=8)  # fmt: skip
    rig = case.rig(device)
    if fault == "lost":
        with pytest.raises(PartialRunError, match="stopped answering"):
            case.replay(rig, verify=True, fault=(fault, 20))
        return
    _, integrity = case.replay(rig, verify=True, fault=(fault, 20))
    assert integrity is not None
    assert integrity.num_wrong > 0


@pytest.mark.slow
def test_calibrates(tmp_path: Path) -> None:
    assert calibrate(["there", "--machine", "cuda", "--quick", "--scale", str(SCALE), "--out", str(tmp_path)]) == 0
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"hardware/there.yaml", "stack/there.yaml"} <= written
    assert not (CONF / "hardware" / "there.yaml").exists()
