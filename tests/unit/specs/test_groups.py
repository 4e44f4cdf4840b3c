"""Experts launched at once: read between the points to the nanosecond, and no partition is cheaper than the bound."""

from __future__ import annotations

import random
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest

from sim.machine.groups import CheapestGroups, GroupTimes
from sim.machine.kernels import KernelTimes
from sim.specs.hardware import Hardware, Stack, hardware_from_dict
from sim.specs.kernel_table import GroupPoints
from tests.support import reference
from tests.unit.specs.test_kernels import BARE, SLOW
from tests.unit.specs.test_measured import TABLE
from tests.unit.specs.test_model import TINY

GROUPS: GroupPoints = (
    (1, 1, 1000),
    (1, 2, 1100),
    (1, 4, 1200),
    (2, 1, 1500),
    (2, 2, 1700),
    (2, 4, 1900),
    (4, 1, 2300),
    (4, 2, 2900),
    (4, 4, 3500),
)


def machine(groups: Any, **changes: Any) -> Hardware:
    """`SLOW` with a table of the tiny model, as read from a file."""
    return hardware_from_dict({**asdict(SLOW), "kernel_ns": {"tiny": {**TABLE, "groups": groups, **changes}}})


# -- between, below and beyond the points ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "num_tokens", "expected_ns"),
    [
        (1, 1, 1000),
        (2, 4, 1700),
        (4, 16, 3500),  # points
        (3, 3, 1900),  # between 2 and 4 experts
        (1, 3, 1150),  # between 2 and 4 tokens
        (2, 3, 1600),  # 1.5 tokens each
        (4, 6, 2600),
        (3, 5, 2167),  # 1633.3 and 2700 at 1.67 tokens each
        (1, 6, 1300),  # 50 a token beyond the last
        (4, 24, 4100),  # 300 a token
        (6, 6, 3100),  # 400 an expert beyond the last
        (6, 36, 6100),  # 2100 and 4100 at 6 tokens each, 1000 an expert
        (0, 0, 0),
    ],
)
def test_a_group_takes_what_lies_between_its_neighbours(num_experts: int, num_tokens: int, expected_ns: int) -> None:
    assert GroupTimes(GROUPS).ns(num_experts, num_tokens) == expected_ns


def test_below_the_first_tokens_their_time_holds() -> None:
    times = GroupTimes(((1, 3, 50), (1, 5, 70), (2, 3, 80), (2, 5, 90)))
    assert [times.ns(2, total) for total in (2, 4, 6, 8)] == [80, 80, 80, 85]


def test_beyond_the_last_tokens_time_never_falls_and_more_experts_never_take_less() -> None:
    falling = GroupTimes(((1, 1, 1000), (1, 2, 900), (2, 1, 800), (2, 2, 1200), (3, 1, 1100), (3, 2, 1210)))
    # One expert: 900 from 2 tokens on. Two: 1000 as one, and 1200 + 200 for each token more of each expert.
    assert [falling.ns(1, total) for total in (1, 2, 3, 50)] == [1000, 900, 900, 900]
    assert [falling.ns(2, total) for total in (2, 4, 6, 8)] == [1000, 1200, 1400, 1600]
    # Three: 110 a token as measured, which would fall below two: 200 as they.
    assert [falling.ns(3, total) for total in (3, 6, 9, 12)] == [1100, 1210, 1410, 1610]


@pytest.mark.parametrize("seed", range(20))
def test_no_group_takes_less_than_a_smaller_one_with_as_many_tokens_each(seed: int) -> None:
    times = GroupTimes(drawn_table(random.Random(seed)))
    for tokens in (1, 1.5, 2, 3.7, 8, 40):
        found = [times.at(count, tokens) for count in range(1, 20)]
        assert all(more >= less - 1e-9 for less, more in pairwise(found))


def test_the_shortest_launch_is_of_one_expert_over_any_tokens() -> None:
    assert GroupTimes(GROUPS).shortest_ns == 1000
    assert GroupTimes(((1, 1, 1000), (1, 2, 900.4), (2, 1, 800), (2, 2, 800))).shortest_ns == 900


