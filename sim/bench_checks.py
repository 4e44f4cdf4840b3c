"""What the checks around parts that are not of this package cost a run (`python -m sim.bench --foreign`).

Each policy runs twice: with this package's classes, and with classes that derive from them and do nothing else, so that
they are checked as anybody's are (docs/contract.md). Both are asked in the ordinary way, distance by distance: what
this package's predictors save by deciding at once is no check's cost. The metrics of both must be the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from expertflow.parts import Announced, Part
from expertflow.policy import Policy
from sim.job.configure import configure
from sim.job.setup import Workload, make_policy, make_workload
from sim.machine.run import run_policy

BAR = 0.30
"""Of the time of a run without checks."""
ALL_EXPERTS = ("policy/predictor=hybrid", "policy.predictor.keep=0")
RUNS: dict[str, tuple[str, ...]] = {
    "lru": ("+policy=lru",),
    "fixed step, transition": ("+policy=fixed_2", "policy/predictor=transition"),
    "adaptive": ("+policy=adaptive",),
    "hybrid, all experts, top k": ("+policy=fixed_2", *ALL_EXPERTS),
    "hybrid, all experts, threshold": ("+policy=fixed_2", *ALL_EXPERTS, "policy/selection=threshold"),
    "hybrid, all experts, mass": ("+policy=fixed_4", *ALL_EXPERTS, "policy/selection=mass"),
}
"""Policies, by name: words of a configuration."""
TRACE = ("trace.num_tokens=128", "trace.num_requests=2", "trace.seed=0")
"""Short: many short runs in turn tell more on a busy machine than a few long ones."""


class _Asked(Policy):
    """A policy whose parts are asked one question after the other, and which are told of nothing beforehand."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(
            policy.predictor,
            policy.horizon,
            policy.selection,
            policy.eviction,
            policy.order,
            policy.future,
            policy.effort,
            policy.place,
        )
        self._at_once = False

    def announced(self) -> Announced | None:
        return None


def as_foreign(part: Part) -> None:
    """Make `part` one of a class that derives from its own, and is not of this package."""
    part.__class__ = type(part.__class__.__name__, (part.__class__,), {"__module__": "foreign"})


class Cost(NamedTuple):
    """Medians of several runs. ours_s, foreign_s: seconds of this process. share: what the checks add, of the run
    without."""

    ours_s: float
    foreign_s: float
    share: float


def _run(cfg: dict[str, Any], work: Workload, foreign: bool) -> tuple[float, dict[str, Any]]:
    made, transfer = make_policy(cfg["policy"], work, cfg["seed"])
    if foreign:
        for part in made.parts:
            as_foreign(part)
    policy = _Asked(made)
    started = time.process_time()
    metrics = run_policy(work, policy, transfer)
    return time.process_time() - started, metrics


def check_cost(words: Sequence[str], hardware: str, repeat: int) -> Cost:
    """Of the policy that `words` choose, over `TRACE`; `repeat` runs with checks, each between two without."""
    cfg = configure([f"+hardware={hardware}", *words, "compare=none", "chunk_mib=64", *TRACE])
    work = make_workload(cfg)
    # Not timed: functions are compiled.
    if _run(cfg, work, False)[1] != _run(cfg, work, True)[1]:
        raise AssertionError(f"{' '.join(words)}: checks have changed the run")
    rows = []
    for _ in range(repeat):
        # Before and after: a neighbour's load hits both.
        before, foreign, after = (_run(cfg, work, one)[0] for one in (False, True, False))
        ours = (before + after) / 2
        rows.append((ours, foreign, foreign / ours - 1))
    return Cost(*(median(column) for column in zip(*rows, strict=True)))


def measure_checks(hardware: str, repeat: int) -> dict[str, float]:
    """Print what the checks cost each policy; the shares."""
    print(f"{'policy':32} {'ours, ms':>9} {'checked, ms':>12} {'checks':>7} {'bar':>5}")
    found: dict[str, float] = {}
    for name, words in RUNS.items():
        cost = check_cost(words, hardware, repeat)
        found[name] = cost.share
        told = f"{cost.ours_s * 1e3:9.1f} {cost.foreign_s * 1e3:12.1f} {cost.share:+7.0%} {BAR:5.0%}"
        print(f"{name:32} {told}{'' if cost.share <= BAR else '  missed'}")
    return found
