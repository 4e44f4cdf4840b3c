"""What a validation measures, and in which order, so that a short time still covers every policy and capacity.

Order: once through one case of each policy and capacity, one capacity under one stack and the next under another, then
their repeats, then the other cases block by block: batch by batch, capacity by capacity, and in each block the stacks
take turns. So a time that is up leaves rows of every stack. Each block is gone through again and again (A B C A B C
...): what drifts in the meantime shows as a difference between repeats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

POLICIES = ("on_demand", "lru", "two_level", "fixed_1", "adaptive", "oracle")
PLACED = {"cuda": (), "cpu": ("lru+balanced",)}
"""Policies with a place, beside these. On a GPU nothing measures the host, so that its figures are asked for by name
(--policies and --host) or not at all; on a CPU machine it keeps the pace of the figures that predict it."""
MODELS = {"cuda": ("gpt-oss-20b", "deepseek-v2-lite"), "cpu": ("gpt-oss-20b",)}
STACKS = {"cuda": ("graph", "found"), "cpu": ("eager", "found")}
SAMPLED_STACKS = {"cuda": ("eager",), "cpu": ()}
"""Stacks of which only these are measured, where none is asked for by name."""
SAMPLED_POLICIES = ("lru", "adaptive")
SAMPLED_RESIDENCY = 0.5
_TOKENS_A_MINUTE = {"cuda": 64 / 6, "cpu": 20 / 6}
_TOKENS = {"cuda": (32, 256), "cpu": (8, 64)}
BLOCK = ("batch_size", "residency")
"""What the cases of a block have in common."""
SHORT_MINUTES = 10.0
"""Below this the calibration is the short one."""


@dataclass(frozen=True)
class Case:
    """One comparison: everything that differs between two rows of the table."""

    model: str
    stack: str
    residency: float
    batch_size: int
    policy: str

    def __str__(self) -> str:
        return f"{self.model} {self.stack} {100 * self.residency:.0f} % batch {self.batch_size} {self.policy}"


@dataclass(frozen=True)
class Asked:
    """The cases of every model, before they are put in order."""

    policies: Sequence[str]
    residencies: Sequence[float]
    batch_sizes: Sequence[int]
    stacks: Sequence[str]
    sampled_stacks: Sequence[str] = ()

    def cases(self, model: str) -> list[Case]:
        """Those of one model; of a sampled stack only some policies at one capacity."""
        made = []
        for stack, batch, residency, policy in product(
            [*self.stacks, *self.sampled_stacks], self.batch_sizes, self.residencies, self.policies
        ):
            sampled = policy in SAMPLED_POLICIES and residency == SAMPLED_RESIDENCY
            if stack in self.stacks or sampled:
                made.append(Case(model, stack, residency, batch, policy))
        return made


def breadth_of(cases: Sequence[Case]) -> list[Case]:
    """One case of each policy and capacity, of the first batch size that it has. All of one capacity have one stack, so
    that their policies have a rank; of the stacks that measure all of them the capacities take turns."""
    pairs = list(dict.fromkeys((case.policy, case.residency) for case in cases))
    first = {(case.stack, case.policy, case.residency): case for case in reversed(cases)}
    stacks = dict.fromkeys(case.stack for case in cases)
    whole = [stack for stack in stacks if all((stack, *pair) in first for pair in pairs)]
    capacities = list(dict.fromkeys(residency for _, residency in pairs))
    return [first[whole[capacities.index(residency) % len(whole)], policy, residency] for policy, residency in pairs]


def blocks_of(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    """`cases` (of one model) in the order in which they are measured: breadth, then batch by batch and capacity by
    capacity. Those of a block take turns, and in it the stacks of a policy."""
    breadth = breadth_of(cases)
    yield breadth
    rest = [case for case in cases if case not in breadth]
    for places in product(*(dict.fromkeys(getattr(case, name) for case in cases) for name in BLOCK)):
        block = [case for case in rest if tuple(getattr(case, name) for name in BLOCK) == places]
        if block:
            policies = list(dict.fromkeys(case.policy for case in cases))
            yield sorted(block, key=lambda case: policies.index(case.policy))


def breadth_by_s(minutes: float) -> float:
    """Seconds of the given minutes in which every policy and capacity is to be measured once: half of them."""
    return 30 * minutes


def tokens_for(world: str, minutes: float) -> int:
    """Tokens of each run where none are asked for: more time, longer runs, within reason."""
    least, most = _TOKENS[world]
    return min(max(round(_TOKENS_A_MINUTE[world] * minutes), least), most)


def share_of_time(left_s: float, num_models: int) -> float:
    """Seconds for the next of `num_models` models: the first one named gets most, and each gets some."""
    return left_s * 2 / (num_models + 1)
