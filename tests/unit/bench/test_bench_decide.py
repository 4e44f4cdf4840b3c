"""The stopwatch's account of a policy's code, and the command around it. No test asserts how long anything takes."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import replay.bench_decide as bench
from expertflow.policy import Policy
from replay.bench_decide import (
    DecisionTimes,
    compare_policies,
    holds,
    main,
    measure_decisions,
    measure_steps,
    summarise,
)
from replay.stopwatch import GLUE, PARTS, Overhead, Step, Stopwatch, measure_overhead
from sim.machine.run import run_policy
from tests.support.workloads import drawn_workload, policy_for

ROOT = Path(__file__).parents[3]


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def spend(self, ns: int) -> None:
        self.now += ns


def watched(**changes: Overhead) -> tuple[Clock, Stopwatch]:
    """A clock and a stopwatch on it, at layer-step 0, looking one layer ahead."""
    clock = Clock()
    watch = Stopwatch(clock, **changes)
    watch.event_of = lambda: 0
    watch.reach_of = lambda: 1
    return clock, watch


def step_of(total: int, reach: int = 1, is_prompt: bool = False) -> Step:
    step = Step(is_prompt)
    step.parts_ns["predictor"] = total
    step.reach = reach
    return step


# -- accounting ----------------------------------------------------------------------------------------------


def nested(clock: Clock, watch: Stopwatch) -> Callable[[], None]:
    """decide: 3 + (predict: 10 + (distances: 2) + 5) + 7 + (select: 1)."""
    distances = watch.wrap(lambda: clock.spend(2), "horizon", "distances")

    def predict() -> None:
        clock.spend(10)
        distances()
        clock.spend(5)

    timed_predict = watch.wrap(predict, "predictor", "predict")
    select = watch.wrap(lambda: clock.spend(1), "selection", "select")

    def decide() -> None:
        clock.spend(3)
        timed_predict()
        clock.spend(7)
        select()

    return watch.wrap(decide, GLUE, "decide")


def test_a_call_within_a_call_is_counted_once() -> None:
    clock, watch = watched()
    decide = nested(clock, watch)
    clock.spend(1000)
    decide()
    clock.spend(1000)
    decide()
    (step,) = watch.steps
    assert step.parts_ns == dict.fromkeys((*PARTS, GLUE), 0) | {"predictor": 30, "horizon": 4, "selection": 2, GLUE: 20}
    assert step.total_ns == step.decide_ns == 56
    assert step.reach == 1


def test_the_stopwatchs_own_cost_is_taken_off_the_call_and_its_caller() -> None:
    clock, watch = watched(overhead=Overhead(inside=1, outside=2))
    nested(clock, watch)()
    # One call inside predict, two inside decide.
    spent = {"predictor": 15 - 1 - 2, "horizon": 2 - 1, "selection": 1 - 1, GLUE: 10 - 1 - 4}
    assert watch.steps[0].parts_ns == dict.fromkeys((*PARTS, GLUE), 0) | spent


def test_a_step_below_the_clocks_noise_took_no_time() -> None:
    clock, watch = watched(overhead=Overhead(inside=5))
    watch.wrap(lambda: clock.spend(2), "eviction", "touched")()
    assert watch.steps[0].total_ns == 0


def test_each_call_is_booked_to_the_layer_that_runs_and_forwards_apart() -> None:
    clock, watch = watched()
    events = itertools.count(-1)
    watch.event_of = lambda: next(events)
    touched = watch.wrap(lambda: clock.spend(4), "eviction", "touched")
    begin = watch.wrap(lambda: clock.spend(20), GLUE, "begin_forward")
    end = watch.wrap(lambda: clock.spend(30), GLUE, "end_forward")
    touched()  # Before the first layer: what is resident at the start.
    touched()
    begin()
    touched()
    end()
    assert [step.total_ns for step in watch.steps] == [4, 0, 4]
    assert watch.forwards_ns == [50]


def test_an_error_in_the_policy_passes_and_leaves_the_account_in_order() -> None:
    clock, watch = watched()

    def fails() -> None:
        clock.spend(6)
        raise ValueError("no idea")

    with pytest.raises(ValueError, match="no idea"):
        watch.wrap(watch.wrap(fails, "predictor", "predict"), GLUE, "decide")()
    watch.wrap(lambda: clock.spend(1), "order", "arrange")()
    assert watch.steps[0].parts_ns["predictor"] == 6
    assert watch.steps[0].parts_ns["order"] == 1


def test_arguments_and_answers_pass_through() -> None:
    _, watch = watched()
    assert watch.wrap(lambda key, cause=0: (key, cause), "eviction", "victim")(3, cause=1) == (3, 1)


# -- figures -------------------------------------------------------------------------------------------------


def test_quantiles_are_values_that_occurred() -> None:
    watch = Stopwatch()
    watch.steps = [step_of(total) for total in range(100, 0, -1)]
    times = summarise(watch)
    assert (times.p50_ns, times.p90_ns, times.p99_ns, times.max_ns) == (50, 90, 99, 100)
    assert times.mean_ns == 50.5
    watch.steps = [step_of(7)]
    assert summarise(watch).p50_ns == summarise(watch).p99_ns == 7


def test_layers_that_looked_farther_or_decided_nothing_or_belong_to_a_prompt_can_be_left_out() -> None:
    watch = Stopwatch()
    watch.steps = [step_of(1, reach=0), step_of(2, reach=2), step_of(3, reach=1), step_of(900, reach=3)]
    watch.steps += [step_of(800, reach=1, is_prompt=True), step_of(800, reach=0, is_prompt=True)]
    every = summarise(watch)
    assert (every.num_layers, every.num_prompt, every.num_idle, every.num_beyond) == (6, 0, 0, 0)
    near = summarise(watch, max_reach=2)
    assert (near.p50_ns, near.max_ns, near.num_layers) == (2, 3, 2)
    assert (near.num_prompt, near.num_idle, near.num_beyond) == (2, 1, 1)
    watch.steps = [step_of(900, reach=3)]
    with pytest.raises(ValueError, match="none of 1 layer-steps"):
        summarise(watch, max_reach=2)


def times_of(p50_ns: float, p99_ns: float) -> DecisionTimes:
    return DecisionTimes(
        p50_ns, p50_ns, p99_ns, p50_ns, p99_ns, 0.0, 100, 0, 0, 0, dict.fromkeys((*PARTS, GLUE), 0.0), 0, 0
    )


@pytest.mark.parametrize(("p50", "p99", "kept"), [(25e3, 100e3, True), (25_001, 60e3, False), (1e3, 100_001, False)])
def test_both_sides_of_the_budget(p50: float, p99: float, kept: bool) -> None:
    assert holds(times_of(p50, p99)) is kept


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.mark.mostly_slow(keep=1)
@pytest.mark.parametrize("name", ["adaptive", "lru", "two_level", "on_demand", "clairvoyant"])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_account_adds_up_and_the_run_is_the_same_as_without_it(name: str, seed: int) -> None:
    work = drawn_workload(seed)
    policy, transfer = policy_for(work, name)
    times = measure_decisions(work, policy, transfer)
    metrics = run_policy(work, *policy_for(work, name))
    assert times.num_layers == metrics["num_forwards"] * work.model.num_layers
    assert 0 <= times.p50_ns <= times.p90_ns <= times.p99_ns <= times.max_ns
    assert times.mean_ns == pytest.approx(sum(times.parts_ns.values()))
    assert set(times.parts_ns) == {*PARTS, GLUE}
    if not policy.prefetches:
        assert times.decide_ns == 0
        assert times.parts_ns["predictor"] == 0


@pytest.mark.slow
def test_every_hook_that_the_runtime_calls_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: set[str] = set()
    wrap = Stopwatch.wrap

    def noting(self: Stopwatch, function: Callable[..., object], part: str, hook: str) -> Callable[..., object]:
        def noted(*args: object) -> object:
            heard.add(f"{part}.{hook}")
            return function(*args)

        return wrap(self, noted, part, hook)

    monkeypatch.setattr(Stopwatch, "wrap", noting)
    for seed in range(6):
        work = drawn_workload(seed)
        measure_steps(work, *policy_for(work, "adaptive"))
    assert heard >= {
        "policy.begin_forward",
        "policy.routed",
        "policy.decide",
        "policy.feedback",
        "policy.end_forward",
        "predictor.begin_forward",
        "predictor.predict",
        "predictor.end_forward",
        "horizon.distances",
        "horizon.feedback",
        "horizon.evicted",
        "selection.select",
        "eviction.touched",
        "eviction.admitted",
        "eviction.victim",
        "eviction.predicted",
        "eviction.layer_end",
        "eviction.evicted",
    }
    assert "predictor.announced" not in heard


@pytest.mark.slow
def test_layers_of_prompts_are_told_apart() -> None:
    for seed in range(4):
        work = drawn_workload(seed)
        watch = measure_steps(work, *policy_for(work, "lru"))
        told = [step.is_prompt for step in watch.steps]
        assert told == [forward.phase == "prefill" for forward in work.batches for _ in range(work.model.num_layers)]
    assert any(told)


def test_nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Policy) -> None:
        raise AssertionError("prepared in blocks")

    monkeypatch.setattr(Policy, "announced", refuse)
    work = drawn_workload(1)
    measure_decisions(work, *policy_for(work, "adaptive"))


def test_the_own_cost_of_timing_is_measured() -> None:
    overhead = measure_overhead()
    assert overhead.inside >= 0
    assert overhead.outside > 0


# -- command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_has_a_row_for_each_policy_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--policies", "adaptive,lru", "--tokens", "4"]) in (0, 1)
    head, columns, adaptive, verdict, lru, legend = capsys.readouterr().out.splitlines()
    assert "4 tokens, batch 1, 384 slots" in head
    for word in ("p50", "p90", "p99", "max", "calls", *PARTS, "decide"):
        assert word in columns.split()
    assert adaptive.split()[0] == "adaptive"
    assert lru.split()[0] == "lru"
    assert len(adaptive.split()) == len(lru.split()) == 1 + 6 + len(PARTS) + 1 + 1 + 2
    assert "p50 <= 25 us and p99 <= 100 us" in verdict
    near, beyond, idle, prompt = re.findall(r"(\d+) (?:layer-steps|beyond|without|of prompts)", verdict)
    # Nothing is decided in the first of four forwards.
    assert (int(near) + int(beyond), idle, prompt) == (72, "24", "0")
    assert "bare Python function call" in legend


@pytest.mark.slow
@pytest.mark.parametrize(("bar", "good"), [(0, False), (10**12, True)])
def test_the_exit_code_is_the_budgets(monkeypatch: pytest.MonkeyPatch, bar: int, good: bool) -> None:
    monkeypatch.setattr(bench, "BAR_P50_NS", bar)
    monkeypatch.setattr(bench, "BAR_P99_NS", bar)
    assert compare_policies(None, ["adaptive"], 1, 4) is good
    # Another policy, another batch: no budget was given for it.
    assert compare_policies(None, ["lru"], 1, 4)
    assert compare_policies(None, ["adaptive"], 2, 4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--policies", "adaptiv"], "adaptiv"),
        (["--policies", "lru,,lfu"], "names with commas"),
        (["--tokens", "0"], "'0' must be a whole number of at least 1"),
        (["--batch-size", "1.5"], "'1.5' must be a whole number of at least 1"),
        (["nowhere.safetensors"], "nowhere.safetensors"),
        (["gpt-oss-20b-twn"], "did you mean gpt-oss-20b-twin?"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_a_users_error_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    seen = capsys.readouterr()
    assert (code, seen.out) == (2, "")
    assert seen.err.startswith("error: ")
    assert told in seen.err
    assert seen.err.count("\n") == 1


@pytest.mark.slow
def test_a_recordings_short_name_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpt-oss-20b-twin", "--policies", "lru", "--tokens", "4"]) == 0
    assert "gpt-oss-20b-twin-eval" in capsys.readouterr().out


def test_torch_is_not_needed() -> None:
    code = "import sys, replay.bench_decide; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
