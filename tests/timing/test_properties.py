"""What holds for every run: it ends, its books balance, no slot is read or overwritten at the wrong time.

Each checker is shown to fail on something broken on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.boundary import PartError
from expertflow.counters import Counters
from expertflow.evictions.keep_nothing import KeepNothing
from expertflow.evictions.lru import LRU
from expertflow.forward import Forward, KnownForward
from expertflow.future import Future
from expertflow.horizons.adaptive import AdaptiveHorizon
from expertflow.horizons.fixed import FixedHorizon
from expertflow.machine import Record
from expertflow.observer import HOST_STALL, LATE, MISS
from expertflow.orders.index import IndexOrder
from expertflow.parts import Horizon, Prediction, Predictor
from expertflow.policy import Policy
from expertflow.predictors.transition import TransitionPredictor
from expertflow.runtime import StuckError
from expertflow.selections.mass import Mass
from expertflow.selections.threshold import Threshold
from expertflow.selections.top_k import TopK
from sim.machine.simulated import HostCosts, SimMachine, simulate
from tests.support.checked import CheckedMachine, MachineFault
from tests.support.runs import (
    ConstantLink,
    Job,
    Kernels,
    RandomKeys,
    Scripted,
    TakeAll,
    batches,
    build,
    compose,
    decode,
    eviction_named,
)

SELECTIONS: dict[str, Any] = {"all": TakeAll, "top_k": TopK, "mass": Mass, "threshold": Threshold}


@dataclass(frozen=True)
class Case:
    """One random job; printed whole when a property fails."""

    forwards: list[Forward]
    num_experts: int
    settings: dict[str, Any]
    eviction: str
    scope: str
    predictor: str
    horizon: str
    selection: str
    index_order: bool
    seed: int

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.forwards[0].demands)

    def policy(self) -> Policy:
        """The parts by name, new for each run."""
        future = Future(self.forwards, self.num_layers * self.num_experts)
        eviction = KeepNothing() if self.eviction == "nothing" else eviction_named(self.eviction, self.scope)
        return compose(
            predictor=self._predictor(),
            horizon=self._horizon(),
            selection=SELECTIONS[self.selection](),
            eviction=eviction,
            order=IndexOrder() if self.index_order else None,
            future=future,
        )

    def _predictor(self) -> Predictor | None:
        if self.predictor == "none" or self.num_layers == 1:
            return None
        if self.predictor == "transition":
            return TransitionPredictor()
        return RandomKeys(self.seed, refreshes=self.predictor == "random, refreshing")

    def _horizon(self) -> Horizon:
        if self.num_layers == 1 or self.horizon == "adaptive":
            return AdaptiveHorizon(stall_threshold=1, overfetch_threshold=1)
        return FixedHorizon(depth=1 + self.seed % (self.num_layers - 1))

    def job(self) -> Job:
        """A fresh job on a checked machine."""
        job = build(
            self.forwards,
            num_experts=self.num_experts,
            policy=self.policy(),
            machine_type=CheckedMachine,
            **self.settings,
        )
        watch(job)
        return job


def watch(job: Job) -> CheckedMachine:
    """The job's machine, told what it starts from."""
    machine = job.machine
    assert isinstance(machine, CheckedMachine)
    machine.watch(job.runtime)
    return machine


nanoseconds = st.integers(0, 60)
costs = st.builds(HostCosts, **dict.fromkeys((item.name for item in fields(HostCosts)), nanoseconds))
kernel_times = st.builds(Kernels, nanoseconds, nanoseconds, st.sampled_from([0, 25]), nanoseconds)
links = st.builds(ConstantLink, st.integers(0, 3), st.sampled_from([1.0, 1.7]))


@st.composite
def routings(draw: st.DrawFn, num_layers: int, num_experts: int) -> list[Forward]:
    """Up to eight forwards of up to three tokens."""
    top_k = draw(st.integers(1, min(3, num_experts)))
    one_layer = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    row = st.lists(one_layer, min_size=num_layers, max_size=num_layers)
    forward = st.lists(row, min_size=1, max_size=3)
    return batches(draw(st.lists(forward, min_size=1, max_size=8)), num_experts)


