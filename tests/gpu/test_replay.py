"""Whole replays on the fake: the same files, runtime and policies as on a GPU, every stamp checked in device order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from expertflow.forward import Forward
from replay.keys import FAULTS
from replay.machine.device import Program
from replay.machine.real import RealMachine
from replay.machine.rig import Rig
from replay.machine.rows import GAVE_UP
from replay.run import PartialRunError
from sim.job.setup import load_chunks
from tests.gpu import fake_cuda
from tests.gpu.fake_cuda import DeviceOnFake, FakeStream, on_fake
from tests.gpu.support import Case
from tests.support.commands import TINY_MODEL_WORDS, small_trace, tiny_trace

POLICIES = ["lru", "adaptive"]
BASE = ("+hardware=a100", "residency=0.4")
SCALE = 40
"""Experts of 8 KB: what is tested is order, not speed."""
FEW = 40
"""Events of a run beside the two of each program: ends of copies, bases of the clock."""


def gpt_oss(tmp_path: Path, policy: str, *words: str) -> Case:
    """Eight tokens of two requests through a small gpt-oss-20b."""
    trace = small_trace(tmp_path / "trace.safetensors", 8)
    return Case.of(*BASE, f"+policy={policy}", f"trace.path={trace}", *words, scale=SCALE)


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[RealMachine]:
    """Every machine that a rig makes in this test."""
    made: list[RealMachine] = []
    make = Rig.machine

    def noted(self: Rig, *given: Any, **more: Any) -> RealMachine:
        made.append(make(self, *given, **more))
        return made[-1]

    prepare = RealMachine.prepare

    def prepared(self: RealMachine, forwards: Iterable[Forward]) -> None:
        prepare(self, forwards)
        # Each program is launched once before the run, and not read.
        self.device.cuda.forget_unread()  # type: ignore[attr-defined]

    monkeypatch.setattr(Rig, "machine", noted)
    monkeypatch.setattr(RealMachine, "prepare", prepared)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("words", [(), ("batch_size=2", "stack=eager"), ("chunk_mib=64", "channel_depth=1")])
def test_a_replay_is_whole_and_its_decisions_repeat(
    tmp_path: Path, policy: str, words: tuple[str, ...], machines: list[RealMachine]
) -> None:
    """Identities are asserted inside; here: all stamps right, the log in lockstep, few events, none misused."""
    case = gpt_oss(tmp_path, policy, *words)
    with on_fake() as (cuda, device):
        rig = case.rig(device)
        metrics, integrity = case.replay(rig, verify=True, log=tmp_path / "log.parquet")
        assert integrity is not None
        assert integrity.num_executions == metrics["num_accesses"] > 100
        assert integrity.num_checks >= 2 * integrity.num_executions
        assert (integrity.num_wrong, integrity.first) == (0, None)
        assert metrics["num_tokens"] == 8
        assert metrics["num_misses"] > 0
        assert metrics["elapsed_ns"] == metrics["compute_ns"] + metrics["stall_ns"] + metrics["overhead_ns"]
        assert (metrics["prefetch"]["issued"] > 0) == (policy == "adaptive")
        machine = machines[0]
        assert cuda.num_events < 2 * machine.programs.num_prepared + FEW
        assert (cuda.num_spoiled, cuda.num_pageable, cuda.num_unread) == (0, 0, 0)
        assert machine.programs.num_unprepared == 0
        device.close()
    result = case.lockstep(tmp_path / "log.parquet")
    assert (result.difference, result.partial) == (None, None)
    assert result.num_decisions > 8 * 24


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("prefill_chunk=4", "batch_size=2")])
@pytest.mark.parametrize("room", [None, 20])
def test_prompts_replay_from_graphs_and_kernel_by_kernel(
    tmp_path: Path,
    words: tuple[str, ...],
    room: int | None,
    machines: list[RealMachine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """room: captured programs, fewer than there are layers."""
    if room is not None:
        monkeypatch.setattr("replay.machine.programs.MOST_PROMPT_PROGRAMS", room)
    trace = small_trace(tmp_path / "trace.safetensors", 16, prompt=6)
    case = Case.of(*BASE, "+policy=adaptive", f"trace.path={trace}", *words, scale=SCALE)
    with on_fake() as (cuda, device):
        metrics, integrity = case.replay(case.rig(device), verify=True, log=tmp_path / "log.parquet")
        assert integrity is not None
        assert (integrity.num_wrong, integrity.first) == (0, None)
        assert (integrity.num_mislaunched, integrity.num_executions) == (0, metrics["num_accesses"])
        assert (cuda.num_spoiled, cuda.num_pageable, cuda.num_unread) == (0, 0, 0)
        assert (machines[0].programs.num_unprepared > 0) is (room is not None)
        device.close()
    result = case.lockstep(tmp_path / "log.parquet")
    assert (result.difference, result.partial) == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_the_fake_repeats_itself(tmp_path: Path, policy: str) -> None:
    """Nothing here depends on the time of day."""
    case = gpt_oss(tmp_path, policy)
    found = []
    for _ in range(2):
        with on_fake() as (_, device):
            found.append(case.replay(case.rig(device))[0])
    assert found[0] == found[1]


@pytest.mark.slow
def test_pageable_copies_are_timed_by_the_device(tmp_path: Path) -> None:
    """They block the host; every copy still takes what the device took for it."""
    case = gpt_oss(tmp_path, "hf_offload")
    with on_fake() as (cuda, device):
        metrics, integrity = case.replay(case.rig(device), verify=True)
        assert integrity is not None
        assert integrity.num_wrong == 0
        assert cuda.num_pageable > 0
        total = metrics["bytes"]["demand"] + metrics["bytes"]["prefetch"]
        assert metrics["link"]["busy_ns"] > total


@pytest.mark.slow
def test_a_clock_that_drifts_changes_nothing_but_times(tmp_path: Path) -> None:
    case = gpt_oss(tmp_path, "lru")
    for ppm in (-100, 100):
        with on_fake(ppm) as (_, device):
            metrics, integrity = case.replay(case.rig(device), verify=True)
        assert integrity is not None
        assert integrity.num_wrong == 0
        assert metrics["num_tokens"] == 8


@pytest.mark.slow
def test_two_runs_share_a_rig(tmp_path: Path) -> None:
    case = gpt_oss(tmp_path, "adaptive")
    with on_fake() as (_, device):
        rig = case.rig(device)
        first, _ = case.replay(rig)
        second, integrity = case.replay(rig, verify=True)
    assert integrity is not None
    assert integrity.num_wrong == 0
    assert second["num_accesses"] == first["num_accesses"]


@pytest.mark.slow
def test_a_program_is_read_before_it_is_launched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machines: list[RealMachine]
) -> None:
    """With as few programs as can be, of which many launches would be unread: nothing is lost, only time."""
    monkeypatch.setattr("replay.machine.programs.REPLICAS", 1)
    case = gpt_oss(tmp_path, "on_demand", "batch_size=2")
    with on_fake() as (cuda, device):
        metrics, integrity = case.replay(case.rig(device), verify=True, log=tmp_path / "log.parquet")
        assert machines[0].num_read_first > 0
        assert (cuda.num_unread, cuda.num_spoiled) == (0, 0)
    assert integrity is not None
    assert integrity.num_wrong == 0
    assert metrics["elapsed_ns"] == metrics["compute_ns"] + metrics["stall_ns"] + metrics["overhead_ns"]
    assert case.lockstep(tmp_path / "log.parquet").difference is None


class Unread(RealMachine):
    """Launches a program again whatever of its last launch is unread."""

    def _read_first(self, program: Program) -> None:
        """Nothing."""


def test_without_reading_first_times_would_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machines: list[RealMachine]
) -> None:
    """The check above can fail."""
    monkeypatch.setattr("replay.machine.programs.REPLICAS", 1)
    monkeypatch.setattr("replay.machine.rig.RealMachine", Unread)
    case = gpt_oss(tmp_path, "on_demand", "batch_size=2")
    with on_fake() as (cuda, device), suppress(KeyError, AssertionError):
        case.replay(case.rig(device))
    assert machines
    assert cuda.num_unread > 0


@pytest.mark.slow
def test_numbers_that_come_late_change_nothing_but_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that takes longer than the kernels: the host learns late, the marks keep their times."""
    case = gpt_oss(tmp_path, "lru")
    found = []
    for gate_ns in (1_300, 90_000):
        monkeypatch.setattr("tests.gpu.fake_cuda.GATE_NS", gate_ns)
        with on_fake() as (_, device):
            found.append(case.replay(case.rig(device))[0])
    soon, late = found
    assert (soon["num_hits"], soon["num_misses"]) == (late["num_hits"], late["num_misses"])
    assert late["compute_ns"] == pytest.approx(soon["compute_ns"], rel=1e-3)
    # Each of 24 layers and the head of 8 tokens.
    assert late["elapsed_ns"] - soon["elapsed_ns"] > 8 * 25 * 80_000


