"""The account of an adaptive step: what decisions cost and save, when they end, and when they are tried again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from expertflow.horizons.adaptive import AdaptiveHorizon
from expertflow.horizons.decision_account import DecisionAccount
from expertflow.view import Feedback
from sim.job.configure import configure
from sim.job.setup import make_policy, make_workload
from sim.machine.run import run_policy
from tests.support.runs import forward_of
from tests.support.workloads import progress_of, view_of

WHOLE_NS = 1_000_000
"""A forward."""
COPY_NS = 10_000
USUAL_NS = 2_000
"""How late the host is without decisions."""
FREE_NS = 5_000
"""What decisions may cost where nothing is saved: 0.5 % of a forward."""


class Course:
    """Forwards whose lateness, use and stall the test says, with an account kept of them."""

    def __init__(self, limit: int = 8, share: float = 0.5, retry_forwards: int = 100, memory: float = 0.0) -> None:
        self.view = view_of(24, 10, 1)
        self.account = DecisionAccount(self.view, limit, share, retry_forwards, memory)
        self.index = 0
        self.account.judge(0, COPY_NS)
        self.account.begin(0, self.account.cap)

    def forward(self, cost_ns: int = 0, used: int = 0, missed: int = 0, stall_ns: int = 0, storage_ns: int = 0) -> int:
        """The forward that has begun takes its course, and the next begins, as far as it may: how far this one was to
        look. Nothing is beyond the usual where nothing was decided."""
        size = self.account.size
        if missed or stall_ns:
            self.account.heard(Feedback(0, stall_ns, 0, missed, 0, storage_ns))
        progress_of(self.view).late_ns += USUAL_NS + (cost_ns if size else 0)
        progress_of(self.view).num_used += used
        progress_of(self.view).now_ns += WHOLE_NS
        self.index += 1
        self.account.judge(self.index, COPY_NS)
        self.account.begin(self.index, self.account.cap)
        return size


def sizes(cost_ns: Callable[[int], int], forwards: int, **settings: int) -> list[int]:
    """How far each forward was to look, where a decision of a size costs a forward so much and nothing is saved."""
    course = Course(**settings)
    return [course.forward(cost_ns(course.account.size)) for _ in range(forwards)]


def test_the_first_forward_decides_nothing_and_the_step_doubles_while_it_costs_nothing() -> None:
    assert sizes(lambda size: 0, 7) == [0, 1, 2, 4, 8, 8, 8]
    assert sizes(lambda size: 0, 7, limit=5) == [0, 1, 2, 4, 5, 5, 5]


def test_two_dear_forwards_halve_the_step_down_to_nothing() -> None:
    assert sizes(lambda size: FREE_NS + 1, 8) == [0, 1, 1, 0, 0, 0, 0, 0]
    assert sizes(lambda size: 10_000 if size > 2 else 0, 8) == [0, 1, 2, 4, 4, 2, 2, 2]


def test_what_is_free_is_free_to_the_nanosecond() -> None:
    assert sizes(lambda size: FREE_NS, 6) == [0, 1, 2, 4, 8, 8]


@pytest.mark.parametrize(("storage_ns", "expected"), [(0, [0, 1, 1, 0, 0]), (1_000_000, [0, 1, 2, 4, 8])])
def test_what_is_waited_for_a_disk_is_no_loss_of_prefetches(storage_ns: int, expected: list[int]) -> None:
    """Each forward uses 20 prefetched experts, which saves 200,000 ns of copies, costs 60,000, and stalls for 1 ms."""
    course = Course(memory=0.0)
    found = [course.forward(60_000, used=20, missed=1, stall_ns=1_000_000, storage_ns=storage_ns) for _ in range(5)]
    assert found == expected


def test_one_dear_forward_is_forgiven() -> None:
    course = Course()
    found = [course.forward(50_000 if index in (4, 6, 8) else 0) for index in range(10)]
    assert found == [0, 1, 2, 4, 8, 8, 8, 8, 8, 8]


def test_a_longer_step_is_tried_again_after_a_time_for_two_forwards() -> None:
    found = sizes(lambda size: 50_000, 250, retry_forwards=100)
    # Given up at forward 3; tried in 103 and 104, then from 205 on. 100 and 200 decide nothing in any case.
    assert [index for index, size in enumerate(found) if size] == [1, 2, 103, 104, 205, 206]
    found = sizes(lambda size: 10_000 if size > 2 else 0, 130, retry_forwards=50)
    assert [index for index, size in enumerate(found) if size > 2] == [3, 4, 55, 56, 107, 108]


def test_the_usual_lateness_is_looked_at_again() -> None:
    """A host that has become slower by itself is not taken for decisions that have."""
    course = Course(retry_forwards=10)
    for _ in range(9):
        course.forward()
    assert course.account.usual_ns == USUAL_NS
    found = []
    for _ in range(6):
        progress_of(course.view).late_ns += 4_000
        found.append(course.forward())
    assert found == [8, 0, 8, 8, 8, 8]
    assert course.account.usual_ns == USUAL_NS + 4_000


@pytest.mark.parametrize(
    ("used", "missed", "stall_ns", "gain_ns"),
    [
        (0, 0, 0, 0),
        (4, 0, 0, 40_000),
        # Three misses that stalled for their copies and no more.
        (4, 3, 30_000, 40_000),
        # One of the four was late, by 4 us.
        (4, 3, 34_000, 36_000),
        # Prefetches held up the misses.
        (0, 3, 45_000, -15_000),
    ],
)
def test_what_is_saved(used: int, missed: int, stall_ns: int, gain_ns: int) -> None:
    course = Course()
    course.forward()
    assert course.forward(0, used, missed, stall_ns) == 1
    assert course.account.gain_ns == gain_ns


@pytest.mark.parametrize(("step", "share"), [(1, 0.7), (2, 0.5), (4, 0.5)])
def test_a_share_of_what_is_saved_may_be_spent_and_more_for_the_shortest_step(step: int, share: float) -> None:
    for cost_ns, kept in ((int(share * 40_000) + FREE_NS, True), (int(share * 40_000) + FREE_NS + 1, False)):
        course = Course(limit=step)
        while course.account.size != step:
            course.forward(0, used=4)
        for _ in range(2):
            course.forward(cost_ns, used=4)
        assert course.account.cap == (step if kept else step // 2)


def test_prefetch_that_hurts_ends_though_it_costs_no_host_time() -> None:
    course = Course()
    found = [course.forward(0, 0, 3, 60_000) for _ in range(5)]
    assert found == [0, 1, 1, 0, 0]


def test_what_was_saved_is_forgotten_where_nothing_is_decided_any_more() -> None:
    """Two forwards in which prefetch hurts, then one long after in which it pays: that one counts for itself."""
    course = Course(retry_forwards=50, memory=0.9)
    for _ in range(3):
        course.forward(0, 0, 3, 60_000)
    assert (course.account.cap, course.account.gain_ns) == (0, 0)
    while not course.account.size:
        course.forward()
    assert course.forward(20_000, used=4) == 1
    assert (course.account.num_dear, course.account.gain_ns) == (0, 40_000)


def test_within_a_forward_decisions_end_once_they_cost_more_than_it_has_gained() -> None:
    course = Course()
    assert course.account.spent()
    course.forward()
    view = course.view
    allowed = USUAL_NS + WHOLE_NS // 20
    progress_of(view).late_ns += allowed
    assert not course.account.spent()
    progress_of(view).late_ns += 1
    assert course.account.spent()
    # An expert that was fetched ahead is used.
    progress_of(view).num_used += 1
    assert not course.account.spent()
    progress_of(view).late_ns += COPY_NS
    assert course.account.spent()


# -- the horizon that keeps it ---------------------------------------------------------------------------------------


def steps(share: float, cost_ns: int, forwards: int = 12, copies: bool = True, late: bool = False) -> list[int]:
    """How far `AdaptiveHorizon` looks at the begin of each forward, whose formula asks for 8."""
    view = view_of(24, 10, 1, expert_bytes=1_000_000)
    horizon = AdaptiveHorizon(decision_share=share, retry_forwards=100)
    horizon.num_expected = 8
    horizon.start(view, None)
    found = []
    for index in range(forwards):
        progress_of(view).forward = index
        horizon.begin_forward(forward_of(index, [[[0]] * 24], 10))
        found.append(max(horizon.distances(), default=0))
        progress_of(view).link_bytes += 1_000_000 * copies
        progress_of(view).link_busy_ns += 1_000_000 * copies
        progress_of(view).layer_time_ns += 24 * 100_000
        progress_of(view).num_layers_timed += 24
        progress_of(view).now_ns += 24 * 100_000
        progress_of(view).late_ns += cost_ns if found[-1] else 0
        if late:
            for _ in range(4):
                horizon.feedback(Feedback(0, 10, 1, 0))
    return found


def test_the_horizon_follows_its_account() -> None:
    assert steps(0.3, 0) == [0, 1, 2, 4, 8, 8, 8, 8, 8, 8, 8, 8]
    assert steps(0.3, 100_000) == [0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def test_late_experts_ask_for_a_longer_step_in_vain_where_nothing_is_decided() -> None:
    assert steps(0.3, 100_000, late=True)[3:] == [0] * 9


def test_it_is_off_by_default() -> None:
    assert AdaptiveHorizon().decision_share == 0
    assert steps(0.0, 100_000) == [1, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]


def test_without_a_single_copy_decisions_are_judged_too() -> None:
    """How long a copy takes is not known, so the formula says nothing."""
    assert steps(0.3, 0, copies=False) == [0, *[1] * 11]
    assert steps(0.3, 100_000, copies=False)[3:] == [0] * 9


@pytest.mark.parametrize("settings", [{"decision_share": -0.1}, {"retry_forwards": 0}])
def test_nonsense_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="AdaptiveHorizon decision_share"):
        AdaptiveHorizon(**settings)  # type: ignore[arg-type]


def test_a_host_for_which_every_decision_is_too_dear_stops_deciding() -> None:
    """All experts resident, layers of some 80 us, decisions of 190 and more."""
    words = [
        "+hardware=h20",
        "stack=graph",
        "residency=1.0",
        "start=resident",
        "hardware.decide_ns=400000",
        "compare=none",
        "max_tokens=150",
        "warmup_forwards=0",
    ]
    elapsed = {}
    for name, more in {"lru": [], "adaptive": [], "unguarded": ["policy.horizon.decision_share=0.0"]}.items():
        cfg = configure([*words, f"+policy={'lru' if name == 'lru' else 'adaptive'}", *more])
        work = make_workload(cfg)
        policy, transfer = make_policy(cfg["policy"], work, cfg["seed"])
        elapsed[name] = run_policy(work, policy, transfer)["elapsed_ns"]
        if name == "adaptive":
            assert policy.num_decisions <= 48
    assert elapsed["adaptive"] < 1.01 * elapsed["lru"]
    assert elapsed["unguarded"] > 2 * elapsed["lru"]
