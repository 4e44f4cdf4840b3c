"""What a study's table says of the claims that its file names. Reads columns, runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sim.study.crossings import crossing_line, judge_crossing
from sim.study.plan import Study

_UNDECODED = "the run ends before the first decoded token; give more --tokens"
_OF_A_PROMPT = ("prefill_", "ttft_")
"""How columns begin that a run has without a decoded token."""


def judge(study: Study, table: pd.DataFrame, axes: Sequence[str]) -> dict[str, Any]:
    """Every claim, contest and comparison of the study, as plain values."""
    return {
        "claims": [_claim(spec, table, axes) for spec in study.claims],
        "best": [_best(spec, table, axes) for spec in study.best],
        "pairs": [_pair(spec, table, axes) for spec in study.pairs],
        "crossings": [judge_crossing(spec, _with_values(table, spec["column"]), axes) for spec in study.crossings],
    }


def _with_values(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """`table` without the column's values of runs that decoded nothing: policies cannot differ there."""
    if "decode_forwards" not in table or column.startswith(_OF_A_PROMPT):
        return table
    return table.assign(**{column: table[column].where(table["decode_forwards"] > 0)})


def _gap(rows: pd.DataFrame, column: str) -> dict[str, Any]:
    """num_empty: how many of `rows`, as `_with_values` has them, are without a value; why they are."""
    empty = rows[rows[column].isna()]
    undecoded = "decode_forwards" in empty and bool((empty["decode_forwards"] == 0).any())
    if rows.empty:
        why = "what it is about was not run"
    else:
        why = _UNDECODED if undecoded else "what it is held against was not run, or is 0"
    return {"num_empty": len(empty), "why_empty": why if rows.empty or len(empty) else None}


def _place(row: Any, axes: Sequence[str]) -> str:
    return " ".join(str(row[axis]) for axis in axes) or "the study"


def _claim(spec: Mapping[str, Any], table: pd.DataFrame, axes: Sequence[str]) -> dict[str, Any]:
    """Where a column of some variants stays within a limit, and where not; cells without a value are left out.

    split: column -> value, at which the cells are told apart.
    """
    rows = _with_values(table, spec["column"])
    rows = rows[rows["variant"].isin(spec["variants"])]
    chosen = rows.dropna(subset=[spec["column"]])
    holds: list[dict[str, Any]] = []
    fails: list[dict[str, Any]] = []
    for row in chosen.to_dict("records"):
        value = float(row[spec["column"]])
        kept = value <= spec.get("at_most", float("inf")) and value >= spec.get("at_least", float("-inf"))
        entry = {"place": _place(row, axes), "variant": row["variant"], "value": value}
        entry |= {column: row[column] for column in spec.get("split", {})}
        (holds if kept else fails).append(entry)
    counts = {"num_holds": len(holds), "num_fails": len(fails), **_gap(rows, spec["column"])}
    return {**spec, **counts, "holds": holds, "fails": fails}


def _best(spec: Mapping[str, Any], table: pd.DataFrame, axes: Sequence[str]) -> dict[str, Any]:
    """One variant against the best of others, by place; `gain` > 0 where it is better (the column is a cost)."""
    places: list[dict[str, Any]] = []
    column = spec["column"]
    table = _with_values(table, column)
    for _, rows in _by_place(table, axes):
        values = rows.set_index("variant")[column].dropna()
        others = values[[name for name in spec["of"] if name in values.index]]
        if spec["variant"] not in values.index or others.empty:
            continue
        own, best = float(values[spec["variant"]]), float(others.min())
        places.append(
            {
                "place": _place(rows.iloc[0], axes),
                "best": str(others.idxmin()),
                "best_value": best,
                "value": own,
                "gain": (best - own) / best if best else None,
            }
        )
    gains = [place["gain"] for place in places if place["gain"] is not None]
    return {
        **spec,
        "num_wins": sum(gain > 0 for gain in gains),
        "num_places": len(gains),
        "least_gain": min(gains, default=None),
        "most_gain": max(gains, default=None),
        **_gap(table[table["variant"].isin([spec["variant"], *spec["of"]])], column),
        "places": places,
    }


