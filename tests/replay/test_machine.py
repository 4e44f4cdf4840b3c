"""What the real machine reports, over whole runs: each chunk and mark once, in order, and not before its time."""

from __future__ import annotations

import dataclasses
import gc
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import replay.machine.rig
from expertflow.forward import Forward
from expertflow.identities import check_identities
from expertflow.machine import GATE, LOAD, TOKEN, Record, Wait
from expertflow.runtime import Runtime
from replay.gc_pause import gc_paused, keep_loaded
from replay.machine.real import RealMachine
from sim.job.setup import load_chunks
from sim.machine.run import run_policy
from tests.support.commands import job, tiny_trace
from tests.support.replays import SMALL, TINY, Case
from traces.batching import Batches


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_trace(tmp_path_factory.mktemp("trace") / "tiny.safetensors", 24)


class Watched(RealMachine):
    """Asserts, at every record, what the contract says of it."""

    made: list[Watched]

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.made.append(self)
        self.due_chunks: deque[tuple[int, int]] = deque()
        self.due_marks: deque[int] = deque()
        self.ends: dict[str, int] = {"chunk": 0, "mark": 0, "now": 0}
        self.num_chunks = self.num_marks = self.num_drained = 0
        self.mark_ends: dict[int, int] = {}
        self.after: dict[tuple[int, int], int] = {}
        self.kinds: set[int] = set()

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        super().copy(load, chunk, key, slot, num_bytes, after)
        self.due_chunks.append((load, chunk))
        self.after[load, chunk] = after

    def attention(self, layer: int) -> int:
        return self.launched(super().attention(layer))

    def experts(self, layer: int, keys: Sequence[int], counts: Mapping[int, int] | None, shared: bool) -> int:
        return self.launched(super().experts(layer, keys, counts, shared))

    def head(self) -> int:
        return self.launched(super().head())

    def launched(self, mark: int) -> int:
        assert mark == len(self.mark_ends) + len(self.due_marks) + 1
        self.due_marks.append(mark)
        return mark

    def wait(self, wait: Wait) -> Record:
        kind, ident, drain = wait
        ends = [span[2] for span in self._chunks if span[0] == ident] if kind == LOAD else []
        record = super().wait(wait)
        self.kinds.add(kind)
        now_ns, chunks, marks = record
        assert now_ns >= self.ends["now"]
        self.ends["now"] = now_ns
        for load, chunk, start_ns, end_ns in chunks:
            assert (load, chunk) == self.due_chunks.popleft()
            assert self.ends["chunk"] <= start_ns <= end_ns <= now_ns
            self.ends["chunk"] = end_ns
            self.num_chunks += 1
            # Slots are rewritten after their last reader; what was reported as ended had ended.
            assert start_ns >= self.mark_ends.get(self.after[load, chunk], 0)
        for mark, start_ns, end_ns in marks:
            assert mark == self.due_marks.popleft()
            assert self.ends["mark"] <= start_ns <= end_ns <= now_ns
            self.ends["mark"] = self.mark_ends[mark] = end_ns
            self.num_marks += 1
        if kind in (GATE, TOKEN) and ident in self.mark_ends:
            # The routing was on the host by then, not just computed.
            assert self.device.numbers[0] >= self._number
        if kind == LOAD and not drain:
            assert self.device.happened(ends[-1])
        if drain and kind != LOAD and ident not in self.mark_ends:
            assert chunks
            self.num_drained += 1
        return record


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """Every machine that a rig makes in this test."""
    monkeypatch.setattr(Watched, "made", [], raising=False)
    monkeypatch.setattr(replay.machine.rig, "RealMachine", Watched)
    return Watched.made


RUNS = [
    "+policy=on_demand",
    "+policy=lru residency=0.1 chunk_mib=0.4",
    "+policy=lru residency=0.04",
    "+policy=hf_offload",
    "+policy=adaptive residency=0.3 chunk_mib=0.4 channel_depth=4",
    "+policy=fixed_2 residency=0.3 batch_size=4 channel_depth=1",
    "+policy=adaptive residency=0.3 throttle_gb_per_s=0.1",
]


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("words", RUNS)
def test_records_are_what_the_contract_says(words: str, trace: Path, watched: list[Watched]) -> None:
    case = Case.of(*TINY, *words.split(), f"trace.path={trace}")
    with case.rig() as rig:
        metrics, _ = case.replay(rig)
    (machine,) = watched
    num_layers, num_forwards = 4, metrics["num_forwards"]
    # All marks were reported, and all chunks but those that are still under way when the run ends.
    assert not machine.due_marks
    assert len(machine.due_chunks) <= case.work.channel_depth
    assert machine.num_marks >= num_forwards * (2 * num_layers + 1)
    assert machine.kinds == {GATE, TOKEN, LOAD}
    assert metrics["elapsed_ns"] == machine.ends["now"]
    assert metrics["elapsed_ns"] == metrics["compute_ns"] + metrics["stall_ns"] + metrics["overhead_ns"]
    moved = metrics["bytes"]["demand"] + metrics["bytes"]["prefetch"]
    assert moved > 0
    assert machine.num_chunks > 0


