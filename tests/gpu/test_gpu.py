"""The real thing, where there is one: `pytest -m gpu`. What the stand-in cannot show, and the same replays again."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from replay.calibrate import main as calibrate
from replay.calibration.measure import Copier
from replay.keys import FAULTS
from replay.machine.cuda import CudaDevice
from replay.machine.device import Program
from replay.machine.launch_row import Row
from replay.machine.raw import torch_copy
from replay.machine.rig import Rig
from replay.machine.rows import RowLayout, row_class, size_class
from replay.machine.timing import nothing
from replay.run import PartialRunError
from sim.paths import CONF
from tests.gpu.support import Case
from tests.support.commands import TINY_MODEL_WORDS, small_trace, tiny_trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: nothing of this was tried"),
]
SCALE = 4
"""Experts of 0.8 MB: each gets a pinned buffer of its own on any host."""
LOST = """
import sys, torch
from replay.machine.cuda import CudaDevice
from replay.lost import DeviceLostError
device = CudaDevice()
pinned = torch.zeros(1 << 20, dtype=torch.uint8, pin_memory=True)
there = torch.zeros(1 << 20, dtype=torch.uint8, device=device.torch_device)
device.copy(there.data_ptr(), pinned.data_ptr(), 1 << 20, None)
beyond = torch.full((1,), 1 << 40, device=device.torch_device)
device.synchronize()
try:
    program = device.program(lambda: there[beyond], captured=False)
    device.launch(program)
    device.wait(0, program.end)
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


def ignore(value: object) -> None:
    """A work returns nothing."""


def lasted(device: CudaDevice, program: Program) -> int:
    """How long the kernels of the last launch ran, on the device's clock."""
    return device.time_ns(program.end) - device.time_ns(program.start)


def test_copies_arrive_and_wait(device: CudaDevice) -> None:
    source = torch.arange(1 << 22, dtype=torch.int64).pin_memory()
    target = torch.zeros(1 << 22, dtype=torch.int64, device=device.torch_device)
    first, held = device.program(nothing, 3_000_000), device.program(nothing, 3_000_000)
    device.launch(first)
    device.launch(held)
    end = device.copy(target.data_ptr(), source.data_ptr(), 8 * ((1 << 22) - 1), first.end)
    device.wait(0, end)
    assert device.happened(first.end)
    device.wait(0, held.end)
    assert device.time_ns(first.end) < device.time_ns(end)
    device.synchronize()
    assert torch.equal(target[:-1].cpu(), source[:-1])
    assert target[-1] == 0


def test_a_copy_waits_for_the_launch_that_it_names_and_no_later_one(device: CudaDevice) -> None:
    """An event inside a graph is recorded at every replay; the copy waits for the one it was told of."""
    program, source = device.program(nothing, 5_000_000), torch.ones(1 << 16, dtype=torch.uint8).pin_memory()
    target = torch.zeros(1 << 16, dtype=torch.uint8, device=device.torch_device)
    device.launch(program)
    device.wait(0, program.end)
    device.launch(program)
    end = device.copy(target.data_ptr(), source.data_ptr(), 1 << 16, program.end)
    assert not device.happened(end)
    device.wait(0, program.end)
    device.wait(0, end)
    assert device.time_ns(end) >= device.time_ns(program.end)


def test_a_launch_that_is_under_way_has_not_ended_though_the_last_one_has(device: CudaDevice) -> None:
    """An event inside a graph counts as recorded anew from the moment of the launch."""
    program = device.program(nothing, 3_000_000)
    ends = []
    for _ in range(4):
        device.launch(program)
        assert not device.happened(program.end)
        device.wait(0, program.end)
        ends.append(device.time_ns(program.end))
    assert all(later - sooner > 2_900_000 for sooner, later in itertools.pairwise(ends))


def test_graphs_can_be_made_when_all_before_are_gone(device: CudaDevice) -> None:
    """Their memory is shared; a run's graphs go with it."""
    for _ in range(3):
        values = torch.ones(1 << 20, device=device.torch_device)
        program = device.program(lambda values=values: ignore(values.mul_(2).sum()))  # type: ignore[misc]
        device.launch(program)
        device.wait(0, program.end)
        del program, values
        torch.cuda.empty_cache()