@st.composite
def cases(draw: st.DrawFn, max_slots: int = 24) -> Case:
    """Any trace, machine and policy the runtime should be able to run."""
    num_layers, num_experts = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    scope = draw(st.sampled_from(["global", "layer"]))
    num_keys = num_layers * num_experts
    least = num_layers if scope == "layer" else 1
    num_slots = draw(st.integers(least, max(least, min(max_slots, num_keys))))
    settings = {
        "num_slots": num_slots,
        "kernels": draw(kernel_times),
        "link": draw(links),
        "costs": draw(costs),
        "chunk_bytes": draw(st.sampled_from([(40,), (20, 20), (14, 13, 13)])),
        "channel_depth": draw(st.integers(1, 3)),
        "num_staging": draw(st.integers(0, 2)),
        "serial": draw(st.booleans()),
        "initial": tuple(draw(st.permutations(range(num_keys)))[: draw(st.integers(0, num_keys))]),
    }
    return Case(
        draw(routings(num_layers, num_experts)),
        num_experts,
        settings,
        draw(st.sampled_from(["lru", "lfu", "two_level", "belady_forced", "nothing"])),
        scope,
        draw(st.sampled_from(["none", "transition", "random", "random, refreshing"])),
        draw(st.sampled_from(["fixed", "adaptive"])),
        draw(st.sampled_from(sorted(SELECTIONS))),
        draw(st.booleans()),
        draw(st.integers(0, 1000)),
    )


many = settings(deadline=None, max_examples=300)


def num_chunks_begun(job: Job) -> int:
    """Chunks issued but not seen to have ended."""
    return len(job.runtime.queue.flight)


# -- properties ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(case=cases())
@many
def test_every_run_ends_with_balanced_books_and_sound_slots(case: Case) -> None:
    job = case.job().run()
    machine, counters = job.machine, job.counters
    assert isinstance(machine, CheckedMachine)
    assert counters.num_forwards == len(case.forwards)
    assert counters.num_accesses == sum(len(keys) for f in case.forwards for keys in f.demands)
    assert counters.demand_bytes + counters.prefetch_bytes == machine.num_bytes
    assert counters.link_busy_ns <= counters.elapsed_ns
    slots = job.runtime.slots
    held = [slot for slot in slots.slot_of if slot >= 0]
    free = [slot for pool in slots.free for slot in pool]
    assert sorted(held + free) == list(range(len(slots.reader)))


@pytest.mark.slow
@given(case=cases())
@many
def test_what_the_observer_sees_adds_up_to_the_counters(case: Case) -> None:
    job = case.job().run()
    counters, timeline = job.counters, job.timeline
    assert counters.compute_ns == sum(kernel.end_ns - kernel.start_ns for kernel in timeline.kernels)
    assert counters.link_busy_ns == sum(copy.end_ns - copy.start_ns for copy in timeline.copies)
    kinds = {LATE: counters.late_stall_ns, MISS: counters.miss_stall_ns, HOST_STALL: counters.host_stall_ns}
    for kind, total_ns in kinds.items():
        assert total_ns == sum(s.end_ns - s.start_ns for s in timeline.stalls if s.kind == kind)
    assert counters.num_late == sum(len(demand.late) for demand in timeline.demands)
    assert counters.elapsed_ns == timeline.ends_ns[-1]
    assert len(timeline.copies) + num_chunks_begun(job) == timeline_chunks(job)


def timeline_chunks(job: Job) -> int:
    """Chunks the machine was asked to copy."""
    machine = job.machine
    assert isinstance(machine, CheckedMachine)
    partly = sum(slot.num_chunks for slot in machine.slots if slot.load and slot.whole_ns is None)
    num_whole = machine.num_loads - sum(slot.load > 0 and slot.whole_ns is None for slot in machine.slots)
    return num_whole * len(machine.chunk_sizes) + partly


@pytest.mark.slow
@given(case=cases())
@settings(deadline=None, max_examples=150)
def test_the_same_job_twice_gives_the_same_result(case: Case) -> None:
    first, second = case.job().run(), case.job().run()
    assert first.counters == second.counters
    assert first.timeline == second.timeline
    assert first.runtime.journal.gaps_ns == second.runtime.journal.gaps_ns


@pytest.mark.slow
@given(case=cases())
@settings(deadline=None, max_examples=100)
def test_the_same_policy_object_can_run_twice(case: Case) -> None:
    policy = case.policy()
    results = []
    for _ in range(2):
        job = build(case.forwards, num_experts=case.num_experts, policy=policy, **case.settings).run()
        results.append((job.counters, job.timeline))
    assert results[0] == results[1]


@pytest.mark.slow
@given(case=cases())
@settings(deadline=None, max_examples=150)
def test_watching_a_run_changes_nothing(case: Case) -> None:
    plain = build(case.forwards, num_experts=case.num_experts, policy=case.policy(), watched=False, **case.settings)
    assert plain.run().counters == case.job().run().counters


@pytest.mark.slow
@given(case=cases(max_slots=2))
@many
def test_more_demand_than_slots_streams_through_them(case: Case) -> None:
    counters = case.job().run().counters
    assert counters.num_accesses == counters.num_hits + counters.num_late + counters.num_misses


