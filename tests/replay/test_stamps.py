"""Every clean run reads what it should; every fault on purpose is caught, and by the stamps alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import replay.machine.rig
from replay.app import WRONG
from replay.lockstep.compare import check
from replay.lockstep.log_format import LOG_NAME
from replay.lost import LOST
from replay.machine.device import Work
from replay.machine.faults import FAULTS, FaultyDevice
from replay.machine.launch_row import Row
from replay.machine.memory import HostPlan, align
from replay.machine.pools import HostPool, SlotPool, chunk_offsets
from replay.machine.real import RealMachine
from replay.machine.rig import Rig
from replay.machine.rows import NUM_EXPERTS, RowLayout
from replay.machine.stamps import Stamps, WrongStamp
from replay.run import PartialRunError, needs_of
from sim.job.setup import load_chunks
from tests.support.commands import tiny_trace
from tests.support.replays import SMALL, TINY, Case, on_cpu, replay_here
from tests.support.scripted import ScriptedDevice


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_trace(tmp_path_factory.mktemp("trace") / "tiny.safetensors", 24)


# -- clean runs ----------------------------------------------------------------------------------------------

CLEAN = [
    "+policy=on_demand",
    "+policy=lru",
    "+policy=lru residency=0.04",
    "+policy=lru start=popular",
    "+policy=lru start=resident residency=1.0",
    "+policy=lru chunk_mib=0.4",
    "+policy=lru chunk_mib=0.06 channel_depth=5",
    "+policy=lru batch_size=4",
    "+policy=lru host_memory_gb=0.000123",
    "+policy=lfu_per_layer residency=0.4 policy.transfer.staging_slots=1",
    "+policy=lru policy.transfer.staging_slots=3 residency=0.2",
    "+policy=hf_offload",
    "+policy=fixed_2 chunk_mib=0.4 channel_depth=1",
    "+policy=adaptive",
    "+policy=adaptive batch_size=4 residency=0.2 chunk_mib=0.4",
    "+policy=adaptive host_memory_gb=0.0003 residency=0.3",
    "+policy=clairvoyant residency=0.3",
    "+policy=lru throttle_gb_per_s=0.05 residency=0.2",
]


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("words", CLEAN)
def test_a_clean_run_reads_nothing_wrong(words: str, trace: Path) -> None:
    case = Case.of(*TINY, *words.split(), f"trace.path={trace}")
    num_chunks = len(load_chunks(case.work))
    with case.rig() as rig:
        metrics, found = case.replay(rig, verify=True)
    assert found is not None
    assert (found.num_wrong, found.first) == (0, None)
    assert found.num_executions == metrics["num_accesses"] > 0
    assert found.num_checks == 2 * num_chunks * found.num_executions


def test_a_prompt_is_replayed(tmp_path: Path) -> None:
    """Prefill in chunks: several tokens for each expert."""
    path = tiny_trace(tmp_path / "prompts.safetensors", 40, prompt=15)
    found = Case.of(*TINY, "+policy=lru", f"trace.path={path}", "prefill_chunk=6", "residency=0.3").stamps()
    assert (found.num_wrong, found.num_executions > 100) == (0, True)


@pytest.mark.slow
def test_the_same_rig_serves_many_runs(trace: Path) -> None:
    """Stamps of a run before mean nothing to the next."""
    case = Case.of(*TINY, "+policy=adaptive", f"trace.path={trace}", "residency=0.3", "start=popular")
    with case.rig() as rig:
        for fault in (None, ("failed", 5), None):
            found = case.replay(rig, verify=True, fault=fault)[1]
            assert found is not None
            assert (found.num_wrong > 0) == (fault is not None)


# -- faults --------------------------------------------------------------------------------------------------

SEEN = [fault for fault in FAULTS if fault != "lost"]
RUNS = {
    "on_demand": "+policy=on_demand",
    "lru": "+policy=lru residency=0.1",
    "oracle": "+policy=oracle residency=0.5",
    "chunks": "+policy=lru residency=0.1 chunk_mib=0.4",
}
"""Nothing is copied for nothing: prefetches by the oracle are used."""


@pytest.fixture(scope="module", params=RUNS)
def bed(request: pytest.FixtureRequest, trace: Path) -> Iterator[tuple[Case, Rig]]:
    """A case and a rig on which it runs again and again."""
    case = Case.of(*TINY, *RUNS[request.param].split(), f"trace.path={trace}")
    with case.rig() as rig:
        yield case, rig


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("at", [1, 17])
@pytest.mark.parametrize("fault", SEEN)
def test_every_fault_is_caught(bed: tuple[Case, Rig], fault: str, at: int) -> None:
    case, rig = bed
    _, found = case.replay(rig, verify=True, fault=(fault, at))
    assert found is not None
    assert found.num_wrong > 0
    assert found.first is not None
    assert 0 <= found.first.layer < 4
    assert 0 <= found.first.forward < 24
    assert found.first.keys


class Noted(RealMachine):
    """Notes the key of each copy, and what was launched after how many of them."""

    made: list[Noted]

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.made.append(self)
        self.copied: list[tuple[int, int]] = []
        self.launched: list[tuple[int, int, int, tuple[int, ...]]] = []

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        super().copy(load, chunk, key, slot, num_bytes, after)
        self.copied.append((key, slot))

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        self.launched.append((len(self.copied), self._forward, layer, tuple(keys)))
        return super().experts(layer, keys, counts, shared)

    def first_reading(self, at: int) -> tuple[int, int, tuple[int, ...]]:
        """(forward, layer, keys) of the first launch that reads what the `at`-th copy, from 1, was to bring."""
        key = self.copied[at - 1][0]
        return next(launch[1:] for launch in self.launched if launch[0] >= at and key in launch[3])

    def reads_of(self, at: int) -> int:
        """Launches that read the slot until it is given away."""
        key, slot = self.copied[at - 1]
        later = [number for number, copy in enumerate(self.copied[at:], at + 1) if copy[1] == slot]
        end = later[0] if later else len(self.copied) + 1
        return sum(key in keys for number, _, _, keys in self.launched if at <= number < end)


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("at", [1, 2, 17, 40])
@pytest.mark.parametrize("residency", ["0.1", "0.4"])
def test_the_first_wrong_launch_and_the_number_of_wrong_stamps_are_right(
    residency: str, at: int, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a copy whose bytes never come: each launch that reads them finds two words wrong, before and after."""
    monkeypatch.setattr(Noted, "made", [], raising=False)
    monkeypatch.setattr(replay.machine.rig, "RealMachine", Noted)
    found = Case.of(*TINY, "+policy=lru", f"residency={residency}", f"trace.path={trace}").stamps(("failed", at))
    (machine,) = Noted.made
    assert found.first is not None
    assert (found.first.forward, found.first.layer, found.first.keys) == machine.first_reading(at)
    reads = machine.reads_of(at)
    # Of an expert that was in this very slot before only the load's number is another.
    assert found.num_wrong == found.first.num_wrong
    assert found.num_wrong in (4 * reads, 2 * reads)
    assert reads > 0


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("fault", SEEN)
@pytest.mark.parametrize("captures", [True, False])
def test_every_fault_is_caught_in_the_same_launch_each_time(captures: bool, fault: str, trace: Path) -> None:
    """On a device that does at once what it is told, as a GPU and as a CPU machine would: nothing is left to chance."""
    case = Case.of(*TINY, "+policy=lru", "residency=0.1", f"trace.path={trace}")
    needs = needs_of(case.work, *case.policy())
    found = [
        case.replay(Rig(ScriptedDevice(captures), case.work.model, needs), verify=True, fault=(fault, 17))[1]
        for _ in range(2)
    ]
    assert found[0] is not None
    assert found[0].num_wrong > 0
    assert found[0] == found[1]
    _, clean = case.replay(Rig(ScriptedDevice(captures), case.work.model, needs), verify=True)
    assert clean is not None
    assert (clean.num_wrong, clean.first, clean.num_executions) == (0, None, found[0].num_executions)