def test_copies_by_torch_do_the_same(device: CudaDevice) -> None:
    source = torch.arange(256, dtype=torch.uint8).pin_memory()
    target = torch.zeros(256, dtype=torch.uint8, device=device.torch_device)
    # Which fills it on another stream.
    device.synchronize()
    torch_copy(target.data_ptr() + 16, source.data_ptr(), 200, device._link)
    device.synchronize()
    assert target[16:216].tolist() == list(range(200))
    assert int(target[:16].sum() + target[216:].sum()) == 0


def test_the_words_are_there_when_the_number_is_seen(device: CudaDevice) -> None:
    source = torch.zeros(2048, dtype=torch.int64, device=device.torch_device)
    target = torch.zeros(2048, dtype=torch.int64, pin_memory=True)
    program = device.program(lambda: ignore(source.add_(1)), words=(source, target))
    seen, before = target.numpy(), int(source[0])
    for number in range(1, 400):
        count = device.numbers[0] + 1
        device.launch(program)
        device.wait(count)
        assert seen.min() == seen.max() == before + number


def test_a_launch_costs_the_host_the_same_whatever_it_holds(device: CudaDevice) -> None:
    """No bound on its time: the machine is somebody's. But a graph of many kernels is launched by one call."""
    values = torch.zeros(1, device=device.torch_device)

    def many() -> None:
        for _ in range(200):
            values.add_(1)

    program = device.program(many)
    before = float(values)
    for _ in range(5):
        device.launch(program)
        device.wait(0, program.end)
    assert float(values) == before + 5 * 200


def test_times_inside_graphs_are_in_order(device: CudaDevice) -> None:
    device.restart_clock()
    programs = [device.program(nothing, 30_000) for _ in range(8)]
    last = told = 0
    for number in range(60):
        if number % 7 == 0:
            device.begin_forward()
        for program in programs:
            device.launch(program)
        for program in programs:
            device.wait(0, program.end)
            times = device.time_ns(program.start), device.time_ns(program.end)
            # Times of different bases are rounded apart.
            assert last - 100 <= times[0] <= times[1] + 1
            last = times[1]
            told = max(told, *times)
            assert device.now_ns() >= told


def test_pads_last_what_was_asked(device: CudaDevice) -> None:
    """On the device's own clock, inside a graph."""
    for pad_ns in (20_000, 1_000_000):
        before, behind, pads = device.program(nothing, 500_000), device.program(nothing, pad_ns), []
        for _ in range(15):
            device.launch(before)
            device.launch(behind)
            device.wait(0, behind.end)
            pads.append(device.time_ns(behind.start) - device.time_ns(before.end))
        assert statistics.median(pads) == pytest.approx(pad_ns, rel=0.05, abs=2_000)


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
        device.program(greedy)
    program = device.program(nothing)
    device.launch(program)
    device.wait(0, program.end)


