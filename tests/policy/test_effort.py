"""What a decision costs the host: by predictor, by how many layers it predicted, or as the policy says."""

from __future__ import annotations

import pytest

from expertflow.parts import Effort
from expertflow.predictors.hybrid import HybridPredictor
from sim.job.configure import configure
from sim.job.setup import make_policy, make_workload
from sim.machine.run import run_policy

WORDS = [
    "+hardware=a100",
    "+policy=fixed_2",
    "policy/predictor=transition",
    "policy/selection=top_k",
    "compare=none",
    "max_tokens=40",
    "warmup_forwards=0",
    "residency=0.5",
]


def elapsed_ns(*words: str) -> int:
    cfg = configure([*WORDS, *words])
    work = make_workload(cfg)
    policy, transfer = make_policy(cfg["policy"], work, cfg["seed"])
    return int(run_policy(work, policy, transfer)["elapsed_ns"])


def test_by_default_a_decision_is_that_of_the_hardware_whatever_it_predicts() -> None:
    assert elapsed_ns("hardware.decide_ns=50000") == elapsed_ns("hardware.decide_ns=25000", "+policy.effort.once=2")


@pytest.mark.slow
def test_layers_that_are_predicted_cost_extra() -> None:
    told = ["hardware.decide_ns=200000", "+policy.effort={once: 0, per_layer: 1}"]
    once = elapsed_ns(*told)
    # The network's predictions are made anew at each layer: two of them, where a table's farther one is kept.
    both = elapsed_ns(*told, "policy/predictor=hybrid")
    free = elapsed_ns("hardware.decide_ns=0"), elapsed_ns("hardware.decide_ns=0", "policy/predictor=hybrid")
    assert both - free[1] > once - free[0] > 0


@pytest.mark.slow
def test_a_network_that_decides_at_once_is_cheaper_and_the_policy_may_say_otherwise() -> None:
    cfg = configure(["+hardware=a100", "+policy=adaptive", "compare=none"])
    work = make_workload(cfg)
    told = make_policy({**cfg["policy"], "effort": {"once": 7}}, work, 0)[0]
    assert told.effort == Effort(7, 0.0)
    assert make_policy(cfg["policy"], work, 0)[0].effort == HybridPredictor.effort_at_once == Effort(0.4, 0.08)
    # Asked part by part it costs what a table does, at two layers.
    asked = make_policy(configure(["+hardware=a100", "+policy=fixed_2", "compare=none"])["policy"], work, 0)[0]
    assert asked.effort == HybridPredictor.effort
    assert asked.effort.of(2) == Effort().of(2) == 1.0


def test_the_mean_over_decisions_counts_what_was_predicted() -> None:
    cfg = configure([*WORDS, "+policy.effort={once: 1, per_layer: 1}", "policy/predictor=hybrid"])
    work = make_workload(cfg)
    policy, transfer = make_policy(cfg["policy"], work, 0)
    assert policy.mean_effort() == 1.0
    run_policy(work, policy, transfer)
    assert policy.mean_effort() == 3.0


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("+policy.effort.once=-1", r"effort\.once=-1 must be a number in 0 … 1000"),
        ("+policy.effort.per_layer=x", r"effort\.per_layer='x' must be a number"),
        ("+policy.effort.twice=1", r"policy\.effort\.twice is no key; known: once, per_layer"),
    ],
)
def test_nonsense_is_refused(word: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        elapsed_ns(word)
