"""Experts that the host of a CPU machine computes: what its worker does, when it says it, and what is made of that."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import replay.machine.rig
from expertflow.boundary import PartError
from expertflow.machine import HOST, HostResult, Record, Wait
from expertflow.observer import Observer
from replay.app import WRONG
from replay.host_figures import figures_for, with_host
from replay.keys import HOST_FAULTS
from replay.lockstep.compare import check
from replay.machine.cpu import CpuDevice
from replay.machine.faults import FaultyHost
from replay.machine.host_worker import Computed, HostTask, HostWeights, HostWorker
from replay.machine.hosted import HostedMachine
from replay.machine.rig import Rig
from replay.machine.stamps import Stamps
from replay.run import replay_policy
from sim.job.setup import load_chunks
from sim.machine.host_compute import CpuTimes
from sim.machine.run import machine_of, run_policy
from tests.support.commands import TINY_MODEL_WORDS, tiny_trace
from tests.support.replays import Case, on_cpu, replay_here

FAST_HOST = ("hardware.host_unpack_gweights_per_s=null", "hardware.host_round_trip_ns=20000")
"""By which the host is cheaper for some of the tiny model's experts."""
WORDS = (
    *("+hardware=rtx4090", "+host=desktop", *FAST_HOST, *TINY_MODEL_WORDS),
    *("machine=cpu", "scale=8", "stack=found", "compare=none", "residency=0.3"),
)
LRU = ("+policy=lru", "+policy/place=cheaper")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_trace(tmp_path_factory.mktemp("trace") / "tiny.safetensors", 16, prompt=3)


# -- the worker ----------------------------------------------------------------------------------------------


class Steady:
    """A pace of whole milliseconds."""

    def expert_ns(self, num_tokens: int) -> int:
        return 4_000_000 * num_tokens

    def there_ns(self, num_rows: int) -> int:
        return 1_000_000 * num_rows


@pytest.fixture
def bench(trace: Path) -> Iterator[tuple[CpuDevice, Rig, HostWeights]]:
    """A device, a rig on it, and weights for forwards of up to 4 tokens."""
    case = Case.of(*WORDS, *LRU, "prefill_chunk=3", f"trace.path={trace}")
    with on_cpu() as device:
        rig = Rig(device, case.work.model, replay.machine.rig.Needs(8, 4, 64))
        yield device, rig, HostWeights(rig.kernels, rig.host(True), 4, False)


def worker_on(bench: tuple[CpuDevice, Rig, HostWeights], **more: Any) -> tuple[HostWorker, torch.Tensor]:
    """A worker, and where its results arrive."""
    device, rig, weights = bench
    results = torch.zeros_like(weights.results)
    way = device.way((rig.kernels.activations, weights.activations, weights.results, results))
    return HostWorker(weights, way, device.now_ns, device.tell, **more), results


def all_of(worker: HostWorker, count: int) -> list[Computed]:
    """What the worker has done, when it is so many."""
    until = time.monotonic() + 20
    while len(worker.done) < count and worker.failure is None and time.monotonic() < until:
        time.sleep(0.001)
    return list(worker.done)


def test_results_are_the_sums_of_the_products_of_the_weights_read(bench: tuple[CpuDevice, Rig, HostWeights]) -> None:
    """Against the products written out; the first of two tokens has both experts, the second one of them."""
    device, rig, weights = bench
    rig.kernels.activations.copy_(torch.randn_like(rig.kernels.activations))
    worker, results = worker_on(bench)
    worker.put(HostTask(1, (3, 9), (1, 2), 2, device.now_ns(), None))
    found = all_of(worker, 2)
    worker.close()
    assert [(one.task, one.key, one.is_last) for one in found] == [(1, 3, False), (1, 9, True)]
    wanted = torch.zeros(2, results.shape[1])
    inputs = rig.kernels.activations[:2]
    for key, num_tokens in ((3, 1), (9, 2)):
        block = rig.kernels.host_block(4)
        first, second = block.split(weights.bytes_of(key)[: block.feed.num_values * 4].view(torch.float32))
        up = inputs @ first
        width = second.shape[0]
        assert up.shape[1] == 2 * width
        wanted[:num_tokens] += ((torch.nn.functional.silu(up[:, :width]) * up[:, width:]) @ second)[:num_tokens]
    assert torch.allclose(results[:2], wanted, rtol=1e-4, atol=1e-6)
    assert not results[2:].any()


