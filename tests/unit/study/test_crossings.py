"""Where two curves cross, by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from sim.study.crossings import crossing_line, crossings, judge_crossing, number_of


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ([(0, 5.0), (10, 5.0)], [(5.0, 5.0)]),  # y = x meets 5 at 5
        ([(0, 10.0), (10, 0.0)], [(5.0, 5.0)]),
        ([(0, 1.0), (10, 11.0)], []),  # always above
        ([(0, 4.0), (10, 10.0)], []),  # they only meet
        ([(20, 1.0)], []),  # nothing in common
    ],
)
def test_lines_cross_where_they_are_equal(
    second: list[tuple[float, float]], expected: list[tuple[float, float]]
) -> None:
    found = crossings([(0, 0.0), (10, 10.0)], second)
    assert [pytest.approx(point) for point in expected] == found


def test_curves_that_are_equal_for_a_while_cross_in_its_middle() -> None:
    first = [(0.0, 0.0), (2.0, 5.0), (4.0, 6.0), (6.0, 9.0)]
    assert crossings(first, [(0.0, 1.0), (2.0, 5.0), (4.0, 6.0), (6.0, 7.0)]) == [(3.0, 5.0)]
    assert crossings(first, [(0.0, 1.0), (2.0, 5.0), (4.0, 6.0), (6.0, 10.0)]) == []


def test_a_value_of_the_axis_bears_a_number() -> None:
    assert [number_of(name) for name in ("12 GB", "0.5", "at 3.5 GB/s")] == [12.0, 0.5, 3.5]
    with pytest.raises(ValueError, match="'desktop' bears no number"):
        number_of("desktop")


def test_the_report_says_where_and_who_is_ahead_in_the_end() -> None:
    rows = [
        {"host": host, "memory": f"{at} GB", "variant": variant, "speed": speed}
        for host, copied in (("slow", (1.0, 3.0)), ("fast", (0.5, 1.0)))
        for at, one in zip((4, 8), copied, strict=True)
        for variant, speed in (("copy", one), ("host", 2.0))
    ]
    spec = {"name": "n", "axis": "memory", "variants": ["copy", "host"], "column": "speed"}
    verdict = judge_crossing(spec, pd.DataFrame(rows), ["host", "memory"])
    # 1 to 3 from 4 to 8 GB meets 2 half way; 0.5 to 1 never does.
    assert verdict["places"] == [
        {"place": "slow", "at": [6.0], "ahead": ["host", "copy"]},
        {"place": "fast", "at": [], "ahead": ["host"]},
    ]
    assert crossing_line(verdict) == (
        "n (speed along memory, which is higher): slow: host to 6.0, copy beyond; fast: host."
    )
    gone = judge_crossing(spec, pd.DataFrame(rows[:1]), ["host", "memory"])
    assert crossing_line(gone).endswith("no value, since one of them was not run.")