@pytest.mark.parametrize("eviction", ["lru", "lfu", "two_level", "belady_forced"])
@pytest.mark.parametrize("index_order", [False, True])
def test_every_eviction_streams_five_experts_through_one_slot(eviction: str, index_order: bool) -> None:
    forwards = decode([[[4, 2, 0, 1, 3]]] * 3, 5)
    case = Case(forwards, 5, {"num_slots": 1}, eviction, "global", "none", "fixed", "all", index_order, 0)
    counters = case.job().run().counters
    # The slot holds the last expert of the event before: a hit.
    assert (counters.num_hits, counters.num_misses) == (2, 13)
    assert counters.num_streamed_layers == 3


@pytest.mark.parametrize("num_layers", [1, 2])
def test_an_adaptive_horizon_without_a_predictor_is_no_error(num_layers: int) -> None:
    forwards = decode([[[3]] * num_layers] * 2, 10)
    job = build(forwards, num_experts=10, num_slots=2, policy=compose(horizon=AdaptiveHorizon()))
    assert job.run().counters.num_hits == num_layers


@pytest.mark.parametrize(("layer", "distance", "key"), [(0, 1, 3), (0, 1, 25), (1, 2, 14), (2, 2, 29)])
def test_a_predictor_that_names_a_key_of_another_layer_is_refused(layer: int, distance: int, key: int) -> None:
    target = (layer + distance) % 3
    policy = compose(predictor=Scripted({(0, layer, distance): [target * 10, key]}), horizon=FixedHorizon(depth=2))
    job = build(decode([[[3], [4], [5]]], 10), num_experts=10, num_slots=9, policy=policy)
    told = f"Scripted.predict was asked for layer {target} and scored key {key}, which is of another "
    with pytest.raises(PartError, match=f"^{told}"):
        job.run()


def test_a_foreign_key_is_noticed_though_it_is_not_selected() -> None:
    policy = compose(predictor=Scripted({(0, 0, 1): [14, 3]}), selection=TopK())
    job = build(decode([[[3], [4]]], 10), num_experts=10, num_slots=9, policy=policy)
    with pytest.raises(PartError, match=r"was asked for layer 1 and scored key 3, .+ \(forward 0, layer 0\)"):
        job.run()


class Invents(TakeAll):
    """Selects what nobody predicted."""

    def select(self, prediction: Prediction, forward: KnownForward) -> Sequence[int]:
        return [*prediction.keys, 19]


def test_a_key_that_was_not_predicted_cannot_be_selected() -> None:
    policy = compose(predictor=Scripted({(0, 0, 1): [14, 13]}), selection=Invents())
    job = build(decode([[[3], [4]]], 10), num_experts=10, num_slots=9, policy=policy)
    with pytest.raises(PartError, match=r"^Invents.select selected key 19, which was not predicted \(forward 0"):
        job.run()


# -- each checker fails on something broken ------------------------------------------------------------------


def overwriting_job(machine_type: type[SimMachine] = CheckedMachine) -> Job:
    """A prefetch that takes the slot of an expert whose kernel still runs."""
    policy = compose(predictor=Scripted({(0, 0, 1): [14, 15]}))
    return build(
        decode([[[3], [5]]], 10),
        num_experts=10,
        num_slots=2,
        initial=(3,),
        policy=policy,
        channel_depth=1,
        kernels=Kernels(expert=200),
        machine_type=machine_type,
    )


def test_the_checker_lets_a_sound_overwrite_pass() -> None:
    job = overwriting_job()
    watch(job)
    assert job.run().counters.num_evictions == 1


class ForgetsReaders(CheckedMachine):
    """Starts every copy at once, whoever reads the slot."""

    def copy(self, load: int, chunk: int, key: int, slot: int, num_bytes: int, after: int) -> None:
        super().copy(load, chunk, key, slot, num_bytes, 0)


def test_the_checker_notices_a_slot_overwritten_under_its_reader() -> None:
    job = overwriting_job(ForgetsReaders)
    watch(job)
    with pytest.raises(MachineFault, match="key 15 overwrites slot 0 at 140, read until 300"):
        job.run()


def test_the_checker_notices_a_kernel_without_its_weights() -> None:
    job = overwriting_job()
    machine = watch(job)
    with pytest.raises(MachineFault, match="layer 0 computes key 4"):
        machine.experts(0, [3, 4], None, True)


def test_the_checker_notices_a_kernel_before_its_copy_has_landed() -> None:
    machine = watch(overwriting_job())
    machine.copy(1, 0, 14, 0, 40, 0)
    with pytest.raises(MachineFault, match="layer 1 computes key 14 at 0"):
        machine.experts(1, [14], None, True)