@pytest.mark.slow
def test_kv_lengths_are_captured_on_a_grid(tmp_path: Path, machines: list[RealMachine]) -> None:
    """Eight tokens, one length: all attention graphs are those of the layers."""
    case = gpt_oss(tmp_path, "lru")
    with on_fake() as (_, device):
        case.replay(case.rig(device))
    programs = machines[0].programs
    assert programs.kv_grid == 256
    assert len(programs._by_shape) == 24


@pytest.mark.slow
def test_a_launch_of_experts_is_one_call_and_its_reading_no_more_than_five(tmp_path: Path) -> None:
    """Driver calls of a run without copies: what a layer costs the host, copies apart."""
    case = gpt_oss(tmp_path, "lru", "residency=1.0", "start=resident")
    with on_fake() as (cuda, device):
        rig = case.rig(device)
        case.replay(rig)
        before = Counter(cuda.calls)
        device.restart_clock()
        restart = Counter(cuda.calls) - before
        cuda.calls.clear()
        metrics, _ = case.replay(rig)
        calls = Counter(cuda.calls) - restart
        layers = 24 * metrics["num_forwards"]
        prepared = cuda.calls["capture_begin"]
        # One for attention, one for the experts; the head; each program once before the run.
        assert calls["replay"] == 2 * layers + metrics["num_forwards"] + prepared
        # Start and end of each.
        assert calls["elapsed_time"] <= 2 * (2 * layers + metrics["num_forwards"]) + 3 * metrics["num_forwards"]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_experts_launched_ahead_change_nothing_but_times(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch, machines: list[RealMachine]
) -> None:
    """They are the same launches, of which the GPU waits for the word of the host instead of the call."""
    case = gpt_oss(tmp_path, policy, "residency=0.5")
    found: dict[bool, tuple[Any, int, list[int]]] = {}
    # As on a GPU: attention outlasts two launches.
    monkeypatch.setattr(fake_cuda, "WORK_NS", 60_000)
    for ahead in (True, False):
        monkeypatch.setattr(DeviceOnFake, "launches_ahead", ahead)
        with on_fake() as (cuda, device):
            cuda.call_ns["replay"] = 9_000
            metrics, integrity = case.replay(case.rig(device), verify=True)
            assert integrity is not None
            assert (integrity.num_wrong, integrity.num_mislaunched, cuda.num_unread) == (0, 0, 0)
            assert machines[-1].launches_ahead == ahead
            found[ahead] = metrics, cuda.num_held, [integrity.num_executions, integrity.num_checks]
    (ahead_of, held, checked), (behind, never, checked_too) = found[True], found[False]
    # At the least each layer's first launch; a host that comes before the GPU holds up nothing.
    assert (held >= 24 * ahead_of["num_forwards"], never, checked) == (True, 0, checked_too)
    if policy == "lru":
        same = ("num_hits", "num_misses", "num_evictions", "num_loads")
        assert [ahead_of.get(name) for name in same] == [behind.get(name) for name in same]
        # 9 us and the latency of a launch less, once a layer at least, of which the word takes 1.9 us.
        gained = behind["elapsed_ns"] - ahead_of["elapsed_ns"]
        assert gained > 24 * ahead_of["num_forwards"] * (9_000 + 2_500 - 1_900) * 0.8