def test_a_group_has_a_token_for_each_expert() -> None:
    with pytest.raises(AssertionError, match="3 experts over 2 tokens"):
        GroupTimes(GROUPS).ns(3, 2)


# -- as a model's kernels -------------------------------------------------------------------------------------


def test_a_model_takes_its_groups_from_the_table_and_the_rest_as_before() -> None:
    kernels = KernelTimes(TINY, machine(GROUPS), BARE)
    assert kernels.experts_ns([1, 1]) == 1500
    assert kernels.experts_ns([3, 1, 1]) == 2167
    assert (kernels.expert_ns(1), kernels.head_ns(1), kernels.shortest_expert_ns) == (1000, 500, 1000)
    assert kernels.resident_layer_ns(1, 21) == 3010 + 1500


def test_without_a_table_a_group_is_its_experts_one_by_one() -> None:
    plain = KernelTimes(TINY, machine(()), BARE)
    assert plain.groups is None
    assert plain.experts_ns([3, 1, 1]) == 1200 + 1000 + 1000
    assert plain.experts_ns([]) == 0
    assert KernelTimes(TINY, SLOW, Stack("bare", 0, 0)).experts_ns([1, 3]) == 768 + 1152


def test_points_may_be_lists_and_a_resolved_machine_is_read_again() -> None:
    found = machine([list(point) for point in GROUPS])
    assert found == machine(GROUPS)
    assert hardware_from_dict(asdict(found)) == found
    assert found != machine(())


REFUSED: list[tuple[Any, str]] = [
    (5, r"tiny\.groups=5 must be a list of points \[experts, tokens per expert, ns\]"),
    ([[1, 1]], r"tiny\.groups: \[1, 1\] must be a point \[experts, tokens per expert, ns\] with whole experts"),
    ([[1.5, 1, 5]], r"\[1\.5, 1, 5\] must be a point"),
    ([[True, 1, 5]], r"\[True, 1, 5\] must be a point"),
    ([[1, 1, "5"]], r"\[1, 1, '5'\] must be a point"),
    ([[1, 1, 5]], r"tiny\.groups has 1 experts; measure 1 and at least one more number"),
    ([[2, 1, 5], [4, 1, 6]], r"groups has 2, 4 experts; measure 1 and at least one more number"),
    ([[1, 1, 5], [2, 1, 0]], r"groups\[2 experts, 1 tokens each\]=0\.0 is outside \[1, 1e\+12\]; give nanoseconds"),
    ([[1, 1, float("nan")], [2, 1, 5]], r"groups\[1 experts, 1 tokens each\]=nan is outside"),
    ([[0, 1, 5], [1, 1, 5]], r"groups\[0 experts, 1 tokens each\]: experts=0 is outside \[1, 65535\]"),
    ([[1, 0.5, 5], [2, 0.5, 5]], r"groups\[1 experts, 0\.5 tokens each\]: tokens=0\.5 is outside \[1, 1e\+06\]"),
    ([[1, float("nan"), 5], [2, 1, 5]], r"tokens=nan is outside"),
    ([[1, 1, 5], [1, 1, 6], [2, 1, 7]], r"groups\[1 experts, 1 tokens each\] follows 1 experts, 1 tokens each; sort"),
    ([[1, 1, 5], [3, 1, 6], [2, 1, 7]], r"groups\[2 experts, 1 tokens each\] follows 3 experts"),
    (
        [[1, 1, 5], [1, 2, 6], [2, 1, 7]],
        r"tiny\.groups: 2 experts have 1 tokens each, 1 has 1, 2; measure every number of experts with the same tokens",
    ),
    ([[1, 1, 5], [2, 1.5, 7]], r"2 experts have 1\.5 tokens each, 1 has 1; measure every"),
]


