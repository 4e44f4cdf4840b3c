"""Forwards as they were recorded, and verify steps of speculative decoding: counts and nanoseconds by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertflow.forward import DECODE, PREFILL, Forward, Span
from expertflow.model import ModelSpec, model_from_dict
from sim import simulate, sweep
from sim.job.configure import configure
from sim.job.setup import make_workload
from sim.machine.kernels import KernelTimes
from sim.specs.hardware import Hardware, Stack, hardware_from_dict
from tests.support.commands import TINY_MODEL, TINY_MODEL_WORDS, job, routing, run_here, tiny_trace
from traces.batching import BatchConfig, Batches
from traces.format import About, write_trace
from traces.messages import TraceError
from traces.reader import Trace, open_trace
from traces.recorded_batches import first_difference, most_side_by_side
from traces.speculation import Speculation, num_accepted

WORDS = ("+hardware=a100", "+policy=lru", "compare=none", *TINY_MODEL_WORDS)


def traced(folder: Path, forward_id: Sequence[int] | None, starts: list[int], prompts: list[int]) -> Trace:
    """A trace of `TINY_MODEL`."""
    arrays: dict[str, Any] = {
        "experts": routing((4, 8, 2), starts[-1]),
        "request_start": starts,
        "prompt_len": prompts,
    }
    if forward_id is not None:
        arrays["forward_id"] = np.array(forward_id)
    about = About("tiny", 8, "tests", "none")
    return open_trace(write_trace(folder / "tiny.safetensors", arrays, about))


def shape(forward: Forward) -> tuple[str, list[int], tuple[int, ...], int, int]:
    return forward.phase, list(forward.rows), forward.kv_lens, forward.num_logits, forward.num_out


# -- as recorded ---------------------------------------------------------------------------------------------


def test_both_requests_of_a_scheduler_step_run_in_one_forward(tmp_path: Path) -> None:
    """Two requests, a prompt of one token each and then three steps together, of two layers and two experts a token.

    The first step's tokens of both requests choose the same two experts a layer; the later ones differ.
    """
    same, other = [[0, 1], [0, 1]], [[2, 3], [2, 3]]
    experts = np.array([same] * 5 + [other] * 3, np.uint8)
    arrays = {"experts": experts, "request_start": [0, 4, 8], "prompt_len": [1, 1], "forward_id": [0, 1, 2, 3] * 2}
    trace = open_trace(write_trace(tmp_path / "two.safetensors", arrays, About("toy", 4, "tests", "none")))
    forwards = list(Batches(trace, BatchConfig(as_recorded=True)))
    assert [shape(forward)[:3] for forward in forwards] == [
        (PREFILL, [0, 4], (1, 1)),
        (DECODE, [1, 5], (2, 2)),
        (DECODE, [2, 6], (3, 3)),
        (DECODE, [3, 7], (4, 4)),
    ]
    # 2 + 2 in the first forward, 4 + 4 in each other.
    assert sum(len(keys) for forward in forwards for keys in forward.demands) == 4 + 3 * 8
    assert [forward.num_out for forward in forwards] == [2, 2, 2, 2]
    assert [forward.requests_started for forward in forwards] == [(0, 1), (), (), ()]
    assert [forward.requests_ended for forward in forwards] == [(), (), (), (0, 1)]
    # Decode forwards of one row a request are those that a run makes itself.
    assert [bool(forward.spans) for forward in forwards] == [True, False, False, False]
    assert (first_difference(trace, BatchConfig()), first_difference(trace, BatchConfig(batch_size=2))) == (0, 0)
    assert most_side_by_side(trace) == 2


def test_a_prompt_beside_a_decode_and_chunks_of_a_prompt(tmp_path: Path) -> None:
    # a: a prompt of 2 in forward 0, then one token a forward. b: a prompt of 3 in forwards 1 and 2, a token in 4.
    trace = traced(tmp_path, [0, 0, 1, 2, 1, 1, 2, 4], [0, 4, 8], [2, 3])
    forwards = list(Batches(trace, BatchConfig(as_recorded=True)))
    assert [shape(forward) for forward in forwards] == [
        (PREFILL, [0, 1], (1, 2), 1, 1),
        (DECODE, [2, 4, 5], (3, 1, 2), 1, 1),
        (DECODE, [3, 6], (4, 3), 2, 2),
        (DECODE, [7], (4,), 1, 1),
    ]
    assert forwards[1].spans == (Span(0, 1, False, 1, 1), Span(1, 2, True, 0, 0))
    assert forwards[2].spans == (Span(0, 1, False, 1, 1), Span(1, 1, True, 1, 1))
    assert (forwards[0].spans, forwards[3].spans) == ((), ())
    assert [forward.has_prompt for forward in forwards] == [True, True, True, False]
    # Cut behind the first row of b's prompt.
    cut = list(Batches(trace, BatchConfig(max_tokens=5, as_recorded=True)))
    assert [list(forward.rows) for forward in cut] == [[0, 1], [2, 4], [3]]
    assert cut[1].requests_ended == (1,)


def test_what_was_recorded_one_by_one_is_what_a_run_makes_by_itself(tmp_path: Path) -> None:
    trace = traced(tmp_path, [0, 0, 1, 2, 3, 3, 3, 4], [0, 4, 8], [2, 3])
    made, recorded = list(Batches(trace, BatchConfig())), list(Batches(trace, BatchConfig(as_recorded=True)))
    for one, other in zip(made, recorded, strict=True):
        assert shape(one) == shape(other)
        for name in ("demands", "issue_order", "counts", "requests", "requests_started", "requests_ended", "spans"):
            assert getattr(one, name) == getattr(other, name), name
    words = (*WORDS, f"trace.path={trace.paths[0]}", "residency=0.2")
    assert job(*words) == job(*words, "batch_size=as_recorded")
    assert first_difference(trace, BatchConfig()) is None
    assert first_difference(trace, BatchConfig(prefill_chunk=2)) == 3


def test_a_run_that_makes_other_forwards_says_so(tmp_path: Path) -> None:
    trace = traced(tmp_path, [0, 1, 2, 0, 1, 2], [0, 3, 6], [0, 0])
    words = [*WORDS, f"trace.path={trace.paths[0]}"]
    said = " ".join(run_here(words, tmp_path / "one").out.split())
    assert (
        "batch_size=1 prefill_chunk=512 makes other forwards than the 3 that were recorded (from forward 0 on)" in said
    )
    assert "batch_size=as_recorded replays these" in said
    for more in ("batch_size=2", "batch_size=as_recorded"):
        outcome = run_here([*words, more], tmp_path / more.partition("=")[2])
        assert outcome.metrics()["num_forwards"] == 3
        assert "other forwards" not in outcome.out


def test_several_recorded_tokens_of_a_request_are_a_verify_step(tmp_path: Path) -> None:
    trace = traced(tmp_path, [0, 1, 1, 1, 2, 3, 3], [0, 7], [1])
    forwards = list(Batches(trace, BatchConfig(as_recorded=True)))
    assert [forward.num_out for forward in forwards] == [1, 3, 1, 2]
    assert [forward.spans for forward in forwards] == [(), (Span(0, 3, False, 3, 3),), (), (Span(0, 2, False, 2, 2),)]
    metrics = job(*WORDS, f"trace.path={trace.paths[0]}", "batch_size=as_recorded")
    assert (metrics["num_forwards"], metrics["num_tokens"]) == (4, 7)
    assert metrics["speculation"]["num_accepted"] == metrics["speculation"]["num_drafted"] == 3
    # Six decoded tokens in the time of three forwards.
    assert metrics["tpot_ms"]["mean"] * 6 == pytest.approx((metrics["elapsed_ns"] / 1e6) - metrics["ttft_ms"]["mean"])


def test_what_cannot_be_replayed_as_recorded_is_refused(tmp_path: Path) -> None:
    trace = traced(tmp_path, None, [0, 4], [0])
    with pytest.raises(TraceError, match="does not say which forward a token ran in"):
        Batches(trace, BatchConfig(as_recorded=True))
    for more, said in (
        (["batch_size=as_recorded", "prefill_chunk=4"], "prefill_chunk=4 means nothing with batch_size=as_recorded"),
        (["batch_size=as_recorded", "speculate=[2,0.5]"], "leave one out"),
        (["batch_size=recorded"], r"must be a whole number in \[1, 65536\] requests, or as_recorded \(did you mean"),
        (["batch_size=[1]"], "must be a whole number"),
    ):
        with pytest.raises(ValueError, match=said):
            configure([*WORDS, f"trace.path={trace.paths[0]}", *more])


# -- speculation ---------------------------------------------------------------------------------------------


def test_of_drafted_tokens_those_before_the_first_rejection_are_accepted() -> None:
    for said, accepted in (([1, 1, 1], 3), ([1, 0, 1], 1), ([0, 1, 1], 0), ([], 0)):
        assert num_accepted(np.array(said, np.bool_)) == accepted


def test_the_mean_that_comes_out_is_that_of_the_formula() -> None:
    """(1 - a^(k+1)) / (1 - a) tokens a step."""
    accepts, k = Speculation(3, 0.7, seed=5).accepts(0, 200_000), 3
    at = steps = 0
    while at + k + 1 <= len(accepts):
        at += 1 + num_accepted(accepts[at + 1 : at + 1 + k])
        steps += 1
    assert at / steps == pytest.approx((1 - 0.7**4) / 0.3, rel=0.01)


def speculated(trace: Trace, *told: Any, **settings: Any) -> list[Forward]:
    return list(Batches(trace, BatchConfig(speculation=Speculation(*told), **settings)))


def test_all_accepted_and_none(tmp_path: Path) -> None:
    trace = traced(tmp_path, None, [0, 10], [0])
    plain = list(Batches(trace, BatchConfig()))
    every = speculated(trace, 3, 1.0)
    # Ten tokens, four a forward.
    assert [list(forward.rows) for forward in every] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [forward.num_out for forward in every] == [4, 4, 2]
    none = speculated(trace, 3, 0.0)
    assert [list(forward.rows) for forward in none[:2]] == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert [list(forward.rows) for forward in none[-3:]] == [[7, 8, 9], [8, 9], [9]]
    assert [forward.num_out for forward in none] == [forward.num_out for forward in plain] == [1] * 10
    for wide, narrow in zip(none, plain, strict=True):
        # The first row is the token that a run without speculation takes, and the others' experts come on top.
        assert wide.kv_lens[0] == narrow.kv_lens[0]
        for keys, own in zip(wide.demands, narrow.demands, strict=True):
            assert set(own) <= set(keys)
    assert [forward.num_logits for forward in none] == [4] * 7 + [3, 2, 1]
    assert [forward.requests_ended for forward in every] == [(), (), (0,)]


def test_requests_side_by_side_go_on_each_by_its_own_tokens(tmp_path: Path) -> None:
    trace = traced(tmp_path, None, [0, 6, 12], [2, 0])
    told = Speculation(2, 0.5, seed=1)
    accepts = [told.accepts(request, 6) for request in (0, 1)]
    forwards = speculated(trace, 2, 0.5, 7, 1, batch_size=2)
    assert forwards[0].phase == PREFILL
    at = [2, 0]
    for forward in forwards[1:]:
        expected: list[int] = []
        for request in forward.requests:
            first, base = at[request], 6 * request
            expected += range(base + first, base + min(first + 3, 6))
            at[request] += 1 + num_accepted(accepts[request][first + 1 : first + 3][: 5 - first])
        assert list(forward.rows) == expected
        assert forward.draft_ns == (7 if len(expected) > len(forward.requests) else 0)
    assert at == [6, 6]
    assert [shape(forward) for forward in speculated(trace, 2, 0.5, 7, 1, batch_size=2)] == list(map(shape, forwards))


def test_a_run_counts_what_came_out_and_its_draft(tmp_path: Path) -> None:
    path = tiny_trace(tmp_path / "tiny.safetensors", 24, num_requests=2)
    words = (*WORDS, f"trace.path={path}", "residency=1", "start=resident")
    plain, none, every = (job(*words, *more) for more in ([], ["speculate=[3,0]"], ["speculate=[3,1]"]))
    assert "speculation" not in plain
    assert plain["num_tokens"] == none["num_tokens"] == every["num_tokens"] == 24
    assert (plain["num_forwards"], none["num_forwards"], every["num_forwards"]) == (24, 24, 6)
    assert none["num_accesses"] > plain["num_accesses"]
    # 12 tokens a request: 9 forwards draft three, and the last ones two, one and none.
    steps = {"num_steps": 24, "num_drafted": 2 * (9 * 3 + 2 + 1), "num_accepted": 0}
    assert none["speculation"] == {**steps, "accepted_per_step": 0.0, "tokens_per_step": 1.0}
    steps = {"num_steps": 6, "num_drafted": 18, "num_accepted": 18}
    assert every["speculation"] == {**steps, "accepted_per_step": 3.0, "tokens_per_step": 4.0}
    for run in (plain, none, every):
        assert run["tpot_ms"]["mean"] * 24e6 == pytest.approx(run["elapsed_ns"])
    assert every["tpot_ms"]["mean"] < plain["tpot_ms"]["mean"] < none["tpot_ms"]["mean"]
    # A millisecond of drafting before each of the six forwards.
    drafted = job(*words, "speculate=[3,1]", "draft_ms=1")
    assert drafted["elapsed_ns"] - every["elapsed_ns"] == 6_000_000
    assert drafted["compute_ns"] == every["compute_ns"]


def test_no_schedule_beats_the_floor_of_a_speculated_run(tmp_path: Path) -> None:
    path = tiny_trace(tmp_path / "tiny.safetensors", 24, num_requests=2)
    words = [word for word in WORDS if word != "compare=none"]
    for more in (["speculate=[2,0.6]", "draft_ms=0.3"], ["speculate=[4,0.9]", "batch_size=2"]):
        metrics = job(*words, f"trace.path={path}", "residency=0.3", *more)
        assert metrics["bounds"]["floor_ns"] <= metrics["bounds"]["clairvoyant_ns"] <= metrics["elapsed_ns"]


def test_words_tuples_and_sweeps_ask_for_the_same(tmp_path: Path) -> None:
    path = tiny_trace(tmp_path / "tiny.safetensors")
    told = run_here([*WORDS, f"trace.path={path}", "speculate=4,0.8", "seed=3"], tmp_path / "run")
    assert told.done, told.err
    assert "the draft model costs no time (draft_ms=0)" in " ".join(told.out.split())
    model = {**TINY_MODEL, "name": "auto"}
    keys = {f"model.{key}": value for key, value in model.items() if key != "name"} | {"model.name": "tiny"}
    common: dict[str, Any] = {"hardware": "a100", "policy": "lru", "trace": path, "compare": "none", "seed": 3, **keys}
    result = simulate(speculate=(4, 0.8), **common)
    assert result.metrics["speculation"] == told.metrics()["speculation"]
    found = sweep(speculate=[(4, 0.8), (2, 0.8)], jobs=1, **common)
    steps = [run.metrics["speculation"]["num_steps"] for run in found]
    assert len(steps) == 2
    assert steps[0] == result.metrics["speculation"]["num_steps"] < steps[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["speculate=[0,0.5]"], "drafted tokens must be a whole number in [1, 64]"),
        (["speculate=[65,0.5]"], "drafted tokens must be a whole number in [1, 64]"),
        (["speculate=[2.5,0.5]"], "drafted tokens must be a whole number in [1, 64]"),
        (["speculate=[2,1.5]"], "the acceptance of a drafted token must be in [0, 1]"),
        (["speculate=[2,nan]"], "the acceptance of a drafted token must be in [0, 1]"),
        (["speculate=[2,true]"], "must be drafted tokens and their acceptance"),
        (["speculate=2"], "must be drafted tokens and their acceptance, as speculate=4,0.8"),
        (["draft_ms=2"], "draft_ms=2 is of drafted tokens, and none are"),
        (["speculate=[2,0.5]", "draft_ms=-1"], "draft_ms=-1 is outside [0, 100000] ms"),
    ],
)
def test_other_speculation_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError) as error:
        configure([*WORDS, *words])
    assert said in str(error.value)


# -- times ---------------------------------------------------------------------------------------------------


def kernels(**stack: int) -> tuple[KernelTimes, ModelSpec, Hardware]:
    cfg = configure([*WORDS, "hardware.compute_efficiency=1", "hardware.memory_efficiency=1"])
    hardware, model = hardware_from_dict(cfg["hardware"]), model_from_dict(TINY_MODEL)
    return KernelTimes(model, hardware, Stack("none", 0, 0, **stack)), model, hardware


def test_a_verify_step_reads_the_cache_once_and_the_weights_once() -> None:
    times, model, hardware = kernels()
    # Attention and router of one layer: hidden 512, 8 heads of 64, 8 experts; 16-bit weights and cache.
    weights = (4 * 512 * 512 + 512 * 8) * 2
    entry = 2 * 8 * 64 * 2
    for kv_lens, entries in (((100_000, 100_001, 100_002), 100_002), ((100_000,), 100_000)):
        span = Span(0, len(kv_lens), False, 1, len(kv_lens))
        expected = round((weights + entries * entry) / hardware.memory_gb_per_s)
        assert times.attention_spans_ns(kv_lens, [span]) == [expected] * model.num_layers
    # Of two requests each has a cache of its own; a prompt's chunk beside them adds its own.
    spans = [Span(0, 2, False, 1, 2), Span(1, 1, False, 1, 1), Span(2, 2, True, 0, 0)]
    total = round((weights + (50_001 + 70_000 + 60_001) * entry) / hardware.memory_gb_per_s)
    assert times.attention_spans_ns((50_000, 50_001, 70_000, 60_000, 60_001), spans) == [total] * model.num_layers


def test_spans_of_one_row_or_of_one_prompt_take_what_forwards_without_spans_take() -> None:
    for stack in ({}, {"kv_grid": 256}):
        times, _, _ = kernels(**stack)
        decoded = [Span(request, 1, False, 1, 1) for request in range(3)]
        assert times.attention_spans_ns((900, 31, 77), decoded) == times.attention_list_ns(3, (900, 31, 77), False)
        lens = tuple(range(501, 513))
        assert times.attention_spans_ns(lens, [Span(0, 12, True, 1, 1)]) == times.attention_list_ns(12, lens, True)


def test_a_grid_rounds_all_decoded_rows_together_and_no_prompt() -> None:
    times, _, _ = kernels(kv_grid=1024)
    plain, _, _ = kernels()
    spans = [Span(0, 3, False, 1, 3), Span(1, 1, False, 1, 1), Span(2, 2, True, 0, 0)]
    # 900,002 + 700,000 entries are 1,600,512 of the grid.
    on_grid = times.attention_spans_ns((900_000, 900_001, 900_002, 700_000, 1, 2), spans)
    assert on_grid == plain.attention_spans_ns((900_000, 900_001, 900_002, 700_510, 1, 2), spans)


def test_a_workload_keeps_the_cache_of_all_requests_that_are_open_at_a_time(tmp_path: Path) -> None:
    # b ends before c begins.
    trace = traced(tmp_path, [0, 1, 2, 3, 4, 0, 1, 3, 4], [0, 5, 7, 9], [0, 0, 0])
    assert most_side_by_side(trace) == 2
    words = (*WORDS, f"trace.path={trace.paths[0]}", "gpu_memory_gb=2")
    slots = [make_workload(configure([*words, f"batch_size={size}"])).num_slots for size in (2, "as_recorded")]
    assert slots[0] == slots[1]