def test_an_illegal_access_is_a_lost_device() -> None:
    """In a process of its own, whose GPU is lost for good; it must still be able to end as it wants."""
    done = subprocess.run(
        [sys.executable, "-c", LOST],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.startswith("CUDA error"), done.stderr
    assert done.stdout.count("\n") == 1
    assert done.returncode == 3, done.stderr


@pytest.mark.parametrize("tokens", [[1, 1, 1, 1], [1], [3, 1, 8, 2, 5], []])
@pytest.mark.parametrize("words", [(), ("trace.num_tokens=16", "model=gpt-oss-20b")])
def test_experts_by_slot_id_compute_what_they_should(
    device: CudaDevice, tokens: list[int], words: tuple[str, ...]
) -> None:
    """Against float64, in the shapes of the model, with slots in any order."""
    case = Case.of("+hardware=a100", "+policy=lru", "trace.num_tokens=16", "batch_size=8", *words, scale=2)
    kernels = (rig := case.rig(device)).kernels
    slots = [(7 * place + 3) % rig.slots.num_slots for place in range(len(tokens))]
    assert len(set(slots)) == len(slots)
    weights = torch.randn(rig.slots.bytes.numel() // 2, device=device.torch_device).mul_(0.02).to(device.dtype)
    rig.slots.bytes.view(-1)[:] = weights.view(torch.uint8)
    row = Row(RowLayout(size_class(len(tokens))), device.torch_device)
    rows = [kernels.rows(count) for count in tokens]
    row.spread(rows)
    row.describe(slots, -1, 0)
    work = kernels.experts(row, row_class(max(rows, default=1)), shared=False)
    program = device.program(work, row=row)
    device.launch(program)
    device.synchronize()
    feed, inputs = kernels._expert.feed, kernels._inputs.double()
    for place, (slot, count) in enumerate(zip(slots, rows, strict=True)):
        values = rig.slots.slot(slot)[: 2 * feed.num_values].view(device.dtype).double()
        first = values[: feed.up * feed.hidden].view(feed.up, feed.hidden)
        second = values[feed.up * feed.hidden : feed.num_values].view(feed.middle, feed.hidden)
        up = inputs[:count] @ first.T
        wanted = (torch.nn.functional.silu(up[:, : feed.middle]) * up[:, feed.middle :]) @ second
        found = kernels.experts_out[sum(rows[:place]) : sum(rows[: place + 1])].double()
        # bfloat16 keeps 8 bits: half of its last place, three times over.
        assert float((found - wanted).norm() / wanted.norm()) < 3 * 2**-8


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


def test_shared_experts_batches_and_prompts_replay(tmp_path: Path, device: CudaDevice) -> None:
    trace = small_trace(tmp_path / "trace.safetensors", 60, 4, shape=(26, 64, 6), model="deepseek-v2-lite", prompt=12)
    case = Case.of("+hardware=a100", "+policy=lru", "batch_size=4", "residency=0.3", f"trace.path={trace}", scale=SCALE)
    metrics, integrity = case.replay(case.rig(device), verify=True)
    assert integrity is not None
    assert integrity.num_wrong == 0
    assert metrics["num_tokens"] > 0
    assert metrics["launches"]["num_unprepared"] == 0


def test_prompts_beyond_the_room_for_graphs_replay_as_well(
    tmp_path: Path, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replay.machine.programs.MOST_PROMPT_PROGRAMS", 0)
    trace = small_trace(tmp_path / "trace.safetensors", 40, prompt=12)
    case = Case.of("+hardware=a100", "+policy=lru", "residency=0.3", f"trace.path={trace}", scale=SCALE)
    metrics, integrity = case.replay(case.rig(device), verify=True)
    assert integrity is not None
    assert integrity.num_wrong == 0
    assert metrics["launches"]["num_unprepared"] == 2


def test_times_are_this_models(device: CudaDevice) -> None:
    """Without stamps to check: a link that never carries more than the fastest there is, a device that is busy."""
    case = Case.of("+hardware=a100", "+policy=lru", "trace.num_tokens=16", "residency=0.4", scale=SCALE)
    metrics, _ = case.replay(case.rig(device))
    total = metrics["bytes"]["demand"] + metrics["bytes"]["prefetch"]
    assert 0 < total / metrics["link"]["busy_ns"] < 1000
    assert metrics["elapsed_ns"] == metrics["compute_ns"] + metrics["stall_ns"] + metrics["overhead_ns"]
    assert metrics["compute_ns"] > 0


def test_copies_in_a_row_are_the_links_not_the_hosts(device: CudaDevice) -> None:
    """Small ones too: behind a copy that is held back the host is ahead of them all."""
    copier = Copier(device, 1 << 22)
    small, large = (copier.in_a_row_ns(size, 16, 5) for size in (1 << 16, 1 << 22))
    assert small < large / 8


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(tmp_path: Path, device: CudaDevice, fault: str) -> None:
    trace = tiny_trace(tmp_path / "tiny.safetensors", 24)
    case = Case.of(
        "+hardware=a100", "+policy=adaptive", f"trace.path={trace}", "residency=0.25", *TINY_MODEL_WORDS, scale=8
    )
    rig: Rig = case.rig(device)
    if fault == "lost":
        with pytest.raises(PartialRunError, match="stopped answering"):
            case.replay(rig, verify=True, fault=(fault, 20))
        return
    _, integrity = case.replay(rig, verify=True, fault=(fault, 20))
    assert integrity is not None
    assert integrity.num_wrong > 0


@pytest.mark.slow
def test_calibrates(tmp_path: Path) -> None:
    words = ["--machine", "cuda", "--quick", "--scale", str(SCALE), "--config-dir", str(tmp_path)]
    assert calibrate(["there", *words]) == 0
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"hardware/there.yaml", "stack/there.yaml"} <= written
    assert not (CONF / "hardware" / "there.yaml").exists()