@pytest.mark.parametrize(("groups", "message"), REFUSED)
def test_a_table_of_groups_that_makes_no_sense_is_refused(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        machine(groups)
    assert len(caught.value.args) == 1
    assert "\n" not in str(caught.value)


# -- the cheapest partition -----------------------------------------------------------------------------------


def drawn_table(draw: random.Random) -> GroupPoints:
    """Any grid: falling and rising in experts and in tokens."""
    experts = [1, *sorted(draw.sample(range(2, 9), draw.randint(1, 3)))]
    tokens = sorted(draw.sample([1, 1.5, 2, 3, 4, 8], draw.randint(1, 4)))
    return tuple(
        (count, each, draw.randint(100, 900) + draw.choice([0, 100, 800]) * count + draw.choice([0, 0.5]))
        for count in experts
        for each in tokens
    )


def charged(times: GroupTimes, launch_ns: int) -> Any:
    """What the machine charges for one group of `tokens`."""
    return lambda tokens: times.ns(len(tokens), sum(tokens)) + launch_ns


def drawn_layer(seed: int) -> tuple[GroupTimes, int, list[int]]:
    """(times, ns a launch, tokens of up to six experts)."""
    draw = random.Random(seed)
    times = GroupTimes(drawn_table(draw))
    most = draw.choice([1, 2, 5, 40])
    return times, draw.choice([0, 0, 70]), [draw.randint(1, most) for _ in range(draw.randint(1, 6))]


@pytest.mark.parametrize("seed", range(150))
def test_no_partition_is_cheaper_than_the_bound(seed: int) -> None:
    times, launch_ns, tokens = drawn_layer(seed)
    bound = CheapestGroups(times, 8, launch_ns).ns(tokens)
    assert 0 < bound <= reference.cheapest_partition(tokens, charged(times, launch_ns))


@pytest.mark.parametrize("seed", range(60))
def test_with_as_many_tokens_each_the_bound_is_the_cheapest_partition(seed: int) -> None:
    times, launch_ns, tokens = drawn_layer(seed)
    even = [tokens[0]] * len(tokens)
    found = reference.cheapest_partition(even, charged(times, launch_ns))
    assert CheapestGroups(times, 8, launch_ns).ns(even) == found


def test_other_bounds_are_beaten() -> None:
    """The negative control: neither one group, nor one by one, nor the bound plus 3 % holds for all layers."""
    above = dict.fromkeys(("one group", "one by one", "a little more"), 0)
    for seed in range(150):
        times, launch_ns, tokens = drawn_layer(seed)
        charge = charged(times, launch_ns)
        least = reference.cheapest_partition(tokens, charge)
        above["one group"] += charge(tokens) > least
        above["one by one"] += sum(charge([count]) for count in tokens) > least
        above["a little more"] += CheapestGroups(times, 8, launch_ns).ns(tokens) * 1.03 > least
    assert min(above.values()) > 20, above


@pytest.mark.parametrize(
    ("tokens", "expected_ns"),
    [
        ([1], 1000),
        ([1, 1], 1500),
        ([1, 1, 1, 1], 2300),
        ([1] * 6, 3100),  # 400 for each beyond the fourth
        ([2, 2, 2], 2300),
        ([8, 8], 2300),  # 1900 + 4 * 100, against 2 * 1400 one by one
        ([], 0),
    ],
)
def test_the_cheapest_by_hand(tokens: list[int], expected_ns: int) -> None:
    assert CheapestGroups(GroupTimes(GROUPS), 8, 0).ns(tokens) == expected_ns


def test_the_bound_of_a_mixed_layer_by_hand() -> None:
    times = GroupTimes(((1, 1, 100), (1, 3, 140), (2, 1, 150), (2, 3, 250)))
    # A token's price is 20, the slope of one expert; it leaves 80 of one and 110 (150 - 40) of two, half a
    # nanosecond less for rounding: 4 * 20 + 109.5. The cheapest partition itself is one group of two tokens each.
    assert CheapestGroups(times, 8, 0).ns([1, 3]) == 190
    assert reference.cheapest_partition([1, 3], charged(times, 0)) == 200
    # Without a price it would be that of one token each.
    flat = GroupTimes(((1, 1, 100), (1, 3, 100), (2, 1, 150), (2, 3, 250)))
    assert CheapestGroups(flat, 8, 0).ns([1, 3]) == 150


def test_every_launch_costs_its_own_time() -> None:
    apart = GroupTimes(((1, 1, 100), (2, 1, 300)))
    assert CheapestGroups(apart, 4, 0).ns([1, 1]) == 200
    assert CheapestGroups(apart, 4, 99).ns([1, 1]) == 398
    assert CheapestGroups(apart, 4, 101).ns([1, 1]) == 401