@pytest.mark.slow
def test_the_default_trace_shows_every_fault_as_well() -> None:
    """Slots are reused rarely here: the fault waits for it."""
    case = Case.of(*SMALL, "+policy=lru", "trace.num_tokens=16", "trace.num_requests=2", "residency=0.2")
    with case.rig() as rig:
        for fault in SEEN:
            found = case.replay(rig, verify=True, fault=(fault, 100))[1]
            assert found is not None
            assert found.num_wrong > 0, fault


@pytest.mark.slow
def test_without_stamps_a_fault_passes_unseen(trace: Path) -> None:
    """So it is the stamps that see it, and nothing else."""
    case = Case.of(*TINY, "+policy=lru", "residency=0.3", f"trace.path={trace}")
    with case.rig() as rig:
        for fault in SEEN:
            metrics, found = case.replay(rig, fault=(fault, 17))
            assert (found, metrics["num_tokens"]) == (None, 24)


@pytest.mark.slow
def test_a_fault_is_told_with_code_1_and_is_no_result(trace: Path, tmp_path: Path) -> None:
    found = replay_here(
        [*TINY, "+policy=lru", f"trace.path={trace}", "verify=true", "fault=failed", "fault_at=9"], tmp_path / "run"
    )
    assert (found.code, found.done) == (WRONG, False)
    integrity = found.metrics()["integrity"]
    assert integrity["num_wrong"] > 0
    assert f"{integrity['num_wrong']} wrong stamps" in found.out
    assert f"first wrong stamp: forward {integrity['first']['forward']}" in found.out


