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
from sim.job.parts import KINDS
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
    """Medians of several runs. ours_s, foreign_s: seconds of this process, all parts being foreign. share: what the
    checks then add, of the run without. dearest, dearest_share: the part that adds most where it alone is foreign, as
    one of a user's own beside this package's is, and what it adds."""

    ours_s: float
    foreign_s: float
    share: float
    dearest: str
    dearest_share: float


def _run(cfg: dict[str, Any], work: Workload, foreign: Sequence[int]) -> tuple[float, dict[str, Any]]:
    """CPU seconds and metrics, with the parts of these numbers being foreign."""
    made, transfer = make_policy(cfg["policy"], work, cfg["seed"])
    for number in foreign:
        as_foreign(made.parts[number])
    policy = _Asked(made)
    started = time.process_time()
    metrics = run_policy(work, policy, transfer)
    return time.process_time() - started, metrics


def check_cost(words: Sequence[str], hardware: str, repeat: int) -> Cost:
    """Of the policy that `words` choose, over `TRACE`; `repeat` runs with checks, each between two without."""
    cfg = configure([f"+hardware={hardware}", *words, "compare=none", "chunk_mib=64", *TRACE])
    work = make_workload(cfg)
    everyone = range(len(KINDS))
    # Not timed: functions are compiled.
    if _run(cfg, work, ())[1] != _run(cfg, work, everyone)[1]:
        raise AssertionError(f"{' '.join(words)}: checks have changed the run")

    def compared(foreign: Sequence[int]) -> tuple[float, float, float]:
        rows = []
        for _ in range(repeat):
            # Before and after: a neighbour's load hits both.
            before, checked, after = (_run(cfg, work, one)[0] for one in ((), foreign, ()))
            ours = (before + after) / 2
            rows.append((ours, checked, checked / ours - 1))
        ours, checked, share = (median(column) for column in zip(*rows, strict=True))
        return ours, checked, share

    alone = {kind: compared([number])[2] for number, kind in enumerate(KINDS)}
    dearest = max(alone, key=lambda kind: alone[kind])
    return Cost(*compared(everyone), dearest, alone[dearest])


def measure_checks(hardware: str, repeat: int) -> dict[str, float]:
    """Print what the checks cost each policy; the shares where all parts are foreign."""
    print(f"{'policy':31}{'ours':>8}{f'all checked ({BAR:.0%})':>17}  one part alone")
    found: dict[str, float] = {}
    for name, words in RUNS.items():
        cost = check_cost(words, hardware, repeat)
        found[name] = cost.share
        told = f"{cost.ours_s * 1e3:5.0f} ms{cost.foreign_s * 1e3:8.0f} ms {cost.share:+5.0%}"
        alone = f"{cost.dearest_share:+.0%} {cost.dearest}"
        print(f"{name:31}{told}  {alone}{'' if cost.share <= BAR else '  missed'}")
    return found