def test_a_pace_is_kept_from_when_it_was_asked_for(bench: tuple[CpuDevice, Rig, HostWeights]) -> None:
    """Two experts of 1 and 2 tokens over two rows: 2 ms there, 4 and 8 ms of products, 2 ms back. To the nanosecond,
    unless this machine was so busy that a wake came more than 2 ms late."""
    device, _, _ = bench
    worker, _ = worker_on(bench, pace=Steady())
    late = 0
    for number in range(1, 6):
        put_ns = device.now_ns()
        worker.put(HostTask(number, (3, 9), (1, 2), 2, put_ns, None))
        one, other = all_of(worker, 2)
        worker.done.clear()
        assert other.start_ns == one.end_ns
        assert one.end_ns - one.start_ns >= 4_000_000
        assert other.end_ns - other.start_ns >= 10_000_000
        assert device.now_ns() >= other.end_ns
        late += (one.start_ns, other.end_ns) != (put_ns + 2_000_000, put_ns + 16_000_000)
    worker.close()
    assert late < 5


def test_what_fails_is_kept_for_who_waits(bench: tuple[CpuDevice, Rig, HostWeights]) -> None:
    device, _, _ = bench
    worker, _ = worker_on(bench, fault=FaultyHost("host_fails", 2))
    worker.put(HostTask(1, (3, 9), (1, 1), 1, device.now_ns(), None))
    while worker.failure is None:
        time.sleep(0.001)
    assert [one.key for one in worker.done] == [3]
    assert isinstance(worker.failure, FloatingPointError)
    worker.close()
    assert not worker.is_alive()


@pytest.mark.parametrize(("read", "wrong"), [(5, 0), (6, 2)])
def test_the_tags_of_the_bytes_that_are_read_are_checked(
    read: int, wrong: int, bench: tuple[CpuDevice, Rig, HostWeights]
) -> None:
    """Two chunks, each of which carries a tag."""
    _, rig, weights = bench
    half = rig.model.mean_expert_bytes // 16 * 8
    stamps = Stamps(rig.host(True), rig.slots, [0, half, rig.model.mean_expert_bytes])
    check_one = stamps.on_host(7, 2, [5])
    for _ in range(2):
        check_one(5, weights.bytes_of(read))
    stamps.collect()
    assert (stamps.num_executions, stamps.num_checks, stamps.num_wrong) == (1, 4, 2 * wrong)
    assert (stamps.first is None) == (wrong == 0)
    if stamps.first is not None:
        assert (stamps.first.forward, stamps.first.layer, stamps.first.keys) == (7, 2, (5,))


# -- whole runs ----------------------------------------------------------------------------------------------


class Watched(HostedMachine):
    """Asserts of each record what the contract says of the host's part of it."""

    made: list[Watched]

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.made.append(self)
        self.given: list[tuple[int, int]] = []
        self.told: list[HostResult] = []
        self.now_ns = 0

    def on_host(self, keys: Sequence[int], tokens: Sequence[int]) -> int:
        task = super().on_host(keys, tokens)
        assert len(keys) == len(tokens)
        assert min(tokens) > 0
        self.given += [(task, key) for key in keys]
        return task

    def wait(self, wait: Wait) -> Record:
        record = super().wait(wait)
        assert record[0] >= self.now_ns
        self.now_ns = record[0]
        if wait[0] == HOST and not record[1]:
            assert self._back == wait[1]
        return record

    def host_ended(self) -> Sequence[HostResult]:
        ended = super().host_ended()
        for _, _, start_ns, end_ns in ended:
            assert 0 <= start_ns <= end_ns <= self.now_ns
        self.told += ended
        return ended


