"""Where two variants change places along an axis whose values are numbers: memory, bandwidth, a size.

Between two values of the axis lines are straight, as the picture draws them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def number_of(name: object) -> float:
    """The number that an axis' value bears, as 12 of `12 GB`. ValueError where it bears none."""
    found = _NUMBER.search(str(name))
    if found is None:
        raise ValueError(f"{str(name)[:60]!r} bears no number; an axis that is drawn across needs one in each value")
    return float(found[0])


def curves(table: pd.DataFrame, axis: str, value: str, variants: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Of each variant that was run the points (number of the axis, value), rising."""
    found = {}
    for variant in variants:
        rows = table[table["variant"] == variant].dropna(subset=[value])
        points = sorted((number_of(row[axis]), float(row[value])) for row in rows.to_dict("records"))
        if points:
            found[variant] = points
    return found


def crossings(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points at which the curve that is ahead becomes the one behind, by the numbers that both have. Where they
    are equal for a while it is the middle of that while; curves that only meet do not cross."""
    others = dict(second)
    both = [(at, value, others[at]) for at, value in first if at in others]
    apart = [(at, value, value - other) for at, value, other in both if value != other]
    equal = [(at, value) for at, value, other in both if value == other]
    found = []
    for (low, a, before), (high, c, after) in pairwise(apart):
        if before * after > 0:
            continue
        between = [point for point in equal if low < point[0] < high]
        if between:
            found.append(((between[0][0] + between[-1][0]) / 2, between[0][1]))
        else:
            share = before / (before - after)
            found.append((low + share * (high - low), a + share * (c - a)))
    return found


def judge_crossing(spec: Mapping[str, Any], table: pd.DataFrame, axes: Sequence[str]) -> dict[str, Any]:
    """In each place of the other axes, at which numbers of `axis` the two variants cross, and which of them is ahead,
    with the higher value, before and after each; none where they are equal all along."""
    rest = [name for name in axes if name != spec["axis"]]
    places: list[dict[str, Any]] = []
    for _, rows in table.groupby(rest, sort=False) if rest else [((), table)]:
        found = curves(rows, spec["axis"], spec["column"], spec["variants"])
        if len(found) < 2:
            continue
        first, second = (found[name] for name in spec["variants"])
        at = [number for number, _ in crossings(first, second)]
        others = dict(second)
        ahead = [spec["variants"][value < others[point]] for point, value in first if others.get(point, value) != value]
        turns = [ahead[0]] if ahead else []
        for _ in at:
            turns.append(next(name for name in spec["variants"] if name != turns[-1]))
        place = " ".join(str(rows.iloc[0][name]) for name in rest)
        places.append({"place": place, "at": at, "ahead": turns})
    return {**spec, "places": places}


def crossing_line(crossing: Mapping[str, Any]) -> str:
    """The verdict as a line of the report."""
    head = f"{crossing['name']} ({crossing['column']} along {crossing['axis']}, which is higher)"
    if not crossing["places"]:
        return f"{head}: no value, since one of them was not run."
    told = []
    for place in crossing["places"]:
        ends = [f"to {number:.1f}" for number in place["at"]]
        parts = [
            f"{name} {end}".strip()
            for name, end in zip(place["ahead"], [*ends, "beyond" if ends else ""], strict=False)
        ]
        told.append(f"{place['place'] or 'the study'}: {', '.join(parts) or 'neither'}")
    return f"{head}: {'; '.join(told)}."
