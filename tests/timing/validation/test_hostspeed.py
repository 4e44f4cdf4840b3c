"""The fixed loop, and what is said of its drift."""

from __future__ import annotations

from replay.calibration.hostspeed import drift, python_loop_ns


def test_the_loop_takes_time() -> None:
    assert 100_000 < python_loop_ns() < 10_000_000_000


def test_the_drift_is_the_slowest_against_the_fastest() -> None:
    assert drift([4, 8, 5, 10, 4]) == {
        "first_ns": 4,
        "last_ns": 4,
        "median_ns": 5,
        "drift": 1.5,
        "times_ns": [4, 8, 5, 10, 4],
    }
    assert drift([])["drift"] is None