def test_an_unknown_fault_is_refused() -> None:
    with on_cpu() as device, pytest.raises(ValueError, match="choose one of: delayed"):
        FaultyDevice(device, "slow", 1)


# -- a device that is lost -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 40])
def test_a_lost_device_keeps_what_was_measured(at: int, trace: Path, tmp_path: Path) -> None:
    words = [*TINY, "+policy=fixed_2", "residency=0.1", f"trace.path={trace}", "log=true", "fault=lost"]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "DONE").write_text("an earlier run")
    found = replay_here([*words, f"fault_at={at}"], folder)
    assert (found.code, found.done) == (LOST, False)
    assert len(found.err.strip().splitlines()) == 1
    assert "device was lost" in found.err
    left = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"partial.json", LOG_NAME} <= left
    assert not {"metrics.json", "provenance.json", "DONE"} & left
    partial = json.loads((folder / "partial.json").read_text(encoding="utf-8"))
    assert partial["partial"] is True
    assert partial["policy"] == "fixed_2"
    assert "stopped answering" in partial["reason"]
    result = check(folder)
    assert (result.difference, result.partial is None) == (None, False)
    assert partial["num_forwards"] == result.num_forwards < 24
    assert (at == 1) == (partial["num_forwards"] == 0)


@pytest.mark.slow
def test_a_finished_run_clears_what_a_lost_one_left(trace: Path, tmp_path: Path) -> None:
    words = [*TINY, "+policy=lru", f"trace.path={trace}"]
    assert replay_here([*words, "fault=lost", "fault_at=3"], tmp_path / "run").code == LOST
    assert replay_here(words, tmp_path / "run").done
    assert not (tmp_path / "run" / "partial.json").exists()


def test_a_lost_device_is_a_partial_run(trace: Path) -> None:
    case = Case.of(*TINY, "+policy=lru", f"trace.path={trace}")
    with case.rig() as rig, pytest.raises(PartialRunError) as caught:
        case.replay(rig, fault=("lost", 30))
    assert 0 < caught.value.metrics["num_forwards"] < 24
    assert caught.value.metrics["elapsed_ns"] > 0


# -- the stamps themselves -----------------------------------------------------------------------------------

EXPERT = 3000
CHUNKS = (1000, 1000, 1000)


class Bench:
    """Stamps over three slots and four experts, without a machine: copies are made by hand."""

    def __init__(self, num_buffers: int = 4) -> None:
        self.offsets = chunk_offsets(CHUNKS)
        self.host = HostPool(HostPlan(4, num_buffers, align(EXPERT), 10**9), EXPERT, torch.float32, False)
        self.slots = SlotPool(3, EXPERT, torch.device("cpu"))
        self.stamps = Stamps(self.host, self.slots, self.offsets)
        self.num_loads = 0

    def copy(self, key: int, slot: int, chunks: Sequence[int] = (0, 1, 2)) -> None:
        """One load; only `chunks` of it arrive."""
        self.num_loads += 1
        for chunk in range(3):
            self.stamps.sent(key, slot, chunk, self.num_loads)
            if chunk in chunks:
                self.move(key, slot, chunk)

    def move(self, key: int, slot: int, chunk: int) -> None:
        span = slice(self.offsets[chunk], self.offsets[chunk + 1])
        self.slots.slot(slot)[span] = self.host.buffer(key)[span]

    def launch(self, forward: int, layer: int, keys: Sequence[int], slots: Sequence[int]) -> Work:
        """What the program of this launch checks, once before and once after its kernels."""
        row = Row(RowLayout(4, self.stamps.words_per_expert), torch.device("cpu"))
        row.words[NUM_EXPERTS] = len(keys)
        for place, slot in enumerate(slots):
            row.words[row.layout.slots + place] = slot
        self.stamps.expect(row, forward, layer, keys, slots)
        return self.stamps.check(row)

    def run(self, key: int, slot: int, work: Callable[[], None] = lambda: None) -> int:
        """Wrong stamps of one launch."""
        before = self.stamps.num_wrong
        check = self.launch(7, 2, [key], [slot])
        check()
        work()
        check()
        self.stamps.collect()
        return self.stamps.num_wrong - before