def _by_place(table: pd.DataFrame, axes: Sequence[str]) -> list[tuple[Any, pd.DataFrame]]:
    return list(table.groupby(list(axes), sort=False)) if axes else [((), table)]


def _pair(spec: Mapping[str, Any], table: pd.DataFrame, axes: Sequence[str]) -> dict[str, Any]:
    """The same cell at two values of one axis: where the one named fast costs more than the one named slow."""
    rest = [axis for axis in axes if axis != spec["axis"]]
    keys = [*rest, "variant"]
    table = _with_values(table, spec["column"])
    fast = table[table[spec["axis"]] == spec["fast"]].set_index(keys)[spec["column"]]
    slow = table[table[spec["axis"]] == spec["slow"]].set_index(keys)[spec["column"]]
    found: list[dict[str, Any]] = []
    for key in fast.dropna().index.intersection(slow.dropna().index, sort=False):
        names = key if isinstance(key, tuple) else (key,)
        found.append({"place": " ".join(map(str, names)), "ratio": float(fast[key] / slow[key])})
    inverted = [one for one in found if one["ratio"] > 1]
    counts = {"num_places": len(found), "num_inverted": len(inverted)}
    counts |= _gap(table[table[spec["axis"]].isin([spec["fast"], spec["slow"]])], spec["column"])
    return {**spec, **counts, "inverted": inverted, "places": found}


def sentences(verdicts: Mapping[str, Any]) -> list[str]:
    """Each verdict as a line of the report; of what has no value why it has none."""
    lines = [_claim_line(claim) for claim in verdicts["claims"]]
    lines += [_best_line(best) for best in verdicts["best"]]
    lines += [_pair_line(pair) for pair in verdicts["pairs"]]
    return lines + [crossing_line(crossing) for crossing in verdicts.get("crossings", ())]


def _no_value(verdict: Mapping[str, Any]) -> str:
    count = verdict["num_empty"]
    if not count:
        return f"no value, since {verdict['why_empty'] or 'what it is held against was not run'}"
    return f"no value in {count} cell{'' if count == 1 else 's'}: {verdict['why_empty']}"


def _listed(found: Sequence[str], most: int = 8) -> str:
    return f": {'; '.join(found)}" if 0 < len(found) <= most else ""


def _claim_line(claim: Mapping[str, Any]) -> str:
    limits = [f"{key.replace('_', ' ')} {claim[key]:g}" for key in ("at_most", "at_least") if key in claim]
    head = f"{claim['name']} ({claim['column']} {' and '.join(limits)})"
    if not claim["num_holds"] + claim["num_fails"]:
        return f"{head}: {_no_value(claim)}."
    held = [f"{one['variant']} at {one['place']}" for one in claim["holds"]]
    parts = [f"{claim['num_holds']} of {claim['num_holds'] + claim['num_fails']} cells{_listed(held)}"]
    for column, at in claim.get("split", {}).items():
        for word, is_above in (("at most", False), ("above", True)):
            holds, fails = (sum((one[column] > at) == is_above for one in claim[key]) for key in ("holds", "fails"))
            parts.append(f"where {column} is {word} {at:g}, in {holds} of {holds + fails}")
    if claim["why_empty"] == _UNDECODED:
        parts.append(_no_value(claim))
    return f"{head}: holds in {'; '.join(parts)}."


def _best_line(best: Mapping[str, Any]) -> str:
    others = best["of"][0] if len(best["of"]) == 1 else f"the best of {len(best['of'])}"
    head = f"{best['name']} ({best['column']}, {best['variant']} against {others})"
    if not best["num_places"]:
        return f"{head}: {_no_value(best)}."
    low, high = 100 * best["least_gain"], 100 * best["most_gain"]
    return f"{head}: better in {best['num_wins']} of {best['num_places']} places; it saves {low:.2f} to {high:.2f} %."


def _pair_line(pair: Mapping[str, Any]) -> str:
    head = f"{pair['name']} ({pair['column']}, {pair['fast']} over {pair['slow']})"
    if not pair["num_places"]:
        return f"{head}: {_no_value(pair)}."
    inverted = [f"{one['place']} ({one['ratio']:.2f})" for one in pair["inverted"]]
    return f"{head}: in {pair['num_inverted']} of {pair['num_places']} places{_listed(inverted)}."