def test_a_run_that_breaks_off_leaves_no_kernel_waiting(tmp_path: Path) -> None:
    case = gpt_oss(tmp_path, "lru")
    with on_fake() as (_, device):
        rig, work = case.rig(device), case.work
        machine = rig.machine(load_chunks(work), work.stack)
        machine.prepare(work.batches)
        machine.begin_forward(next(iter(work.batches)))
        machine.attention(0)
        assert machine.is_waiting
        machine.close()
        assert not machine.is_waiting
        # Else the fake would say that the host waits for kernels that wait for it.
        machine.finish()


def test_a_gpu_that_gave_up_waiting_ends_the_run_in_one_line(tmp_path: Path) -> None:
    case = gpt_oss(tmp_path, "lru")
    with on_fake() as (_, device):
        rig, work = case.rig(device), case.work
        machine = rig.machine(load_chunks(work), work.stack)
        machine.prepare(work.batches)
        machine.finish()
        machine.programs.experts(1, 1, False).row.words[GAVE_UP] = 3
        with pytest.raises(ValueError, match=r"gave up waiting for it.*run it again without stopping it"):
            machine.finish()


def tiny(tmp_path: Path) -> Case:
    """Two slots a layer's worth of experts: slots are rewritten while their readers run."""
    trace = tiny_trace(tmp_path / "tiny.safetensors", 24)
    return Case.of(
        "+hardware=a100", "+policy=adaptive", f"trace.path={trace}", "residency=0.25", *TINY_MODEL_WORDS, scale=8
    )