def test_a_queue_is_drained_while_the_host_waits(trace: Path, watched: list[Watched]) -> None:
    """Prefetches are issued from wakes in the middle of an attention, here of a millisecond."""
    words = [word for word in TINY if word != "stack=found"]
    case = Case.of(*words, "+policy=oracle", "residency=0.5", "chunk_mib=0.02", "max_tokens=6", f"trace.path={trace}")
    with case.rig() as rig:
        case.replay(rig)
    assert watched[0].num_drained > 0


def test_identities_are_checked_after_every_run(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    whole = Runtime.check_identities
    monkeypatch.setattr(Runtime, "check_identities", lambda runtime: checked.append(runtime) or whole(runtime))
    case = Case.of(*TINY, "+policy=adaptive", "residency=0.3", f"trace.path={trace}")
    with case.rig() as rig:
        case.replay(rig, verify=True)
        case.replay(rig)
    assert len(checked) == 2
    checked[0].counters.num_hits += 1
    with pytest.raises(AssertionError, match="identity broken"):
        check_identities(checked[0].counters, checked[0].queue)


COUNTS = ("num_accesses", "num_hits", "num_late", "num_misses", "num_evictions", "num_tokens", "num_forwards")


def same_counts(measured: Mapping[str, Any], simulated: Mapping[str, Any]) -> None:
    assert {key: measured[key] for key in COUNTS} == {key: simulated[key] for key in COUNTS}


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize(
    "words",
    [
        "+policy=on_demand",
        "+policy=lru",
        "+policy=lfu",
        "+policy=two_level",
        "+policy=lru_per_layer",
        "+policy=lru start=popular",
        "+policy=lru batch_size=3",
        "+policy=lru warmup_forwards=7",
    ],
)
def test_without_prefetch_the_counts_are_the_simulators(words: str, trace: Path) -> None:
    """No count depends on time where nothing is prefetched and a layer's demand has slots."""
    told = [*words.split(), "residency=0.4", f"trace.path={trace}"]
    case = Case.of(*TINY, *told)
    with case.rig() as rig:
        measured, _ = case.replay(rig)
    simulated = run_policy(Case.of(*A100, *told).full, *case.policy())
    same_counts(measured, simulated)
    assert measured["num_misses"] > 0
    assert measured["num_late"] == 0
    assert measured["bytes"] == {"demand": measured["num_misses"] * sum(load_chunks(case.work)), "prefetch": 0}


A100 = ("+hardware=a100", *TINY[1:])


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("name", ["lru", "lfu"])
def test_the_default_traces_counts_are_the_simulators(name: str) -> None:
    told = [f"+policy={name}", "trace.num_tokens=32", "residency=0.25"]
    case = Case.of(*SMALL, *told)
    with case.rig() as rig:
        measured, _ = case.replay(rig)
    same_counts(measured, job("+hardware=a100", "compare=none", "stack=found", *told))


def test_a_whole_run_of_hits_has_no_stall_and_no_copies(trace: Path) -> None:
    case = Case.of(*TINY, "+policy=lru", "residency=1.0", "start=resident", f"trace.path={trace}")
    with case.rig() as rig:
        metrics, found = case.replay(rig, verify=True)
    assert (metrics["num_hits"], metrics["stall_ns"]) == (metrics["num_accesses"], 0)
    assert metrics["bytes"] == {"demand": 0, "prefetch": 0}
    assert found is not None
    assert found.num_wrong == 0


def test_a_stack_pads_the_compute_stream(trace: Path) -> None:
    """At least what it says, and as overhead: the identities would not hold else."""
    told = ["+policy=lru", "residency=1.0", "start=resident", f"trace.path={trace}", "max_tokens=5"]
    case = Case.of(*(word for word in TINY if word != "stack=found"), "stack=eager", *told)
    with case.rig() as rig:
        metrics, _ = case.replay(rig)
    assert metrics["overhead_ns"] >= 5 * 4 * case.work.stack.layer_overhead_ns > 0


def test_forwards_are_built_before_the_clock_starts(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building one takes the host as long as running one: it must not stand in the first token's time."""
    built, at_start = [], []
    case = Case.of(*TINY, "+policy=lru", f"trace.path={trace}")

    class Counted(Batches):
        def __iter__(self) -> Iterator[Forward]:
            for forward in super().__iter__():
                built.append(forward.index)
                yield forward

    case.work = dataclasses.replace(case.work, batches=Counted(case.work.trace, case.work.batches.config))
    with case.rig() as rig:
        monkeypatch.setattr(rig.device, "restart_clock", lambda: at_start.append(len(built)))
        case.replay(rig)
    # None was built after it.
    assert at_start == [len(built)]


class Knot:
    """Refers to itself: only a collection frees it."""

    def __init__(self, gone: list[int]) -> None:
        self.itself, self.gone = self, gone

    def __del__(self) -> None:
        self.gone.append(1)


def test_what_lies_about_is_collected_before_the_clock_runs_and_nothing_while_it_does() -> None:
    enabled, gone = gc.isenabled(), []
    Knot(gone)
    with gc_paused():
        assert gone == [1]
        assert not gc.isenabled()
        Knot(gone)
        # Enough new objects for a collection of the youngest, were it not switched off.
        kept = [[] for _ in range(20_000)]
        assert gone == [1]
    del kept
    gc.collect()
    assert gone == [1, 1]
    assert gc.isenabled() == enabled


def test_what_is_loaded_is_not_looked_at_again() -> None:
    frozen = gc.get_freeze_count()
    try:
        keep_loaded()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