class Noted(Observer):
    """Stalls by kind, and what was computed on the host."""

    def __init__(self) -> None:
        self.stalls: dict[int, int] = {}
        self.on_host: list[int] = []

    def stalled(self, start_ns: int, end_ns: int, key: int, kind: int) -> None:
        self.stalls[kind] = self.stalls.get(kind, 0) + end_ns - start_ns

    def computed_on_host(self, key: int, start_ns: int, end_ns: int) -> None:
        self.on_host.append(key)


RUNS = [
    "+policy=lru +policy/place=cheaper",
    "+policy=adaptive +policy/place=balanced throttle_gb_per_s=0.2",
    "+policy=lru +policy/place=capped batch_size=2 throttle_gb_per_s=0.2",
    "+policy=lru +policy/place=host_layers policy.place.layers=2 prefill_chunk=3",
]


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("words", RUNS)
def test_a_run_with_a_place(words: str, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identities are asserted inside. Each expert comes back once, in order; all stamps are right; the log repeats."""
    monkeypatch.setattr(Watched, "made", [], raising=False)
    monkeypatch.setattr("replay.machine.hosted.HostedMachine", Watched)
    case, noted = Case.of(*WORDS, *words.split(), f"trace.path={trace}"), Noted()
    with case.rig() as rig:
        metrics, found = case.replay(rig, [noted], verify=True, log=tmp_path / "log.parquet")
    (machine,) = Watched.made
    assert [result[:2] for result in machine.told] == machine.given
    assert metrics["num_host"] == len(machine.given) == len(noted.on_host) > 0
    assert metrics["host"]["busy_ns"] == sum(end_ns - start_ns for _, _, start_ns, end_ns in machine.told)
    kinds = [metrics[f"{kind}_stall_ns"] for kind in ("late", "miss", "host")]
    assert [noted.stalls.get(kind, 0) for kind in range(3)] == kinds
    assert metrics["stall_ns"] == sum(kinds)
    assert metrics["host_stall_ns"] > 0
    assert found is not None
    assert (found.num_wrong, found.num_mislaunched) == (0, 0)
    assert found.num_executions == metrics["num_accesses"]
    assert found.num_checks == 2 * len(load_chunks(case.work)) * found.num_executions
    assert not machine._worker.is_alive()
    result = check(tmp_path / "log.parquet")
    assert (result.difference, result.partial) == (None, None)


@pytest.mark.slow
def test_the_counts_of_a_static_place_are_the_simulators(trace: Path) -> None:
    words = [*WORDS, "+policy=lru", "+policy/place=host_layers", "policy.place.layers=2", f"trace.path={trace}"]
    case = Case.of(*words)
    with case.rig() as rig:
        measured, _ = case.replay(rig)
    simulated = run_policy(case.full, *case.policy())
    for key in ("num_accesses", "num_hits", "num_misses", "num_late", "num_host"):
        assert measured[key] == simulated[key], key
    # What the host was busy with is what its model says, but for wakes that came too late for the pace.
    assert measured["host"]["busy_ns"] >= 0.99 * simulated["host"]["busy_ns"]


def test_a_place_is_told_what_a_simulation_tells_it(trace: Path) -> None:
    """On an idle machine, to the nanosecond; of a link that is paced, its pace."""
    case = Case.of(*WORDS, *LRU, f"trace.path={trace}")
    policy, transfer = case.policy()
    forward = next(iter(case.work.batches))
    simulated = machine_of(case.full, policy, transfer)
    simulated.begin_forward(forward)
    told = simulated.estimate([1, 2, 5])  # type: ignore[attr-defined]
    with case.rig() as rig:
        figures = figures_for(case.full, policy, transfer, rig.device, case.settings.scale)
        machine = rig.machine(load_chunks(case.work), case.work.stack, figures=figures)
        machine.prepare([forward])
        machine.begin_forward(forward)
        found = machine.estimate([1, 2, 5])  # type: ignore[attr-defined]
        machine.close()
    pace = case.settings.throttle_gb_per_s
    assert pace is not None
    same = told._replace(copy_ns=found.copy_ns, round_trip_ns=found.round_trip_ns, stretch=found.stretch)
    assert found == same
    assert found.copy_ns == pytest.approx(case.work.model.mean_expert_bytes / pace, rel=0.02)
    assert found.round_trip_ns == pytest.approx(told.round_trip_ns, rel=0.02)
    assert found.stretch == pytest.approx(told.stretch, rel=0.1)


def test_a_host_at_scale_stands_to_its_link_as_the_profiles(trace: Path) -> None:
    """A link a third as fast as the profile's, at a scale at which an expert has a 64th of its bytes."""
    case = Case.of(*WORDS, *LRU, f"trace.path={trace}")
    full, work = case.full, case.work
    link = full.hardware.link_gb_per_s
    peak = link if isinstance(link, float) else max(rate for _, rate in link)
    with on_cpu(peak / 64 / 3) as device:
        scaled = with_host(work.hardware, device, full, work)
    for num_tokens in (1, 1000):
        expected = 3 * CpuTimes(full.model, full.hardware).expert_ns(num_tokens) * 64
        expected *= work.model.mean_expert_bytes / full.model.mean_expert_bytes
        assert CpuTimes(work.model, scaled).expert_ns(num_tokens) == pytest.approx(expected, rel=1e-3)
    # Neither slows the other.
    copy_ns = round(work.model.mean_expert_bytes / (peak / 64 / 3))
    times = CpuTimes(work.model, scaled)
    assert times.stretch(work.model.mean_expert_bytes, copy_ns, times.expert_ns(1)) <= 1 + (1 << 20)


def test_a_machine_that_computes_none_refuses_a_place(trace: Path) -> None:
    case = Case.of(*WORDS, *LRU, f"trace.path={trace}")
    with case.rig() as rig, pytest.raises(PartError, match=r"Cheaper\.on_host may place experts on the host, where"):
        replay_policy(rig, case.work, *case.policy())


# -- faults --------------------------------------------------------------------------------------------------


def faulty(fault: str, trace: Path, folder: Path, *more: str) -> Any:
    words = [*WORDS, *LRU, f"trace.path={trace}", "log=true", f"fault={fault}", *(more or ("fault_at=5",))]
    return replay_here(words, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("host_lost", "have not come for 1 s; run it again"),
        ("host_fails", "the host's worker failed in forward"),
    ],
)
def test_a_result_that_never_comes_is_one_line_and_no_result(
    fault: str, told: str, trace: Path, tmp_path: Path
) -> None:
    found = faulty(fault, trace, tmp_path / "run")
    assert (found.code, found.done) == (2, False)
    assert told in found.err
    assert found.err.count("\n") == 1
    assert len(found.err) <= 301
    assert not list((tmp_path / "run").glob("*.parquet"))