def test_the_checker_notices_a_channel_too_deep() -> None:
    machine = watch(overwriting_job())
    machine.copy(1, 0, 14, 0, 40, 0)
    with pytest.raises(MachineFault, match="2 chunks in flight, the channel holds 1"):
        machine.copy(2, 0, 15, 0, 40, 0)


def test_the_checker_notices_a_slot_taken_from_a_copy_under_way() -> None:
    machine = watch(overwriting_job())
    machine.depth = 2
    machine.copy(1, 0, 14, 0, 40, 0)
    with pytest.raises(MachineFault, match="key 15 takes slot 0 while 14 is still being copied"):
        machine.copy(2, 0, 15, 0, 40, 0)


class LastFirst(SimMachine):
    """Reports the chunks of a record in the wrong order."""

    def record(self, now_ns: int) -> Record:
        now, chunks, marks = super().record(now_ns)
        return now, list(chunks)[::-1], marks


def test_a_record_out_of_stream_order_is_refused() -> None:
    job = build(
        decode([[[3], [9]]], 10),
        num_experts=10,
        num_slots=9,
        initial=(3, 19),
        machine_type=LastFirst,
        policy=compose(predictor=Scripted({(0, 0, 1): [14, 15]})),
    )
    with pytest.raises(AssertionError, match="copy stream out of order: load 2 ended, 1 was due"):
        job.run()


@pytest.mark.parametrize(
    ("name", "identity"),
    [
        ("num_hits", "accesses = hits"),
        ("num_late", "accesses = hits"),
        ("num_misses", "accesses = hits"),
        ("num_host", "accesses = hits"),
        ("compute_ns", "elapsed = compute"),
        ("late_stall_ns", "elapsed = compute"),
        ("miss_stall_ns", "elapsed = compute"),
        ("host_stall_ns", "elapsed = compute"),
        ("overhead_ns", "elapsed = compute"),
        ("prefetch_useful", "prefetches issued"),
        ("prefetch_late", "prefetches issued"),
        ("prefetch_evicted_unused", "prefetches issued"),
        ("dropped_passed", "requested = issued"),
        ("dropped_became_host", "requested = issued"),
        ("demand_bytes", "bytes = chunks x size"),
        ("prefetch_bytes", "bytes = chunks x size"),
        ("link_busy_ns", "link busy"),
        ("host_busy_ns", "host busy"),
        ("num_launched", "experts launched . computed on the host = experts demanded"),
    ],
)
def test_a_counter_off_by_one_breaks_its_identity(name: str, identity: str) -> None:
    job = overwriting_job(SimMachine).run()
    counters = job.counters
    account: Any = job.runtime.queue if name == "num_launched" else counters
    off = counters.elapsed_ns + 1 if name in ("link_busy_ns", "host_busy_ns") else getattr(account, name) + 1
    setattr(account, name, off)
    with pytest.raises(PartError, match=identity) as refused:  # the parts of this job are foreign
        job.runtime.check_identities()
    assert isinstance(refused.value.__cause__, AssertionError)


class NeverGives(LRU):
    """Breaks the contract: refuses a demand though there is a victim."""

    def victim(self, key: int, cause: int) -> int | None:
        return None


def test_a_demand_that_is_refused_though_there_is_a_victim_is_the_parts_mistake() -> None:
    job = build(decode([[[3], [4]]], 10), num_experts=10, num_slots=1, policy=compose(eviction=NeverGives()))
    with pytest.raises(PartError, match=r"^NeverGives.victim answered None to the demand of key 14, though key 3 can"):
        job.run()


def test_a_run_that_cannot_go_on_says_where_it_stands() -> None:
    job = build(decode([[[3], [4]]], 10), num_experts=10, num_slots=1, policy=compose(eviction=NeverGives()))
    # Past the check, as a mistake of ours would be.
    job.runtime.queue._victim = NeverGives().victim
    with pytest.raises(StuckError, match=r"forward 0, layer 1: waiting for expert key 14; pinned \[14\]"):
        simulate(job.runtime, job.machine)


def changed(counters: Counters) -> Sequence[str]:
    """Names of the counters that are not zero."""
    return [item.name for item in fields(counters) if getattr(counters, item.name)]


def test_counters_after_a_warm_up_are_the_difference_of_two_totals() -> None:
    routings_ = [[[3], [4]], [[3], [5]], [[6], [4]]]
    whole = build(decode(routings_, 10), num_experts=10, num_slots=8, warmup_forwards=1).run()
    first = build(decode(routings_[:1], 10), num_experts=10, num_slots=8).run()
    assert whole.runtime.journal.before == first.counters
    measured = whole.counters.minus(first.counters)
    assert (measured.num_forwards, measured.num_hits, measured.num_misses) == (2, 2, 2)
    assert "num_evictions" not in changed(measured)
