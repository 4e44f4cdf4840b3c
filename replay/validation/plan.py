"""What a validation measures, and in which order, so that a short time still covers every policy and capacity.

Order: once through the first case of each policy and capacity, then their repeats, then the other cases block by block,
each block again and again (A B C A B C ...): what drifts in the meantime shows as a difference between repeats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

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
    """The first case of each policy and capacity."""
    first: dict[tuple[str, float], Case] = {}
    for case in cases:
        first.setdefault((case.policy, case.residency), case)
    return list(first.values())


def blocks_of(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    """`cases` (of one model) in the order in which they are measured: breadth, then stack by stack and batch by batch.
    Those of a block take turns."""
    breadth = breadth_of(cases)
    yield breadth
    rest = [case for case in cases if case not in breadth]
    for _, block in groupby(rest, key=lambda case: (case.stack, case.batch_size)):
        yield list(block)


def tokens_for(world: str, minutes: float) -> int:
    """Tokens of each run where none are asked for: more time, longer runs, within reason."""
    least, most = _TOKENS[world]
    return min(max(round(_TOKENS_A_MINUTE[world] * minutes), least), most)


def share_of_time(left_s: float, num_models: int) -> float:
    """Seconds for the next of `num_models` models: the first one named gets most, and each gets some."""
    return left_s * 2 / (num_models + 1)
