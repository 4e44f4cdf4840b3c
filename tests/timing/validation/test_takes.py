"""Which of several replays of a case count: those during which the host kept one speed, told by a fixed loop alone."""

from __future__ import annotations

import pytest

from replay.validation.fidelity import ForwardTimes, Ran
from replay.validation.takes import SAME_SPEED, Take, counted


def take(*loops_ns: int, ticks_ns: tuple[int, ...] = ()) -> Take:
    return Take(Ran({"of": loops_ns}, ForwardTimes(), ticks_ns=ticks_ns), loops_ns)


def places(*loops: tuple[int, ...]) -> list[int]:
    """Which of the takes with these loops count, by their places."""
    takes = [take(*one) for one in loops]
    return [takes.index(one) for one in counted(takes)]


def test_a_take_knows_its_speed_and_how_much_that_changed() -> None:
    made = take(20, 21, 30)
    assert (made.speed_ns, made.drift) == (21, 1.5)


@pytest.mark.parametrize(
    ("loops", "kept"),
    [
        ([(20, 20, 20)], [0]),
        ([(20, 20, 21), (20, 21, 21), (19, 20, 20)], [0, 1, 2]),
        # A host of two speeds: two at the fast one, though three ran at the slow one.
        ([(40, 40), (20, 21), (41, 42), (39, 40), (20, 20)], [1, 4]),
        # One fast take alone says nothing of its own noise; the slow ones do.
        ([(40, 40), (20, 20), (41, 41)], [0, 2]),
        # The host changed its speed on the way.
        ([(20, 40, 40), (41, 41, 42), (20, 20, 40), (40, 40, 40)], [1, 3]),
        # No two alike: the fastest of those during which it did not change, or the one that changed least.
        ([(40, 40), (20, 20)], [1]),
        ([(20, 40), (20, 30), (20, 41)], [1]),
    ],
)
def test_replays_at_one_speed_of_the_host_count(loops: list[tuple[int, ...]], kept: list[int]) -> None:
    assert places(*loops) == kept


def test_the_tolerance_holds_within_a_take_and_between_the_fastest_and_the_slowest() -> None:
    edge = round(100 * SAME_SPEED)
    assert places((100, edge), (100, 100)) == [0, 1]
    assert places((100, edge + 1), (100, 100), (100, 100)) == [1, 2]
    # Each is alike its neighbour, the last is not alike the first.
    assert places((100, 100), (115, 115), (130, 130)) == [0, 1]


def test_a_host_that_changed_its_speed_during_the_replay_alone_is_told_by_the_ticks() -> None:
    even, slow, changed = (10,) * 8, (17,) * 8, (10,) * 5 + (17,) * 3
    assert take(20, 20, ticks_ns=even).drift == 1.0
    assert take(20, 20, ticks_ns=changed).drift == 1.7
    # One slow tick of eight is a neighbour's doing.
    assert take(20, 20, ticks_ns=(10,) * 7 + (90,)).drift == 1.0
    takes = [take(20, 20, ticks_ns=ticks) for ticks in (slow, even, changed, even)]
    assert [one is takes[place] for one, place in zip(counted(takes), (1, 3), strict=True)] == [True, True]
    assert take(20, 20, ticks_ns=slow).speed_ns == 17


def test_no_takes_give_none() -> None:
    assert counted([]) == []


def test_loops_that_differ_part_replays_whose_ticks_agree() -> None:
    """Costs are measured beside the loops alone: those of a slow host belong to no replay of a fast one."""
    even = (10,) * 8
    slow_beside, fast, other = take(40, 40, ticks_ns=even), take(20, 20, ticks_ns=even), take(21, 21, ticks_ns=even)
    assert counted([slow_beside, fast, other]) == [fast, other]