@pytest.mark.slow
def test_a_copy_that_would_not_wait_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wait on the device a slot is overwritten under its reader: zero wrong stamps mean something."""
    case = gpt_oss(tmp_path, "lru", "residency=0.003", "batch_size=2")
    monkeypatch.setattr("tests.gpu.fake_cuda.WORK_NS", 200_000)
    with on_fake() as (cuda, device):
        _, integrity = case.replay(case.rig(device), verify=True)
        assert cuda.calls["wait_event"] > 100
    assert integrity is not None
    assert integrity.num_wrong == 0
    with on_fake() as (_, device):
        monkeypatch.setattr(FakeStream, "wait_event", lambda self, event: None)
        _, integrity = case.replay(case.rig(device), verify=True)
    assert integrity is not None
    assert integrity.num_wrong > 0


@pytest.mark.slow
def test_a_copy_said_to_have_landed_too_early_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny(tmp_path)
    copy = DeviceOnFake.copy

    def early(self: DeviceOnFake, target: int, source: int, num_bytes: int, after: object) -> Any:
        end = copy(self, target, source, num_bytes, after)
        end.at_ns = self.cuda.true_ns
        return end

    monkeypatch.setattr(DeviceOnFake, "copy", early)
    with on_fake() as (_, device):
        monkeypatch.setattr("tests.gpu.fake_cuda.GB_PER_S", 0.05)
        _, integrity = case.replay(case.rig(device), verify=True)
    assert integrity is not None
    assert integrity.num_wrong > 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "lost"])
def test_faults_are_caught(tmp_path: Path, fault: str) -> None:
    case = tiny(tmp_path)
    with on_fake() as (_, device):
        _, integrity = case.replay(case.rig(device), verify=True, fault=(fault, 20))
    assert integrity is not None
    assert integrity.num_wrong > 0
    assert integrity.first is not None


@pytest.mark.slow
def test_a_device_lost_midway_leaves_what_was_measured(tmp_path: Path) -> None:
    case = gpt_oss(tmp_path, "lru")
    with on_fake() as (cuda, device):
        rig = case.rig(device)
        cuda.fail("memcpy", RuntimeError("CUDA error: unspecified launch failure\nmore"), after=500)
        with pytest.raises(PartialRunError) as caught:
            case.replay(rig)
    assert str(caught.value) == "CUDA error: unspecified launch failure"
    assert 0 < caught.value.metrics["num_forwards"] < 8


@pytest.mark.slow
def test_running_out_of_memory_midway_is_a_users_error(tmp_path: Path) -> None:
    case = gpt_oss(tmp_path, "lru")
    with on_fake() as (cuda, device):
        rig = case.rig(device)
        error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of")
        cuda.fail("memcpy", error, after=50)
        with pytest.raises(ValueError, match=r"GPU memory: CUDA out of memory\. Tried to allocate 2\.00 GiB; lower"):
            case.replay(rig)
