"""Assumed routing is short and the cache begins empty: where that is much of the waiting, a line says so."""

from __future__ import annotations

from typing import Any

import pytest

from sim.api.simulating import simulate
from sim.job.assumed import first_touches

FACTS = {"elapsed_ns": 1000, "miss_stall_ns": 500, "num_misses": 40, "num_evictions": 10, "assumed": {}}


def said(issued: int = 0, slots: int = 100, **changes: Any) -> list[str]:
    """The line of a run with these numbers."""
    return first_touches({**FACTS, "prefetch": {"issued": issued}, "capacity": {"num_slots": slots}, **changes})


@pytest.mark.parametrize(
    ("changes", "percent"),
    [
        ({}, 75),  # 40 loads, 10 evictions: 30 slots had been empty
        ({"issued": 20, "num_evictions": 20}, 50),  # 40 empty slots, 20 of them filled by a prefetch at most
        ({"slots": 20}, 50),
        ({"num_evictions": 0}, 100),
        ({"num_evictions": 36}, 10),
    ],
)
def test_what_filled_an_empty_slot_is_a_first_touch(changes: dict[str, Any], percent: int) -> None:
    (line,) = said(**changes)
    assert line.startswith(f"at least {percent} % of the misses are first touches")
    assert "warmup_forwards=" in line
    assert "start=popular" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"num_evictions": 37},
        {"issued": 30, "num_evictions": 40},
        {"miss_stall_ns": 9},
        {"num_misses": 0, "num_evictions": 0},
    ],
)
def test_where_it_is_little_or_costs_little_nothing_is_said(changes: dict[str, Any]) -> None:
    assert said(**changes) == []


def test_of_a_recording_nothing_is_said() -> None:
    facts = {key: value for key, value in FACTS.items() if key != "assumed"}
    assert first_touches({**facts, "prefetch": {"issued": 0}, "capacity": {"num_slots": 100}}) == []


@pytest.mark.parametrize(
    ("words", "is_said"), [({}, True), ({"start": "popular"}, False), ({"warmup_forwards": 20}, False)]
)
def test_a_run_says_it_below_its_table_and_its_remedies_help(words: dict[str, Any], is_said: bool) -> None:
    sizes = {"locality": "usual", "num_tokens": 300, "num_requests": 2}
    found = simulate(
        hardware="h100", policy="lru", model="mixtral-8x7b", residency=0.9, compare="none", trace=sizes, **words
    )
    assert ("of the misses are first touches" in str(found)) == is_said
