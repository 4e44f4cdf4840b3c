"""Whole replays on the fake: the same files, runtime and policies as on a GPU, every stamp checked in device order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from replay.faults import FAULTS
from replay.run import PartialRunError
from tests.cli.support import TINY_MODEL_WORDS, small_trace, tiny_trace
from tests.replay_cuda.fake_cuda import DeviceOnFake, FakeStream, on_fake
from tests.replay_cuda.support import Case

POLICIES = ["lru", "adaptive"]
BASE = ("+hardware=a100", "residency=0.4")
SCALE = 40
"""Experts of 8 KB: what is tested is order, not speed."""
WARM_UP = 3 * (24 + 2) * 2
"""Events of a warm-up, which nobody asks for and nobody gives back."""


def gpt_oss(tmp_path: Path, policy: str, *words: str) -> Case:
    """Eight tokens of two requests through a small gpt-oss-20b."""
    trace = small_trace(tmp_path / "trace.safetensors", 8)
    return Case.of(*BASE, f"+policy={policy}", f"trace.path={trace}", *words, scale=SCALE)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("words", [(), ("batch_size=2", "stack=eager"), ("chunk_mib=64", "channel_depth=1")])
def test_a_replay_is_whole_and_its_decisions_repeat(tmp_path: Path, policy: str, words: tuple[str, ...]) -> None:
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
        assert cuda.num_events < WARM_UP + 20
        assert cuda.num_spoiled == 0
        assert cuda.num_pageable == 0
        device.close()
    result = case.lockstep(tmp_path / "log.parquet")
    assert (result.difference, result.partial) == (None, None)
    assert result.num_decisions > 8 * 24


@pytest.mark.parametrize("policy", POLICIES)
def test_the_fake_repeats_itself(tmp_path: Path, policy: str) -> None:
    """Nothing here depends on the time of day."""
    case = gpt_oss(tmp_path, policy)
    found = []
    for _ in range(2):
        with on_fake() as (_, device):
            found.append(case.replay(case.rig(device))[0])
    assert found[0] == found[1]


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


def test_a_clock_that_drifts_changes_nothing_but_times(tmp_path: Path) -> None:
    case = gpt_oss(tmp_path, "lru")
    for ppm in (-100, 100):
        with on_fake(ppm) as (_, device):
            metrics, integrity = case.replay(case.rig(device), verify=True)
        assert integrity is not None
        assert integrity.num_wrong == 0
        assert metrics["num_tokens"] == 8


def test_two_runs_share_a_rig(tmp_path: Path) -> None:
    case = gpt_oss(tmp_path, "adaptive")
    with on_fake() as (cuda, device):
        rig = case.rig(device)
        first, _ = case.replay(rig)
        events = cuda.num_events
        second, integrity = case.replay(rig, verify=True)
    assert integrity is not None
    assert integrity.num_wrong == 0
    assert cuda.num_events <= events + WARM_UP
    assert second["num_accesses"] == first["num_accesses"]


def tiny(tmp_path: Path) -> Case:
    """Two slots a layer's worth of experts: slots are rewritten while their readers run."""
    trace = tiny_trace(tmp_path / "tiny.safetensors", 24)
    return Case.of("+hardware=a100", "+policy=adaptive", f"trace.path={trace}", "residency=0.25", *TINY_MODEL_WORDS,
                   scale=8)  # fmt: skip


def test_a_copy_that_would_not_wait_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wait on the device a slot is overwritten under its reader: zero wrong stamps mean something."""
    case = gpt_oss(tmp_path, "lru", "residency=0.003", "batch_size=2")
    monkeypatch.setattr("tests.replay_cuda.fake_cuda.WORK_NS", 200_000)
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


def test_a_copy_said_to_have_landed_too_early_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny(tmp_path)
    copy = DeviceOnFake.copy

    def early(self: DeviceOnFake, target: torch.Tensor, source: torch.Tensor, after: object) -> object:
        span = copy(self, target, source, after)
        self.cuda.enqueue(0)
        span[1].at_ns = span[0].at_ns
        return span

    monkeypatch.setattr(DeviceOnFake, "copy", early)
    with on_fake() as (_, device):
        monkeypatch.setattr("tests.replay_cuda.fake_cuda.GB_PER_S", 0.05)
        _, integrity = case.replay(case.rig(device), verify=True)
    assert integrity is not None
    assert integrity.num_wrong > 0


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "lost"])
def test_faults_are_caught(tmp_path: Path, fault: str) -> None:
    case = tiny(tmp_path)
    with on_fake() as (_, device):
        _, integrity = case.replay(case.rig(device), verify=True, fault=(fault, 20))
    assert integrity is not None
    assert integrity.num_wrong > 0
    assert integrity.first is not None


def test_a_device_lost_midway_leaves_what_was_measured(tmp_path: Path) -> None:
    case = gpt_oss(tmp_path, "lru")
    with on_fake() as (cuda, device):
        rig = case.rig(device)
        cuda.fail("copy_", RuntimeError("CUDA error: unspecified launch failure\nmore"), after=500)
        with pytest.raises(PartialRunError) as caught:
            case.replay(rig)
    assert str(caught.value) == "CUDA error: unspecified launch failure"
    assert 0 < caught.value.metrics["num_forwards"] < 8


def test_running_out_of_memory_midway_is_a_users_error(tmp_path: Path) -> None:
    case = gpt_oss(tmp_path, "lru")
    with on_fake() as (cuda, device):
        rig = case.rig(device)
        error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of")
        cuda.fail("copy_", error, after=50)
        with pytest.raises(ValueError, match=r"GPU memory: CUDA out of memory\. Tried to allocate 2\.00 GiB; lower"):
            case.replay(rig)