def test_a_whole_expert_is_right() -> None:
    bench = Bench()
    bench.copy(1, 0)
    assert bench.run(1, 0) == 0
    assert (bench.stamps.num_executions, bench.stamps.num_checks) == (1, 6)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_chunk_that_has_not_come_is_wrong_before_and_after(missing: int) -> None:
    bench = Bench()
    bench.copy(1, 0)
    bench.copy(2, 0, [chunk for chunk in range(3) if chunk != missing])
    assert bench.run(2, 0) == 4
    first = bench.stamps.first
    assert first is not None
    assert (first.forward, first.layer, first.keys) == (7, 2, (2,))


def test_an_earlier_load_of_the_same_expert_is_wrong() -> None:
    """Same bytes but for the load's number: a copy that never came shows even then."""
    bench = Bench()
    bench.copy(1, 0)
    bench.copy(1, 0, [0, 2])
    assert bench.run(1, 0) == 2


def test_a_chunk_that_comes_while_the_kernel_runs_is_seen_by_the_check_before_alone() -> None:
    bench = Bench()
    bench.copy(1, 0)
    bench.copy(2, 0, [0, 2])
    assert bench.run(2, 0, lambda: bench.move(2, 0, 1)) == 2


def test_a_slot_overwritten_while_its_kernel_runs_is_seen_by_the_check_after_alone() -> None:
    bench = Bench()
    bench.copy(1, 0)
    assert bench.run(1, 0, lambda: bench.move(3, 0, 2)) == 2
    bench.copy(1, 1)
    assert bench.run(1, 1) == 0


def test_what_was_expected_at_the_launch_counts() -> None:
    """The host sends the next load while the kernel is still queued: on the device it comes later."""
    bench = Bench()
    bench.copy(1, 0)
    check = bench.launch(0, 0, [1], [0])
    for chunk in range(3):
        bench.stamps.sent(2, 0, chunk, 9)
    check()
    bench.stamps.collect()
    assert bench.stamps.num_wrong == 0


def test_the_first_of_several_wrong_launches_is_named() -> None:
    bench = Bench()
    bench.copy(1, 0)
    bench.copy(2, 1, [])
    for forward, (key, slot) in enumerate([(1, 0), (2, 1), (2, 1)]):
        bench.launch(forward, forward + 1, [key], [slot])()
    # Looked at once, at the end.
    assert (bench.stamps.num_wrong, bench.stamps.first) == (0, None)
    bench.stamps.collect()
    first = bench.stamps.first
    assert first is not None
    # Three chunks of two words each, in two launches.
    assert (first.forward, first.layer, first.keys, first.num_wrong) == (1, 2, (2,), 12)
    assert bench.stamps.num_wrong == 12


def test_of_several_experts_each_slot_is_held_against_its_own_words() -> None:
    bench = Bench()
    for key, slot in ((1, 2), (3, 0)):
        bench.copy(key, slot)
    bench.copy(2, 1, [0, 1])
    bench.launch(4, 0, [1, 3], [2, 0])()
    bench.stamps.collect()
    assert bench.stamps.num_wrong == 0
    bench.launch(5, 1, [3, 2, 1], [0, 1, 2])()
    bench.stamps.collect()
    assert bench.stamps.first == WrongStamp(5, 1, (3, 2, 1), 2)


def test_what_ran_before_the_run_does_not_count() -> None:
    bench = Bench()
    bench.copy(2, 1, [])
    bench.launch(0, 0, [2], [1])()
    bench.stamps.restart()
    bench.stamps.collect()
    assert (bench.stamps.num_wrong, bench.stamps.first) == (0, None)
    bench.launch(3, 1, [2], [1])()
    bench.stamps.collect()
    assert bench.stamps.first == WrongStamp(3, 1, (2,), 6)


def test_shared_buffers_tell_one_buffer_from_another() -> None:
    bench = Bench(num_buffers=2)
    bench.copy(0, 0)
    assert bench.run(0, 0) == 0
    bench.copy(1, 0, [])
    assert bench.run(1, 0) == 6


def test_chunks_too_small_for_a_stamp_are_refused() -> None:
    bench = Bench()
    with pytest.raises(ValueError, match="raise chunk_mib"):
        Stamps(bench.host, bench.slots, [0, 16, EXPERT])