@pytest.mark.slow
def test_another_experts_weights_are_seen(trace: Path, tmp_path: Path) -> None:
    found = faulty("host_wrong", trace, tmp_path / "run", "verify=true", "fault_at=5")
    assert (found.code, found.done) == (WRONG, False)
    integrity = found.metrics()["integrity"]
    # Every check of that one expert.
    assert integrity["num_wrong"] == integrity["num_checks"] // integrity["num_executions"]
    assert integrity["first"]["num_wrong"] == integrity["num_wrong"]
    assert f"{integrity['num_wrong']} wrong stamps" in found.out


@pytest.mark.parametrize("fault", HOST_FAULTS)
def test_a_fault_of_the_host_wants_a_place(fault: str, trace: Path, tmp_path: Path) -> None:
    words = [*WORDS, "+policy=lru", f"trace.path={trace}", f"fault={fault}", "verify=true"]
    found = replay_here(words, tmp_path / "run")
    assert found.code == 2
    assert "where this policy places none; choose a place with +policy/place=NAME" in found.err


@pytest.mark.slow
def test_a_fault_that_finds_no_occasion_says_so(trace: Path, tmp_path: Path) -> None:
    found = faulty("host_fails", trace, tmp_path / "run", "fault_at=99999")
    assert found.code == 2
